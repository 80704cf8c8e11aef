"""What the Trainer evaluates on: images as they are stored, and those that can't be read left out."""

import csv
import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny_inputs
from adaptation import CLASS_NAMES, adapt
from datasets import Dataset, Features, Image, Value, load_dataset
from decisions import ClearDecisions
from tolerances import LOSS, assert_clear, within
from torch.testing import assert_close

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.commands import adapt as adapt_command
from microclip_hf.data.sources import load_images
from microclip_hf.training.view_datasets import first_example


@pytest.fixture(scope="module")
def model(inputs):
    return MicroCLIPForImageClassification.from_clip(inputs / "clip", CLASS_NAMES, prior_weighting="uniform")


@pytest.fixture(scope="module")
def images(inputs):
    return load_images(str(inputs / "test"), CLASS_NAMES, labels_required=True)


@pytest.fixture
def files(images):
    return [row["path"] for row in images.cast_column("image", Image(decode=False))["image"]]


@pytest.fixture
def make_trainer(model, tmp_path):
    args = MicroCLIPTrainingArguments(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True)
    args.per_device_eval_batch_size = 5
    return lambda **options: MicroCLIPTrainer(model=model, args=args, **options)


@pytest.fixture
def damaged(images, files, tmp_path):
    """Fifteen images: one cut short, one of text, one missing, among the twelve."""
    content = Path(files[0]).read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("<html>404</html>")
    paths = [str(tmp_path / "short.png"), *files[:6], str(tmp_path / "text.png"), None, *files[6:]]
    labels = [0, *images["label"][:6], 1, 2, *images["label"][6:]]
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)


def stored_in_other_ways(images, files):
    """The same images: decoded, undecoded, as bytes, as paths, in a stream."""
    contents = [Path(file).read_bytes() for file in files]
    labels = images["label"][:]
    return {
        "undecoded": images.cast_column("image", Image(decode=False)),
        "bytes": Dataset.from_dict({"image": contents, "label": labels}),
        "paths": Dataset.from_dict({"image": files, "label": labels}),
        "both": Dataset.from_dict(
            {"image": [{"bytes": content, "path": None} for content in contents], "label": labels}
        ),
        "stream": images.to_iterable_dataset(),
        "stream of paths": Dataset.from_dict({"image": files, "label": labels}).to_iterable_dataset(),
        "list": [{"image": row["image"], "label": row["label"]} for row in images],
        "undecoded list": [
            {"image": {"bytes": content, "path": None}, "label": label}
            for content, label in zip(contents, labels, strict=True)
        ],
    }


def test_images_may_be_stored_in_any_way(make_trainer, images, files):
    trainer = make_trainer()
    expected, metrics = trainer.predict(images), trainer.evaluate(images)
    for name, dataset in stored_in_other_ways(images, files).items():
        found = trainer.predict(dataset)
        assert_close(found.predictions, expected.predictions, rtol=0, atol=0, msg=name)
        assert found.label_ids.tolist() == expected.label_ids.tolist() == images["label"][:]
        assert trainer.evaluate(dataset)["eval_accuracy"] == metrics["eval_accuracy"]
    with pytest.raises(ValueError, match="'image' to evaluate on is a str; pass a PIL image"):
        trainer.evaluate([{"image": files[0], "label": 0}])


def test_training_images_may_be_stored_in_any_way(clip_folder, tmp_path, images, files):
    weights = []
    for name in ("undecoded", "bytes", "paths", "both"):
        dataset = stored_in_other_ways(images, files)[name]
        weights.append(adapt(clip_folder, tmp_path, dataset, max_steps=1).model.state_dict())
    for other in weights[1:]:
        assert all(value.equal(other[name]) for name, value in weights[0].items())


def predict_clearly(trainer, images):
    """Answers that hang on no rounding."""
    with ClearDecisions():
        found = trainer.predict(images)
    assert_clear(found.predictions)
    return found


