"""Self-training: what moves, what doesn't, what may not matter, and what bad input gets."""

import json

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from datasets import ClassLabel, Dataset, DatasetDict
from decisions import ClearDecisions
from tiny_inputs import LOGIT_SCALE, draw_shape
from tolerances import GRADIENT, LOSS, assert_clear, within
from torch.testing import assert_close
from transformers.trainer_utils import get_last_checkpoint

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.training.checks import check_classes


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    labels = [i % 3 for i in range(12)]
    return Dataset.from_dict({"image": [draw_shape(CLASS_NAMES[label], rng) for label in labels], "label": labels})


def arguments(folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 5,
        "num_train_epochs": 2,
        "num_crops": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
    }
    return MicroCLIPTrainingArguments(str(folder), **{**defaults, **kwargs})


def adapt(model, folder, dataset, **kwargs):
    trainer = MicroCLIPTrainer(model=model, args=arguments(folder, **kwargs), train_dataset=dataset)
    trainer.train()
    return trainer


@pytest.fixture
def make_model(clip_folder):
    """The same weights at every call."""
    return lambda **kwargs: MicroCLIPForImageClassification.from_clip(
        clip_folder, CLASS_NAMES, prior_weighting="uniform", **kwargs
    )


def test_every_trainable_parameter_moves_and_nothing_else(make_model, images, tmp_path):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model, tmp_path, images)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layer_norms = {name for name in before if "norm" in name or "layrnorm" in name}
    projections = {f"fg_pooling.{name}_proj.weight" for name in ("query", "key", "value")}
    assert trainable == layer_norms | projections | {"classifier.weight"}
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == trainable


def test_labels_do_not_matter(make_model, images, tmp_path):
    """Right labels, shuffled labels, none: identical weights."""
    shuffled = images.remove_columns("label").add_column("label", [2, 0, 1] * 4)
    weights = []
    for dataset in (images, shuffled, images.remove_columns("label")):
        model = make_model()
        adapt(model, tmp_path, dataset)
        weights.append(model.state_dict())
    for other in weights[1:]:
        assert all(value.equal(other[name]) for name, value in weights[0].items())


def test_the_same_seed_gives_the_same_run(make_model, images, tmp_path):
    losses = []
    for seed in (0, 0, 1):
        trainer = adapt(make_model(), tmp_path, images, seed=seed)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.numerical
def test_logged_metrics(make_model, images, tmp_path):
    trainer = adapt(make_model(), tmp_path, images, fairness_weight=0.5)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2 * 3
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.5 * entry["fairness"], rel=LOSS)
        assert 0 <= entry["student_agreement"] <= 1 and 0 <= entry["pseudo_label_accuracy"] <= 1


@pytest.mark.numerical
def test_pseudo_labels_follow_the_weights(make_model, images, tmp_path):
    """They are recomputed at every step: with another head the same views get other labels."""
    model = make_model()
    trainer = MicroCLIPTrainer(model=model, args=arguments(tmp_path, prior_ratio=0), train_dataset=images)
    batch = next(iter(trainer.get_train_dataloader()))
    with ClearDecisions():
        labels = trainer.refine_pseudo_labels(batch)
    model.classifier.weight.data.copy_(model.classifier.weight.roll(1, 0).clone())
    assert trainer.refine_pseudo_labels(batch).equal((labels + 1) % 3)


@pytest.mark.numerical
def test_pseudo_labels_are_computed_without_autocast(make_model, images, tmp_path):
    """bf16 training labels as float32 does, while the student does run in bf16."""
    labels, dtypes = [], []
    for bf16 in (False, True):
        model = make_model()
        trainer = MicroCLIPTrainer(model=model, args=arguments(tmp_path, bf16=bf16), train_dataset=images)
        wrapped = trainer.accelerator.prepare(model)
        batch = next(iter(trainer.get_train_dataloader()))
        labels.append(trainer.refine_pseudo_labels(batch))
        model.clip.visual_projection.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
        trainer.refine_pseudo_labels(batch)
        wrapped(pixel_values=trainer.normalize(batch["strong"]))
    assert labels[0].equal(labels[1])
    assert torch.bfloat16 in dtypes[-2:] and set(dtypes[:-2]) == {torch.float32}


