"""The class mixture in a run: what the model predicts by, frequencies, interruptions, and training taken back."""

import json

import numpy as np
import pytest
import torch
from adaptation import DESCRIPTIONS, draw_images
from conftest import CLASS_NAMES
from datasets import Image
from torch.testing import assert_close

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.class_mixture import balance_text
from microclip_hf.data.class_frequencies import read_class_frequencies
from microclip_hf.data.sources import load_image_folder
from microclip_hf.training import mixing
from microclip_hf.training import trainer as trainer_module
from microclip_hf.training.run import adapt


NUM_IMAGES = 24


def make_trainer(clip_folder, folder, num_images=NUM_IMAGES, config=None, **options):
    model = MicroCLIPForImageClassification.from_clip(
        clip_folder,
        CLASS_NAMES,
        descriptions=DESCRIPTIONS,
        **{"prior_weighting": "uniform", "fusion_ratio": 0.75, **(config or {})},
    )
    defaults = {"num_train_epochs": 0, "class_mixture": True, "class_frequencies": "estimated", "num_crops": 0}
    defaults |= {"disable_tqdm": True}
    args = MicroCLIPTrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=8,
        **{**defaults, **options},
    )
    dataset = draw_images(num_images) if isinstance(num_images, int) else num_images
    return MicroCLIPTrainer(model=model, args=args, train_dataset=dataset)


def fused_features(trainer):
    """Of all images, as prediction takes them, `(N, E)`, and their [CLS] embeddings."""
    images = [example["image"].convert("RGB") for example in trainer.train_dataset.dataset]
    pixel_values = trainer.processing_class(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = trainer.model.eval().encode_image(pixel_values)
    ratio = trainer.model.config.fusion_ratio
    return ratio * output.cls_embeds + (1 - ratio) * output.fg_embeds, output.cls_embeds, pixel_values


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_model_predicts_what_the_mixture_does(clip_folder, tmp_path, epochs):
    trainer = make_trainer(clip_folder, tmp_path, num_train_epochs=epochs)
    trainer.train()
    trainer.save_model()
    model = MicroCLIPForImageClassification.from_pretrained(tmp_path)
    features, _, pixel_values = fused_features(trainer)
    mixture = trainer.mixture
    expected = features.double() @ mixture.weight.double().T + mixture.bias.double()
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits.double()
    # Float32 sums of E products: some roundings of the largest of them.
    scale = mixture.weight.norm(dim=-1).max() * features.norm(dim=-1).max() + mixture.bias.abs().max()
    bound = 16 * torch.finfo(torch.float32).eps * scale.item()
    assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=bound, rtol=0)


def test_labels_are_those_of_the_mixture_and_the_texts(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path)
    trainer.train()
    features, cls_embeds, _ = fused_features(trainer)  # of the encoder, which is as it was
    model = make_trainer(clip_folder, tmp_path).model  # before the mixture was merged into it
    logits = model.logit_scale * model.prior_head(cls_embeds)  # both heads are the same there
    log_mean = ((logits.softmax(-1).sum(0) + 1) / (NUM_IMAGES + len(CLASS_NAMES))).log()
    texts = balance_text(logits, log_mean)
    joint = trainer.mixture.scores(features) + trainer.mixture.text_weight * texts
    top = joint.topk(2).values
    is_clear = top[:, 0] - top[:, 1] > 0.5  # features are kept in half precision
    assert is_clear.sum() >= NUM_IMAGES // 2
    assert trainer.diagnostics.pseudo_labels[is_clear].equal(joint.argmax(-1)[is_clear].int())


def test_without_training_no_weight_of_the_encoder_moves(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not value.equal(before[name])}
    assert moved == {"classifier.weight", "logit_adjustment.scale", "logit_adjustment.bias"}


def test_labels_of_the_data_do_not_matter(clip_folder, tmp_path):
    results = []
    for name in ("with", "without"):
        dataset = draw_images(NUM_IMAGES)
        dataset = dataset if name == "with" else dataset.remove_columns("label")
        trainer = make_trainer(clip_folder, tmp_path / name, dataset)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(value.equal(results[1][name]) for name, value in results[0].items())