@pytest.mark.numerical
def test_images_that_cannot_be_read_are_left_out(make_trainer, images, damaged):
    """The others may come in other batches."""
    trainer = make_trainer()
    expected, metrics = predict_clearly(trainer, images), trainer.evaluate(images)
    message = r"3 of 15 images can't be read \(.*short.png, .*text.png, image 8\) and are left out"
    for dataset in (damaged, damaged.cast_column("image", Image(decode=False))):
        with pytest.warns(UserWarning, match=message):
            found = trainer.predict(dataset)
        assert_close(found.predictions, expected.predictions, **within(tiny_inputs.LOGIT_SCALE))
        assert found.label_ids.tolist() == images["label"][:]
        with warnings.catch_warnings(action="error"):  # what was found is remembered
            measured = trainer.evaluate(dataset)
        assert measured["eval_accuracy"] == metrics["eval_accuracy"]
        assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=LOSS)
    with warnings.catch_warnings(action="error"):  # nothing is read yet
        constructed = make_trainer(eval_dataset={"test": damaged})
    with pytest.warns(UserWarning, match=message):
        assert constructed.evaluate()["eval_test_accuracy"] == metrics["eval_accuracy"]
    with pytest.warns(UserWarning, match="image can't be read and is left out"):
        found = constructed.predict(damaged.to_iterable_dataset())
    assert_close(found.predictions, expected.predictions, **within(tiny_inputs.LOGIT_SCALE))
    with pytest.raises(ValueError, match=r"1 of 1 images can't be read .*, so nothing can be measured"):
        constructed.evaluate(damaged.select([7]))


@pytest.mark.numerical
def test_a_transform_of_ones_own_stays(make_trainer, model, images, files):
    def transform(batch):
        pictures = [image.convert("RGB") for image in batch["image"]]
        return {**model.image_processor(pictures, return_tensors="np"), "label": batch["label"]}

    expected = make_trainer().predict(images)
    found = make_trainer().predict(images.with_transform(transform))
    assert_close(found.predictions, expected.predictions, **within(tiny_inputs.LOGIT_SCALE))
    assert found.label_ids.tolist() == images["label"][:]


def test_missing_images_at_the_start_of_training_data(images, files):
    features = Features({"image": Image()})
    late = Dataset.from_dict({"image": [None, None, files[0]]}, features=features)
    assert first_example(late)["image"].size == images[0]["image"].size
    assert first_example(late.to_iterable_dataset())["image"].size == images[0]["image"].size
    with pytest.raises(ValueError, match="None of the first 2 images can be read"):
        first_example(late.select([0, 1]))
    with pytest.raises(ValueError, match="is empty, or holds no images"):
        first_example(late.select([0, 1]).to_iterable_dataset())


def test_adapt_with_an_unreadable_test_image(inputs, tmp_path):
    """It is told; results, and the labels of the test images, are those of the readable ones."""
    shutil.copytree(inputs / "test", tmp_path / "test")
    (tmp_path / "test" / "green square" / "!.jpg").write_bytes(b"<html>404</html>")
    results = {}
    for name, test in (("whole", inputs / "test"), ("damaged", tmp_path / "test")):
        options = {
            "model_name_or_path": inputs / "clip",
            "train_dir": inputs / "photos",
            "test_dir": test,
            "class_names": inputs / "names.txt",
            "output_dir": tmp_path / name,
            "max_steps": 1,
            "num_crops": 1,
            "use_cpu": True,
            "config_overrides": json.dumps({"prior_weighting": "uniform"}),
        }
        with warnings.catch_warnings(record=True, action="always") as caught:
            adapt_command.main([text for option, value in options.items() for text in (f"--{option}", str(value))])
        told = [str(warning.message) for warning in caught if "are left out" in str(warning.message)]
        assert [text.split("(")[0] for text in told] == ["1 of 13 images can't be read "] * (name == "damaged")
        results[name] = json.loads((tmp_path / name / "all_results.json").read_text())
    for metric in ("zero_shot_accuracy", "adapted_accuracy", "adapted_mean_class_accuracy"):
        assert results["damaged"][metric] == results["whole"][metric]
    texts = [(tmp_path / name / "report" / "test_labels.csv").read_text() for name in ("whole", "damaged")]
    tables = [list(csv.reader(text.splitlines())) for text in texts]
    for whole, damaged in zip(*tables, strict=True):
        assert whole[0].split("/")[-2:] == damaged[0].split("/")[-2:] and whole[1:] == damaged[1:]
    assert len(tables[0]) == 13 and {row[-1] for row in tables[1][1:]} == set(tiny_inputs.DESCRIPTIONS)


@pytest.mark.numerical
def test_imagefolder_of_the_library(make_trainer, inputs, images):
    """Its classes are in the order of the alphabet."""
    dataset = load_dataset("imagefolder", data_dir=str(inputs / "test"), split="train")
    found, expected = make_trainer().predict(dataset), predict_clearly(make_trainer(), images)
    assert sorted(found.label_ids) == sorted(expected.label_ids)
    assert found.metrics["test_accuracy"] == pytest.approx(expected.metrics["test_accuracy"])
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=LOSS)
