"""The benchmark's methods against plain CLIP in float64, on toys with a known answer."""

from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
from datasets import Dataset
from gaussian_peers import fit_stata, fit_transclip
from peers import ADAPTING, DPA, TRAINING_FREE, LaFTer, Task, train_text_classifier
from PIL import Image
from tiny_inputs import DESCRIPTIONS, draw_shape
from tolerances import COSINE, LOSS, assert_clear, assert_weights_close, within
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from microclip_hf import MicroCLIPTrainingArguments
from microclip_hf.images import crop_box, cut_squares
from microclip_hf.training.views import make_views


NAMES = ["red disc", "green_square", "blue bar"]
TEMPLATES = ["a photo of a {}.", "one {}, and nothing else at all"]
# Two classes with descriptions, two and three; the third's templates stand in, moved as far as the others' lie apart.
TEXTS = {"red disc": DESCRIPTIONS["red disc"], "green square": [*DESCRIPTIONS["green square"], "It has corners."]}
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings("ignore:1 of 3 classes have no descriptions"),
]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def cross_entropy(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


def random_units(*shape, seed=0):
    return unit(np.random.default_rng(seed).normal(size=shape))


def tensor(x):
    return torch.tensor(x, dtype=torch.float32)


def double(x):
    return x.detach().double().numpy()


@pytest.fixture(scope="module")
def plain(clip_folder):
    """Plain CLIP in float64: unit features of images, PIL or uint8; raw features of texts; `exp(logit_scale)`."""
    clip = CLIPModel.from_pretrained(clip_folder).double()
    processor, tokenizer = (kind.from_pretrained(clip_folder) for kind in (CLIPImageProcessorPil, CLIPTokenizer))

    @torch.no_grad()
    def images(pictures):
        pixel_values = processor(list(pictures), return_tensors="pt")["pixel_values"].double()
        return unit(clip.get_image_features(pixel_values).pooler_output.numpy())

    @torch.no_grad()
    def texts(sentences):
        tokens = (tokenizer([sentence], return_tensors="pt") for sentence in sentences)
        return torch.cat([clip.get_text_features(**own).pooler_output for own in tokens]).numpy()

    return SimpleNamespace(clip=clip, images=images, texts=texts, scale=clip.logit_scale.exp().item())


def draw_shapes(count, seed, size=None):
    rng = np.random.default_rng(seed)
    labels = [i % 3 for i in range(count)]
    images = [draw_shape(list(DESCRIPTIONS)[label], rng) for label in labels]
    return Dataset.from_dict({"image": [image.resize(size or image.size) for image in images], "label": labels})


@pytest.fixture
def task(clip_folder):
    return Task(str(clip_folder), NAMES, draw_shapes(12, 0), draw_shapes(6, 1), TEXTS, TEMPLATES)


def name_features(plain, templates=TEMPLATES):
    """Raw, `(C, num_templates, E)`."""
    prompts = [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in NAMES]
    return np.stack([plain.texts(own) for own in prompts])


def description_features(plain):
    """Raw where there are any, one array a class."""
    names, described = name_features(plain), [plain.texts(own) for own in TEXTS.values()]
    steps = [unit(unit(own).mean(0)) - unit(name.mean(0)) for own, name in zip(described, names, strict=False)]
    return [*described, unit(names[2]) + np.mean(steps, 0)]


@pytest.mark.parametrize(
    ("method", "templates"), [("zero_shot", TEMPLATES), ("zero_shot_single", ["a photo of a {}."])]
)
def test_zero_shot_takes_the_mean_of_raw_features_of_all_templates(task, plain, method, templates):
    expected = plain.images(task.test["image"]) @ unit(name_features(plain, templates).mean(1)).T
    np.testing.assert_allclose(TRAINING_FREE[method](task), expected, **within())


def test_cupl_takes_the_mean_of_the_descriptions_directions(task, plain):
    head = unit(np.stack([unit(own).mean(0) for own in description_features(plain)]))
    np.testing.assert_allclose(TRAINING_FREE["cupl"](task), plain.images(task.test["image"]) @ head.T, **within())


def wca_score(crops, image, descriptions, name, image_scale=4.0, text_scale=2.0):
    """One image against one class; all features of unit norm."""
    relevance = np.exp([np.exp(image_scale) * crop @ image for crop in crops])
    trust = np.exp([np.exp(text_scale) * text @ name for text in descriptions])
    score = 0.0
    for w, crop in zip(relevance / relevance.sum(), crops, strict=True):
        for v, text in zip(trust / trust.sum(), descriptions, strict=True):
            score += w * v * crop @ text
    return score


def test_wca_of_one_crop_that_is_the_whole_image(task, plain):
    """All is as without crops, but descriptions that are like the name weigh more."""
    task.test = draw_shapes(6, 1, size=(32, 32))
    names, images = unit(name_features(plain).mean(1)), plain.images(task.test["image"])
    head = []
    for own, name in zip(map(unit, description_features(plain)), names, strict=True):
        head.append(softmax(np.exp(2) * own @ name) @ own)
    scores = TRAINING_FREE["wca"](task, num_crops=1, crop_ratio=(1.0, 1.0))
    np.testing.assert_allclose(scores, images @ np.stack(head).T, **within())


@pytest.mark.parametrize("scales", [{}, {"image_scale": 3.0, "text_scale": 1.0}])
def test_wca_of_several_crops(task, plain, scales):
    task.seed = 3
    rng = np.random.default_rng(3)
    names, expected = unit(name_features(plain).mean(1)), []
    classes = list(zip(map(unit, description_features(plain)), names, strict=True))
    for image, g in zip(task.test["image"], plain.images(task.test["image"]), strict=True):
        boxes = [crop_box(64, 48, (0.4, 0.8), rng) for _ in range(5)]
        crops = plain.images(cut_squares(image, boxes, 32))
        expected.append([wca_score(crops, g, *own, **scales) for own in classes])
    scores = TRAINING_FREE["wca"](task, num_crops=5, crop_ratio=(0.4, 0.8), **scales)
    np.testing.assert_allclose(scores, expected, **within(2))  # weights are softmaxes of up to exp(4) times cosines


@pytest.mark.parametrize(("method", "fit"), [("transclip", fit_transclip), ("stata", fit_stata)])
def test_test_images_are_classified_by_texts_and_gaussians_alone(task, plain, method, fit):
    head = unit(np.stack([unit(own).mean(0) for own in description_features(plain)]))
    train, test = (plain.images(images["image"]) for images in (task.train, task.test))
    gaussians = fit(torch.tensor(train), torch.tensor(head), plain.scale)
    expected = np.log(softmax(plain.scale * test @ head.T)) + gaussians.scores(torch.tensor(test)).numpy()
    scores = TRAINING_FREE[method](task)
    np.testing.assert_allclose(scores, expected, **within(max(plain.scale, np.abs(expected).max())))
    task.test = task.test.select([3])
    torch.testing.assert_close(TRAINING_FREE[method](task)[0], scores[3], **within(plain.scale))


def test_seeds_are_the_draws_of_wca(task):
    scores = []
    for seed in (0, 0, 1):
        task.seed = seed
        scores.append(TRAINING_FREE["wca"](task, num_crops=2))
    assert scores[0].equal(scores[1]) and not torch.isclose(scores[0], scores[2], rtol=0, atol=1e-4).any(0).all()


def make_trainer(kind, task, folder, head=None, settings=None, **options):
    """A trainer of 2 crops with training arguments of its own; `head` becomes the classifier's weights."""
    args = MicroCLIPTrainingArguments(
        str(folder),
        per_device_train_batch_size=12,
        per_device_eval_batch_size=5,
        num_train_epochs=2,
        num_crops=2,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
        **(settings or {}),
    )
    options |= {"task": task} if kind.needs_task else {}
    trainer = kind(model=task.build(**kind.config), args=args, train_dataset=task.train, **options)
    if head is not None:
        trainer.model.classifier.weight.data.copy_(tensor(head))
    return trainer


def spread_head(features, seed=0):
    """A head that labels these features evenly: random images less the mean; rows of very different norms."""
    centred = features - features.mean(0)
    return unit(centred[np.random.default_rng(seed).permutation(len(features))[:3]]) * [[0.1], [1.0], [10.0]]


def clear_labels(features, head):
    scores = features @ unit(head).T
    assert_clear(scores)
    return scores.argmax(-1)


def composite(plain, batch):
    """`unit(sum_k softmax_k(z_k . g) z_k)` of every image, in float64."""
    images = []
    for g, crops in zip(plain.images(batch["weak"]), map(plain.images, batch["crops"]), strict=True):
        relevance = np.exp(crops @ g)
        images.append(unit(relevance @ crops / relevance.sum()))
    return np.stack(images)


@pytest.mark.parametrize("method", ["self_training", "wca_self_training"])
def test_self_training(task, plain, tmp_path, method):
    """Labels of the weak view or the crops, which here differ; the student's [CLS] on the strong view; fairness."""
    trainer = make_trainer(ADAPTING[method], task, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    own, other = plain.images(batch["weak"]), composite(plain, batch)
    if method == "wca_self_training":
        own, other = other, own
    head = spread_head(own)
    trainer.model.classifier.weight.data.copy_(tensor(head))
    labels = clear_labels(own, head)
    assert set(labels) == {0, 1, 2} and (labels != clear_labels(other, head)).any()
    captured = []
    hook = trainer.model.classifier.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    np.testing.assert_array_equal(trainer.refine_pseudo_labels(batch), labels)
    np.testing.assert_allclose(captured[0], own, **within())
    hook.remove()
    logits = plain.scale * plain.images(batch["strong"]) @ unit(head).T
    expected = cross_entropy(logits, labels).mean() - np.log(softmax(logits).mean(0)).mean() / 0.5
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected, rel=LOSS)


def test_lafters_text_classifier_tells_the_texts_apart(task, plain):
    head = train_text_classifier(task, 300, plain.scale)
    names = name_features(plain)
    for label, own in enumerate(description_features(plain)):
        scores = unit(np.concatenate([own, names[label]])) @ unit(double(head)).T
        assert_clear(scores)
        assert (scores.argmax(-1) == label).all()


def test_lafters_text_classifier_step_by_step(task, plain):
    """Noise of 0.1, labels smoothed by 0.1, and AdamW by hand."""
    classes = [np.concatenate(own) for own in zip(description_features(plain), name_features(plain), strict=True)]
    features = torch.tensor(unit(np.concatenate(classes)))
    labels = np.repeat(np.arange(3), [len(own) for own in classes])
    targets = torch.tensor(0.9 * np.eye(3)[labels] + 0.1 / 3)
    generator = torch.Generator().manual_seed(task.seed)
    head = torch.randn(3, 16, generator=generator).double() * 16**-0.5
    first, second = 0.0, 0.0
    for step in range(1, 6):
        noisy = features + 0.1 * torch.randn(len(features), 16, generator=generator)
        head.requires_grad_()
        logits = plain.scale * noisy @ (head / head.norm(dim=-1, keepdim=True)).T
        gradient = torch.autograd.grad(-(targets * logits.log_softmax(-1)).sum(-1).mean(), head)[0]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
        head = (head - 0.01 * (update + 0.01 * head)).detach()
    assert_weights_close({"head": train_text_classifier(task, 5, plain.scale)}, {"head": head}, way=5 * 0.01)


def test_lafters_prompts_lie_between_cls_and_patches(task, plain, tmp_path):
    trainer = make_trainer(LaFTer, task, tmp_path, num_prompts=3, text_steps=1)
    vision, captured = trainer.model.clip.vision_model, []
    assert vision.embeddings.prompts.shape == (3, 32)
    assert 0.1 < vision.embeddings.prompts.abs().max() <= (6 / (3 * 8**2 + 32)) ** 0.5
    vision.encoder.layers[0].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trainer.model(pixel_values=pixel_values)
    own = plain.clip.vision_model
    tokens, prompts = own.embeddings(pixel_values.double()), vision.embeddings.prompts.detach().double()
    expected = torch.cat([tokens[:, :1], prompts.expand(2, -1, -1), tokens[:, 1:]], 1)
    expected = own.pre_layrnorm(expected).detach()
    np.testing.assert_allclose(captured[0].detach(), expected, **within(expected.abs().max()))


def test_lafter_labels_without_prompts_by_the_text_classifier(task, plain, tmp_path):
    """The student has prompts, and starts as the text classifier too."""
    trainer = make_trainer(LaFTer, task, tmp_path, text_steps=1)
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    head = train_text_classifier(task, 1, plain.scale)
    assert model.classifier.weight.equal(head) and trainer.teacher.classifier.weight.equal(head)
    head = spread_head(plain.images(batch["weak"]))
    trainer.teacher.classifier.weight.copy_(tensor(head))
    for module in model.clip.vision_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data.mul_(1.5)  # which the student learned meanwhile
    expected = clear_labels(plain.images(batch["weak"]), head)
    assert set(expected) == {0, 1, 2}
    logits = []
    for _ in range(2):
        np.testing.assert_array_equal(trainer.refine_pseudo_labels(batch), expected)
        logits.append(model(pixel_values=trainer.normalize(batch["strong"])).logits)
        model.clip.vision_model.embeddings.prompts.data.neg_()
    assert ((logits[0] - logits[1]).abs() > 1e-3).any(-1).all()


def test_lafter_trains_prompts_layer_norms_and_the_head(task, tmp_path):
    trainer = make_trainer(LaFTer, task, tmp_path, text_steps=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not value.equal(before[name])}
    layer_norms = {name for name in before if "norm" in name or "layrnorm" in name}
    assert moved == layer_norms | {"clip.vision_model.embeddings.prompts", "classifier.weight"}


def dpa_labels(features, head, prototypes, means, scale, ratio):
    """Labels, weights and the text probabilities of a batch; `means` of at most 32 batches, this one's the last."""
    text = softmax(scale * features @ unit(head).T)
    aligned = text / np.mean(means, 0) if means else text
    aligned = aligned / aligned.sum(-1, keepdims=True)
    image = softmax(scale * features @ prototypes.T)
    mixture = ratio * image + (1 - ratio) * aligned
    assert_clear(mixture)
    labels = mixture.argmax(-1)
    chosen = np.arange(len(labels)), labels
    return labels, text[chosen] / text.max(-1) * image[chosen] / image.max(-1)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_dpas_labels_and_weights_over_more_batches_than_the_window(task, plain, tmp_path, ratio):
    head, prototypes, means = random_units(3, 16) * [[0.1], [1.0], [10.0]], random_units(3, 16, seed=1), []
    trainer = make_trainer(DPA, task, tmp_path, head, image_ratio=ratio)
    trainer.prototypes = tensor(prototypes)
    for batch in range(40):
        # The first batches are about one class, which the window forgets.
        features = unit(random_units(7, 16, seed=2 + batch) + (batch < 20) * unit(head[0]))
        means = [*means, softmax(plain.scale * features @ unit(head).T).mean(0)][-32:]
        labels, weights = trainer._label(tensor(features))
        expected, expected_weights = dpa_labels(features, head, prototypes, means, plain.scale, ratio)
        np.testing.assert_array_equal(labels, expected)
        # Quotients of four probabilities, each of which follows its logit.
        np.testing.assert_allclose(weights, expected_weights, rtol=4 * COSINE * plain.scale, atol=0)
    assert len(trainer.batch_means) == 32


def prototypes_of(features, labels, head):
    rows = [features[labels == label].sum(0) if (labels == label).any() else head[label] for label in range(len(head))]
    return unit(np.stack(rows))


def test_dpas_prototypes_of_classes_with_and_without_images(task, plain, tmp_path):
    """Of the first epoch by text alone; then by both, aligned, and no batch is remembered for it."""
    trainer = make_trainer(DPA, task, tmp_path)
    trainer.train_dataset.set_epoch(1)
    features = plain.images([example["weak"].copy() for example in trainer.train_dataset])
    trainer.train_dataset.set_epoch(0)
    head = spread_head(features)
    head[2] = -10 * features.mean(0)  # no image is like it
    trainer.model.classifier.weight.data.copy_(tensor(head))
    labels = clear_labels(features, head)
    assert set(labels) == {0, 1}
    trainer.start_epoch(1)
    np.testing.assert_allclose(trainer.prototypes, prototypes_of(features, labels, head), **within())

    # Prototypes that say the contrary of the head, and a mean that never gives class 1.
    prototypes = unit(head)[[1, 0, 2]]
    mean = np.array([0.9, 0.09, 0.01])
    trainer.prototypes = tensor(prototypes)
    trainer.batch_means.append(tensor(mean))
    aligned, _ = dpa_labels(features, head, prototypes, [mean], plain.scale, 0.5)
    assert (aligned != labels).any()
    trainer.start_epoch(1)
    np.testing.assert_allclose(trainer.prototypes, prototypes_of(features, aligned, head), **within())
    assert len(trainer.batch_means) == 1


def test_dpas_loss(task, plain, tmp_path):
    trainer = make_trainer(DPA, task, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    weak = plain.images(batch["weak"])
    head, prototypes = spread_head(weak), unit(spread_head(weak, seed=1) + spread_head(weak))
    trainer.model.classifier.weight.data.copy_(tensor(head))
    trainer.prototypes = tensor(prototypes)
    means = [softmax(plain.scale * weak @ unit(head).T).mean(0)]
    labels, weights = dpa_labels(weak, head, prototypes, means, plain.scale, 0.5)
    logits = plain.scale * plain.images(batch["strong"]) @ unit(head).T
    student = (weights * cross_entropy(logits, labels)).mean()
    fairness = -np.log(softmax(logits).mean(0)).mean()
    alignment = cross_entropy(100 * prototypes @ unit(head).T, np.arange(3)).mean()
    assert min(student, fairness, alignment) > 1e-3 and weights.min() < 0.9
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(student + fairness + alignment, rel=LOSS)


MIXTURE = {"class_mixture": True, "class_frequencies": "estimated", "distribution_alignment": True}


def test_microclip_without_the_last_mixture_is_its_student(task, tmp_path):
    settings = {**MIXTURE, "distribution_alignment": False}
    trainer = make_trainer(ADAPTING["microclip"], task, tmp_path, fits_last=False, settings=settings)
    trainer.train()
    assert trainer.mixer.first is not None and trainer.mixture is None
    assert not trainer.model.logit_adjustment.bias.any()


@pytest.mark.parametrize("part", ["alignment", "fairness", None])
def test_microclip_with_equal_frequencies_in_one_part(task, tmp_path, part):
    trainer = make_trainer(ADAPTING["microclip"], task, tmp_path, equal_in=part, settings=MIXTURE)
    trainer.train()
    frequencies = {"alignment": trainer.labeler.frequencies, "fairness": trainer.class_means.frequencies}
    estimated = trainer.mixer.first.mixture.frequencies
    for name, own in frequencies.items():
        assert own is None if name == part else own.equal(estimated)


def draw_colors(count, seed):
    """Pictures all of one colour, a little different everywhere."""
    rng = np.random.default_rng(seed)
    labels = [i % 3 for i in range(count)]
    pixels = [200 * np.eye(3)[label] + rng.integers(0, 50, size=(36, 48, 3)) for label in labels]
    return Dataset.from_dict({"image": [Image.fromarray(own.astype(np.uint8)) for own in pixels], "label": labels})


@pytest.fixture(scope="module")
def separable(clip_folder, tmp_path_factory):
    """Three colours, a CLIP that sees them far apart, and a stand-in for its text tower: each class's mean image."""
    train, test, names = draw_colors(12, 0), draw_colors(9, 1), ["red", "green", "blue"]
    clip, processor = CLIPModel.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    pixel_values = processor(list(train["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        clip.vision_model.post_layernorm.bias -= clip.vision_model(pixel_values).pooler_output.mean(0)
        features = unit(clip.get_image_features(pixel_values).pooler_output.numpy())
    folder = tmp_path_factory.mktemp("separable")
    for part in (clip, processor, CLIPTokenizer.from_pretrained(clip_folder)):
        part.save_pretrained(folder)
    means = tensor(np.stack([features[label::3].mean(0) for label in range(3)]))

    def encode_texts(clip, tokenizer, texts, batch_size=256):
        return torch.stack([means[[name in text for name in names].index(True)] for text in texts])

    descriptions = {name: [f"It is {name}.", f"{name} all over"] for name in names}
    return Task(str(folder), names, train, test, descriptions, ["{}", "a {} thing"]), encode_texts


@pytest.fixture
def separable_task(separable, monkeypatch):
    task, encode_texts = separable
    monkeypatch.setattr("microclip_hf.text_heads.encode_texts", encode_texts)
    monkeypatch.setattr("peers.encode_texts", encode_texts)
    return Task(**vars(task))


def adapt(method, task, **changes):
    """Two steps, by the benchmark."""
    args = {"per_device_train_batch_size": 6, "num_train_epochs": 1, "num_crops": 2, "learning_rate": 1e-3}
    args |= {"lr_scheduler_type": "constant", "logging_steps": 1, "use_cpu": True, **changes}
    options = {"text_steps": 30} if method == "lafter" else {}
    return benchmark.adapt(task, {"base": method, "config": {}, "args": args, "options": options})


def accuracy(scores, task):
    assert_clear(scores)
    return (scores.argmax(-1).numpy() == np.array(task.test["label"])).mean()


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_every_method_is_right_on_separable_classes(method, separable_task):
    assert accuracy(TRAINING_FREE[method](separable_task), separable_task) == 1


@pytest.mark.parametrize("method", ADAPTING)
def test_adaptation_keeps_what_is_right_and_does_not_see_labels(method, separable_task, monkeypatch):
    """Also: what is measured besides, and that no crops are made for nothing."""
    num_crops = []

    def count_crops(*args, **kwargs):
        views = make_views(*args, **kwargs)
        num_crops.append(len(views["crops"]))
        return views

    monkeypatch.setattr("microclip_hf.training.view_datasets.make_views", count_crops)
    before, _ = adapt(method, separable_task, learning_rate=0.0)
    after, extra = adapt(method, separable_task)
    assert accuracy(before, separable_task) == accuracy(after, separable_task) == 1
    assert (before - after).abs().max() > 0.05
    assert set(num_crops) == ({2} if method in ("wca_self_training", "microclip") else {0})
    paths = {"cls_accuracy", "fg_accuracy"} if method == "microclip" else set()
    assert extra.keys() == paths | {"last_log"} | (set() if method == "dpa" else {"pseudo_label_accuracy"})
    assert extra.get("pseudo_label_accuracy", [100, 100]) == [100, 100]
    assert extra["last_log"].get("effective_classes", 3) == pytest.approx(3, rel=LOSS)
    assert "pseudo_label_accuracy" not in extra["last_log"]
    assert all(accuracy(extra[name], separable_task) == 1 for name in paths)

    unlabelled = separable_task.train.remove_columns("label")
    for train in (unlabelled.add_column("label", [2, 0, 1] * 4), unlabelled):
        separable_task.train = train
        assert adapt(method, separable_task)[0].equal(after)


def test_the_mixture_before_training_is_that_of_a_run_without(separable_task):
    _, extra = adapt("microclip", separable_task, **MIXTURE)
    assert extra["last_log"].keys() >= {"mixture_agreement", "first_mixture_agreement", "training_was_kept"}
    untrained, own = adapt("microclip", separable_task, **MIXTURE, num_train_epochs=0)
    torch.testing.assert_close(extra["first_mixture_accuracy"], untrained, **within(untrained.abs().max()))
    assert "first_mixture_accuracy" not in own


def test_seeds_change_adaptation(separable_task):
    scores, _ = adapt("microclip", separable_task)
    separable_task.seed = 1
    assert not adapt("microclip", separable_task)[0].equal(scores)


def test_alignment_counts_in_the_scores(separable_task):
    """Of six images, three, two and one are of each class, and that is how often they were expected."""
    separable_task.train = separable_task.train.select([0, 3, 6, 1, 4, 2])
    scores, extra = adapt("microclip", separable_task, distribution_alignment=True)
    unadjusted = 0.5 * extra["cls_accuracy"] + 0.5 * extra["fg_accuracy"]
    torch.testing.assert_close(extra["unadjusted_accuracy"], unadjusted, **within(unadjusted.abs().max()))
    bias = unadjusted - scores
    torch.testing.assert_close(bias, torch.tensor([[1.5, 1.0, 0.5]]).log().expand(9, -1), rtol=0, atol=1e-3)