def test_batches_without_crops_or_extras_are_enough(make_model, tmp_path):
    views = torch.randint(0, 256, (6, 2, 3, 32, 32), dtype=torch.uint8)
    dataset = [{"weak": pair[0], "strong": pair[1]} for pair in views]
    adapt(make_model(), tmp_path, dataset)
    empty = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    adapt(make_model(), tmp_path, [{**example, "crops": empty} for example in dataset])


@pytest.mark.numerical
def test_views_are_normalised_with_the_processors_constants(make_model, images, tmp_path):
    trainer = MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path), train_dataset=images)
    view = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pictures = [image.permute(1, 2, 0).numpy() for image in view]
    expected = trainer.processing_class(pictures, return_tensors="pt")["pixel_values"]
    assert_close(trainer.normalize(view), expected, **within())
    model = make_model()
    model.image_processor = None
    bare = MicroCLIPTrainer(model=model, args=arguments(tmp_path), train_dataset=images)
    assert_close(bare.normalize(view), expected, **within())


@pytest.mark.numerical
def test_evaluation(make_model, images, tmp_path):
    model = make_model()
    trainer = MicroCLIPTrainer(model=model, args=arguments(tmp_path), eval_dataset=images)
    pixel_values = model.image_processor([image for image in images["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad(), ClearDecisions():
        logits = model(pixel_values).logits
    assert_clear(logits)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == np.mean(logits.argmax(-1).numpy() == images["label"])
    assert metrics["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(images["label"])).item(), rel=LOSS
    )
    unlabelled = trainer.predict(images.remove_columns("label"))
    assert_close(torch.tensor(unlabelled.predictions), logits, **within(LOGIT_SCALE))


def test_saved_folders_hold_no_pickle_and_load(make_model, images, tmp_path):
    trainer = adapt(make_model(), tmp_path, images)
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "preprocessor_config.json", "modeling_microclip.py", "training_args.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert json.loads((tmp_path / "training_args.json").read_text())["num_crops"] == 2
    loaded = MicroCLIPForImageClassification.from_pretrained(tmp_path)
    assert all(value.equal(loaded.state_dict()[name]) for name, value in trainer.model.state_dict().items())


def test_what_a_killed_run_left_unfinished_is_never_saved(make_model, images, tmp_path):
    (tmp_path / "_incomplete" / "checkpoint-5").mkdir(parents=True)
    trainer = MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path), train_dataset=images)
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "config.json" in names and not names & {"checkpoint-5", "_incomplete"}


def test_rotated_checkpoints_leave_nothing_behind(make_model, images, tmp_path):
    adapt(make_model(), tmp_path, images, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_resume_between_epochs(make_model, images, tmp_path):
    whole = adapt(make_model(), tmp_path / "whole", images, num_train_epochs=3, save_strategy="epoch")
    model = make_model()
    args = arguments(tmp_path / "other", num_train_epochs=3, save_strategy="no")
    resumed = MicroCLIPTrainer(model=model, args=args, train_dataset=images)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == whole.state.global_step == 9
    for name, value in whole.model.state_dict().items():
        assert value.equal(model.state_dict()[name]), name


def test_resume_with_other_classes_is_refused(make_model, clip_folder, images, tmp_path):
    """The same names in another order would mislabel everything."""
    adapt(make_model(), tmp_path, images, num_train_epochs=1, save_strategy="epoch")
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES[::-1], prior_weighting="uniform")
    trainer = MicroCLIPTrainer(model=model, args=arguments(tmp_path), train_dataset=images)
    with pytest.raises(ValueError, match="number 1 was 'red disc' and is now 'blue bar'"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="number 3 was 'blue bar' and is now missing"):
        check_classes(get_last_checkpoint(tmp_path), CLASS_NAMES[:2])


def test_labels_are_matched_by_name(make_model, images, tmp_path):
    """Data sets number their classes in an order of their own."""
    order = sorted(CLASS_NAMES)
    labels = [order.index(CLASS_NAMES[label]) for label in images["label"]]
    renumbered = images.remove_columns("label").add_column("label", labels)
    renumbered = renumbered.cast_column("label", ClassLabel(names=[name.replace(" ", "_") for name in order]))
    evaluations, logs = [], []
    for dataset in (images, renumbered):
        trainer = adapt(make_model(), tmp_path, dataset)
        evaluations += [trainer.evaluate(dataset), trainer.evaluate({"test": dataset})]
        assert trainer.predict(dataset).label_ids.tolist() == images["label"]
        constructed = MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path), eval_dataset=dataset)
        for loader in (constructed.get_eval_dataloader(), trainer.get_eval_dataloader(dataset)):
            assert torch.cat([batch["labels"] for batch in loader]).tolist() == images["label"]
        logs.append([entry.get("pseudo_label_accuracy") for entry in trainer.state.log_history])
    assert logs[0] == logs[1]
    assert evaluations[0]["eval_accuracy"] == evaluations[2]["eval_accuracy"]
    assert evaluations[1]["eval_test_accuracy"] == evaluations[3]["eval_test_accuracy"]
    strange = renumbered.cast_column("label", ClassLabel(names=["2022", "2023", "2024"]))
    assert (
        "labels"
        not in MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path), train_dataset=strange).train_dataset[0]
    )
    with pytest.raises(ValueError, match="labels '2022', '2023', '2024' are none of the 3 classes"):
        MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path), eval_dataset=strange)