def test_an_interrupted_pass_goes_on(clip_folder, tmp_path, monkeypatch):
    whole = make_trainer(clip_folder, tmp_path / "whole")
    whole.train()
    encoded = []
    encode = MicroCLIPForImageClassification.encode_image

    def interrupted(model, pixel_values, *args, **kwargs):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(pixel_values))
        return encode(model, pixel_values, *args, **kwargs)

    monkeypatch.setattr(MicroCLIPForImageClassification, "encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(clip_folder, tmp_path / "again", per_device_eval_batch_size=6).train()
    num_before = sum(encoded)
    encoded.clear()
    encoded.append(0)
    monkeypatch.setattr(
        MicroCLIPForImageClassification,
        "encode_image",
        lambda model, pixels, *args, **kwargs: encoded.append(len(pixels)) or encode(model, pixels, *args, **kwargs),
    )
    again = make_trainer(clip_folder, tmp_path / "again", per_device_eval_batch_size=6)
    again.train()
    assert 0 < num_before < NUM_IMAGES and sum(encoded) == NUM_IMAGES - num_before
    for name, value in again.model.state_dict().items():
        assert_close(value, whole.model.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_a_complete_pass_is_not_made_again(clip_folder, tmp_path, monkeypatch):
    first = make_trainer(clip_folder, tmp_path)
    first.train()
    again = make_trainer(clip_folder, tmp_path)
    monkeypatch.setattr(MicroCLIPForImageClassification, "encode_image", lambda *args: pytest.fail("it is computed"))
    again.train()
    assert all(value.equal(again.model.state_dict()[name]) for name, value in first.model.state_dict().items())


def test_features_that_are_not_finite_are_an_error(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path)
    trainer.model.fg_pooling.value_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"features of the images.*Check the model's weights"):
        trainer.train()


def test_features_of_other_weights_are_not_used(clip_folder, tmp_path):
    make_trainer(clip_folder, tmp_path).train()
    other = make_trainer(clip_folder, tmp_path)
    other.model.clip.visual_projection.weight.data.mul_(-1)
    other.train()
    fresh = make_trainer(clip_folder, tmp_path / "fresh")
    fresh.model.clip.visual_projection.weight.data.mul_(-1)
    fresh.train()
    assert all(value.equal(other.model.state_dict()[name]) for name, value in fresh.model.state_dict().items())


def test_training_that_leads_away_is_taken_back(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "MAX_AGREEMENT_LOSS", -2.0)  # whatever training does, it isn't enough
    before = make_trainer(clip_folder, tmp_path / "before")
    before.train()
    trainer = make_trainer(clip_folder, tmp_path / "trained", num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step > 0
    assert trainer.state.log_history[-1]["training_was_kept"] == 0
    for name, value in trainer.model.state_dict().items():
        assert value.equal(before.model.state_dict()[name]), name


def test_given_frequencies(clip_folder, tmp_path):
    path = tmp_path / "shares.csv"
    path.write_text(
        "class,share\n" + "\n".join(f"{name},{share}" for name, share in zip(CLASS_NAMES, (6, 3, 1), strict=True))
    )
    trainer = make_trainer(clip_folder, tmp_path / "run", class_frequencies=str(path))
    trainer.train()
    assert_close(trainer.mixture.frequencies, torch.tensor([0.6, 0.3, 0.1]))
    with pytest.raises(ValueError, match="there is no such file; pass 'equal', 'estimated', or a CSV"):
        make_trainer(clip_folder, tmp_path / "run", class_frequencies="even")


def test_frequencies_reach_alignment_and_fairness(clip_folder, tmp_path):
    """With shares (6, 3, 1) the division of predictions and both parts differ from equal ones by log pi."""
    path = tmp_path / "shares.json"
    path.write_text(json.dumps(dict(zip(CLASS_NAMES, (0.6, 0.3, 0.1), strict=True))))
    options = {"class_mixture": False, "distribution_alignment": True, "max_steps": 1, "fairness_weight": 1.0}
    runs = []
    for frequencies in ("equal", str(path)):
        trainer = make_trainer(clip_folder, tmp_path / "run", class_frequencies=frequencies, **options)
        trainer.train()
        runs.append(trainer)
    equal, given = (run.model.logit_adjustment.bias for run in runs)
    shares = torch.tensor([0.6, 0.3, 0.1])
    assert_close(given, equal - (3 * shares).log(), atol=1e-5, rtol=0)
    mean = runs[1].class_means.log_mean
    assert runs[1].state.log_history[0]["fairness"] == pytest.approx(-2 * (shares * mean).sum().item(), rel=1e-5)


def test_labels_made_once_teach(clip_folder, tmp_path, monkeypatch):
    options = {"num_train_epochs": 2, "label_refresh": "never", "fairness_weight": 0.0, "num_crops": 2}
    trainer = make_trainer(clip_folder, tmp_path, **options)
    taught = {}
    refine = trainer.refine_pseudo_labels

    def remember(inputs):
        assert "crops" not in inputs or inputs["crops"].shape[1] == 0
        labels = refine(inputs)
        for index, label in zip(inputs["index"].tolist(), labels.tolist(), strict=True):
            assert taught.setdefault(index, label) == label
        return labels

    monkeypatch.setattr(trainer, "refine_pseudo_labels", remember)
    trainer.train()
    fitted = make_trainer(clip_folder, tmp_path / "fitted", num_crops=2)
    fitted.train()
    assert taught == dict(enumerate(fitted.diagnostics.pseudo_labels.tolist()))
    with pytest.raises(ValueError, match="takes the labels of a class mixture"):
        make_trainer(clip_folder, tmp_path, label_refresh="never", class_mixture=False)


def test_few_images(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path / "few", len(CLASS_NAMES))
    trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    with pytest.raises(ValueError, match=r"needs as many images as classes, and there are 2 images of 3 classes"):
        make_trainer(clip_folder, tmp_path / "fewer", len(CLASS_NAMES) - 1)


@pytest.mark.parametrize("change", ["images", "architecture", "image processor"])
def test_features_of_something_else_are_not_used(clip_folder, tmp_path, change):
    def make(folder):
        config = {"saliency_affinity": "cosine", "fg_query": "cls"} if change == "architecture" else {}
        images = draw_images(NUM_IMAGES)
        images = images.select([*range(1, NUM_IMAGES), 0]) if change == "images" else images
        trainer = make_trainer(clip_folder, folder, images, config)
        if change == "image processor":
            trainer.model.image_processor.image_mean = [0.4, 0.4, 0.4]
        return trainer

    make_trainer(clip_folder, tmp_path / "used").train()
    again = make(tmp_path / "used")
    fresh = make(tmp_path / "fresh")
    again.train()
    fresh.train()
    assert all(value.equal(again.model.state_dict()[name]) for name, value in fresh.model.state_dict().items())
    assert again.diagnostics.pseudo_labels.equal(fresh.diagnostics.pseudo_labels)


@pytest.fixture
def photos(tmp_path):
    """A folder of images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, example in enumerate(draw_images(NUM_IMAGES)):
        example["image"].save(folder / f"{index:02}.png")
    return folder


def test_an_image_that_breaks_while_training_goes_on(clip_folder, tmp_path, photos):
    trainer = make_trainer(clip_folder, tmp_path / "run", load_image_folder(photos, CLASS_NAMES), num_train_epochs=1)
    start = trainer.start_training
    trainer.start_training = lambda: ((photos / "05.png").write_bytes(b"no image"), start())
    with pytest.warns(UserWarning, match="1 of 24 images can't be read"):
        trainer.train()
    assert trainer.mixture is not None and trainer.state.log_history[-1]["mixture_agreement"] <= 1


def test_an_image_that_is_repaired_after_the_first_pass_comes_in(clip_folder, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(mixing, "NUM_SAMPLED", 1)  # or the repair would be noticed, and all features made anew
    options = {"num_train_epochs": 1, "label_refresh": "never", "fairness_weight": 0.0}
    content = (photos / "05.png").read_bytes()
    (photos / "05.png").write_bytes(b"no image")
    first = make_trainer(clip_folder, tmp_path / "run", load_image_folder(photos, CLASS_NAMES), **options)
    first.start_training = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.warns(UserWarning, match="1 of 24 images can't be read"), pytest.raises(KeyboardInterrupt):
        first.train()
    (photos / "05.png").write_bytes(content)
    again = make_trainer(clip_folder, tmp_path / "run", load_image_folder(photos, CLASS_NAMES), **options)
    again.train()
    assert not again.train_dataset.unreadable.any() and (again.mixer.first.labels >= 0).all()
    assert all(value.isfinite().all() for value in again.model.state_dict().values())


def kept_features(folder):
    return np.load(folder / "_features" / "first" / "complete.npy")


@pytest.mark.parametrize("share", [0.05, 0.2], ids=["too many", "passed over"])
def test_images_that_are_repaired_in_place_are_read_again(clip_folder, tmp_path, photos, monkeypatch, share):
    """And of the others only those in their batches."""
    monkeypatch.setattr(mixing, "NUM_SAMPLED", 1)  # or the repair would be noticed, and all features made anew
    monkeypatch.setattr("microclip_hf.passes.photo_batches.BLOCK", 4)

    def run(name):
        images = load_image_folder(photos, CLASS_NAMES)
        options = {"per_device_eval_batch_size": 4, "max_corrupt_share": share}
        make_trainer(clip_folder, tmp_path / name, images, **options).train()

    run("whole")
    contents = {name: (photos / name).read_bytes() for name in ("05.png", "06.png", "21.png")}
    for name in contents:
        (photos / name).write_bytes(b"no image")
    if share == 0.05:
        with pytest.raises(ValueError, match="At least 3 of 24 images can't be read"):
            run("again")
        assert not (tmp_path / "again" / "_features" / "first" / "complete.npy").exists()
    else:
        with pytest.warns(UserWarning, match="3 of 24 images can't be read"):
            run("again")
        assert np.flatnonzero(np.isnan(kept_features(tmp_path / "again")[:, 0])).tolist() == [5, 6, 21]
    for name, content in contents.items():
        (photos / name).write_bytes(content)
    encoded = []
    encode = MicroCLIPForImageClassification.encode_image
    monkeypatch.setattr(
        MicroCLIPForImageClassification,
        "encode_image",
        lambda model, pixels, *args, **kwargs: encoded.append(len(pixels)) or encode(model, pixels, *args, **kwargs),
    )
    run("again")
    assert encoded == [4, 4]
    assert np.array_equal(kept_features(tmp_path / "again"), kept_features(tmp_path / "whole"))
    left = {path.name for path in (tmp_path / "again" / "_features" / "first").iterdir()}
    assert left == {"complete.npy", "facts.json"}


def test_images_of_a_feature_that_converts_them_come_as_it_gives_them(clip_folder, tmp_path):
    colours = draw_images(NUM_IMAGES)
    grey = colours.cast_column("image", Image(mode="L"))
    by_hand = colours.map(lambda row: {"image": row["image"].convert("L")}, features=colours.features)
    for name, images in (("feature", grey), ("by hand", by_hand), ("colours", colours)):
        make_trainer(clip_folder, tmp_path / name, images).train()
    assert np.array_equal(kept_features(tmp_path / "feature"), kept_features(tmp_path / "by hand"))
    assert not np.allclose(kept_features(tmp_path / "feature"), kept_features(tmp_path / "colours"), atol=2e-3)


def test_equal_frequencies_are_kept_equal(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, class_frequencies="equal")
    trainer.train()
    assert_close(trainer.mixture.frequencies, torch.full((len(CLASS_NAMES),), 1 / len(CLASS_NAMES)))


@pytest.mark.parametrize("options", [{}, {"label_refresh": "never", "num_train_epochs": 1}])
def test_a_prior_that_nobody_needs_is_refused(clip_folder, tmp_path, options):
    with pytest.raises(ValueError, match=r"prior_refresh 'never' keeps a prior .* and this run makes none"):
        make_trainer(clip_folder, tmp_path, prior_refresh="never", **options)


def test_what_cannot_be_counted_is_refused(clip_folder, tmp_path):
    stream = draw_images(6).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"class mixture is fitted to images that can be counted.*ViewStream"):
        make_trainer(clip_folder, tmp_path, stream, max_steps=1)
    with pytest.raises(ValueError, match="num_train_epochs is 0, so nothing would be adapted"):
        make_trainer(clip_folder, tmp_path, class_mixture=False)


def test_a_whole_run(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path)
    adapt(trainer.model, draw_images(NUM_IMAGES), trainer.args, draw_images(6), descriptions=DESCRIPTIONS)
    assert (tmp_path / "pseudo_labels.csv").read_text().count("\n") == NUM_IMAGES + 1
    facts = json.loads((tmp_path / "report" / "run.json").read_text())
    assert facts["frequencies"].keys() == set(CLASS_NAMES) and isinstance(facts["absent"], list)
    card = (tmp_path / "README.md").read_text()
    assert "class_mixture" in card and "class_frequencies" in card
    assert "learning_rate" not in card and "![Accuracies, and images before and after](adaptation.png)" in card
    page = (tmp_path / "report.html").read_text()
    assert 'id="curves"' not in page and 'id="changed"' not in page and "Frequencies with standard errors" in page


def find_bars(text):
    return {line.split(":")[0] for line in text.replace("\r", "\n").split("\n") if "it/s]" in line or "%|" in line}


@pytest.mark.parametrize(
    ("epochs", "bars"),
    [(0, {"Features of the images"}), (1, {"Features before training", "Adapting", "Features after training"})],
)
def test_bars_say_what_is_under_way(clip_folder, tmp_path, capsys, epochs, bars):
    trainer = make_trainer(clip_folder, tmp_path, num_train_epochs=epochs, save_strategy="no", disable_tqdm=False)
    capsys.readouterr()
    trainer.train()
    assert find_bars(capsys.readouterr().err) == bars


def test_files_of_frequencies(tmp_path):
    path = tmp_path / "shares.csv"
    for text, problem in (
        ("oak,1\nelm,2", "lacks"),
        ("oak,1\nelm,2\nash,3\noka,1", "which is none of the 3 classes"),
        ("oak,1\nelm,2\nash,-1", "expected a number, 0 or more"),
        ("oak,1\nelm,2\nash", "expected two columns with a comma between"),
        ("oak,5%\nelm,2\nash,1", "gives 'oak' the share '5%'"),
        ("oak,1\nelm,2\nElm,2\nash,1", "twice"),
        ("oak,0\nelm,0\nash,0", "no share above 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            read_class_frequencies(path, ["oak", "elm", "ash"])
    path.write_text("name;share\n".replace(";", ",") + "Ash,30\noak,0\nelm,10\n")
    shares = read_class_frequencies(path, ["oak", "elm", "ash"])
    assert shares == pytest.approx([0, 0.25, 0.75], abs=1e-5) and min(shares) > 0