def test_labels_of_a_saved_model_keep_their_order(make_model, images, tmp_path):
    """JSON sorts the names of label2id; the images' labels are numbered like the classes all the same."""
    make_model().save_pretrained(tmp_path / "saved")
    model = MicroCLIPForImageClassification.from_pretrained(tmp_path / "saved")
    named = images.cast_column("label", ClassLabel(names=[name.replace(" ", "_") for name in CLASS_NAMES]))
    trainer = MicroCLIPTrainer(model=model, args=arguments(tmp_path), eval_dataset=named, train_dataset=named)
    assert trainer.predict(named).label_ids.tolist() == images["label"]
    assert [trainer.train_dataset[index]["labels"] for index in range(12)] == images["label"]


@pytest.mark.numerical
def test_accumulated_gradients_are_not_scaled_up(make_model, images, tmp_path):
    """Without fairness, which looks at whole batches, 2 x 6 images give the gradient of 12; labels or not."""
    weights = []
    start = make_model().state_dict()
    for dataset in (images, images.remove_columns("label")):
        for batch_size, accumulation in ((12, 1), (6, 2)):
            model = make_model()
            kwargs = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
            with ClearDecisions():
                adapt(model, tmp_path, dataset, num_train_epochs=1, fairness_weight=0.0, optim="sgd", **kwargs)
            weights.append(model.state_dict())
    for name, value in weights[0].items():
        moved = (value - start[name]).norm()
        for other in weights[1:]:
            # A step is added to weights of about 1, of which float32 keeps 6e-8.
            assert (other[name] - value).norm() <= GRADIENT * moved + 1e-7 * value.norm(), name


def test_bad_input(make_model, images, tmp_path, clip):
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match="pass a MicroCLIPForImageClassification"):
        MicroCLIPTrainer(model=clip, args=args)
    with pytest.raises(ValueError, match=r"hold .*'picture'.*; expected a PIL image under 'image'"):
        MicroCLIPTrainer(model=make_model(), args=args, train_dataset=[{"picture": 1}])
    with pytest.raises(ValueError, match=r"hold {'image': 'str'}; expected a PIL image"):
        MicroCLIPTrainer(model=make_model(), args=args, train_dataset=[{"image": "photo.jpg"}])
    with pytest.raises(TypeError, match="pass an image processor"):
        MicroCLIPTrainer(model=make_model(), args=args, processing_class=torch.nn.Identity())
    trainer = MicroCLIPTrainer(model=make_model(), args=args)
    with pytest.raises(ValueError, match=r"Views are torch.float32; pass them as uint8"):
        trainer.normalize(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        MicroCLIPTrainer(model=make_model(), args=args, train_dataset=[])
    with pytest.raises(TypeError, match="pass one data set, such as one split"):
        MicroCLIPTrainer(model=make_model(), args=args, train_dataset=DatasetDict(train=images))


def test_labelled_batches_without_views_never_train(make_model, tmp_path):
    def collate(examples):
        return {"pixel_values": torch.zeros(len(examples), 3, 32, 32), "labels": torch.zeros(len(examples)).long()}

    trainer = MicroCLIPTrainer(
        model=make_model(), args=arguments(tmp_path), train_dataset=list(range(6)), data_collator=collate
    )
    with pytest.raises(ValueError, match="A training batch holds 'pixel_values', 'labels'; expected the views"):
        trainer.train()


def test_half_precision_weights_are_adapted_in_float32(make_model, images, tmp_path):
    model = make_model(dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    adapt(model, tmp_path, images, learning_rate=1e-4)
    weight = model.clip.vision_model.post_layernorm.weight
    assert weight.dtype == torch.float32 and (weight != 1).any()


def test_heads_without_texts_are_warned_about(clip_folder, tmp_path):
    model = MicroCLIPForImageClassification.from_pretrained(clip_folder, num_labels=3)
    with pytest.warns(UserWarning, match=r"Use from_clip\(clip, class_names\)"):
        MicroCLIPTrainer(model=model, args=arguments(tmp_path))


def test_strange_labels_are_left_out(make_model, images, tmp_path):
    for values in (["rose"] * 12, [-1] * 12, [None] * 12):
        dataset = images.remove_columns("label").add_column("label", values)
        trainer = adapt(make_model(), tmp_path, dataset, num_train_epochs=1)
        assert not any("pseudo_label_accuracy" in entry for entry in trainer.state.log_history)


@pytest.mark.numerical
def test_evaluation_of_partly_labelled_images(make_model, images, tmp_path):
    """Images without a label, or with a negative one, don't count; without any label there are no metrics."""
    trainer = MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path))
    labels = [label if index % 5 else -1 for index, label in enumerate(images["label"])]
    partly = images.remove_columns("label").add_column("label", labels)
    predicted = trainer.predict(images.remove_columns("label")).predictions.argmax(-1)
    expected = np.mean([guess == label for guess, label in zip(predicted, labels, strict=True) if label >= 0])
    assert trainer.evaluate(partly)["eval_accuracy"] == pytest.approx(expected)
    hidden = images.remove_columns("label").add_column("label", [-1] * 12)
    assert "eval_accuracy" not in trainer.evaluate(hidden)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_other_schedules(make_model, images, tmp_path, schedule):
    adapt(make_model(), tmp_path, images, lr_scheduler_type=schedule, num_train_epochs=1)


def test_batches_of_views_from_a_collator_of_ones_own(make_model, images, tmp_path):
    """The items may then be anything; the same batches give the same run."""
    usual = adapt(make_model(), tmp_path, images, num_train_epochs=1)
    model = make_model()
    trainer = MicroCLIPTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=range(len(images)),
        data_collator=lambda indices: usual.data_collator([usual.train_dataset[i] for i in indices]),
    )
    trainer.train()
    assert all(value.equal(model.state_dict()[name]) for name, value in usual.model.state_dict().items())


class CountedStream(torch.utils.data.IterableDataset):
    """Numbers of images, as many as it says."""

    def __init__(self, num_images):
        self.num_images = num_images

    def __len__(self):
        return self.num_images

    def __iter__(self):
        return iter(range(self.num_images))


def test_a_stream_that_says_its_length_has_epochs(make_model, images, tmp_path):
    """Its items become batches by a collator of one's own."""
    usual = MicroCLIPTrainer(model=make_model(), args=arguments(tmp_path), train_dataset=images)
    trainer = MicroCLIPTrainer(
        model=make_model(),
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=CountedStream(len(images)),
        data_collator=lambda indices: usual.data_collator([usual.train_dataset[i] for i in indices]),
    )
    trainer.train()
    assert trainer.state.global_step == 3


class FirstClass(MicroCLIPTrainer):
    """Labels by a rule of its own."""

    def refine_pseudo_labels(self, inputs):
        return torch.zeros(len(inputs["weak"]), dtype=torch.long)


def test_labels_by_other_rules_are_recorded(make_model, images, tmp_path):
    trainer = FirstClass(model=make_model(), args=arguments(tmp_path), train_dataset=images)
    trainer.train()
    assert trainer.diagnostics.pseudo_labels.tolist() == [0] * len(images)
    assert trainer.diagnostics.confidences.isnan().all()
    logged = [entry["effective_classes"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([1.0] * len(logged))


EACH_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_crops": -1}, "num_crops is -1"),
        ({"crop_ratio": [0.9, 0.5]}, "two ascending numbers"),
        ({"crop_ratio": [0.0, 0.5]}, "two ascending numbers"),
        ({"prior_ratio": 2.0}, "prior_ratio is 2.0; it must lie in"),
        ({"label_fusion_ratio": -0.1}, "label_fusion_ratio is -0.1; it must lie in"),
        ({"fairness_weight": -1.0}, "fairness_weight is -1.0; it must be 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must be 0 or more, and finite"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be 0 or more, and finite"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be more than 0"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size is -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"save_steps": 0, "save_strategy": "steps"}, "save_steps is 0"),
        ({"remove_unused_columns": True}, "must be False"),
        ({"load_best_model_at_end": True, **EACH_EPOCH}, "labels only measure"),
        ({"save_strategy": "best", "metric_for_best_model": "accuracy"}, "labels only measure"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", **EACH_EPOCH}, "labels only measure"),
        ({"lr_scheduler_type": "greedy", **EACH_EPOCH}, "labels only measure"),
        ({"metric_for_best_model": "accuracy"}, "labels only measure"),
        ({"bf16_full_eval": True}, "cast the weights"),
        ({"fp16": True}, "a CPU trains in bf16 or float32 only. Set bf16, or leave out fp16"),
        ({"max_corrupt_share": 1.5}, "max_corrupt_share is 1.5"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, 'only "end" pushes'),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **kwargs)


def test_defaults_are_the_published_ones(tmp_path):
    args, config = MicroCLIPTrainingArguments(str(tmp_path)), MicroCLIPConfig()
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.learning_rate) == (64, 15, 1e-4)
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps, args.dataloader_drop_last) == (0.1, 0, 0, False)
    assert (args.num_crops, args.crop_ratio, args.prior_ratio, args.fairness_weight) == (8, [0.5, 0.9], 0.5, 1)
    assert args.label_fusion_ratio == 0.5
    assert (config.fusion_ratio, config.saliency_threshold, config.logit_scale) == (0.5, 0.2, None)
    assert (config.saliency_affinity, config.saliency_cut, config.fg_query) == ("dot", "std", "saliency")


def test_one_process_uses_one_gpu(tmp_path):
    """transformers would split batches among all, within the process; a CPU stands in."""
    args = MicroCLIPTrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.warns(UserWarning, match="Of the 2 GPUs here one is used.*accelerate launch"):
        args._use_one_gpu()
    assert args.n_gpu == 1 and args.train_batch_size == 64
