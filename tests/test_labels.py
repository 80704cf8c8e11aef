"""Labels of every kind of column, through every entry: measured by name, or by number, and never adapted to."""

import datetime
import io
import json
import tarfile
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adaptation import CLASS_NAMES, adapt, draw_images
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, load_dataset
from decisions import ClearDecisions, assert_clear_answers
from packaging.version import Version
from tolerances import LOSS, assert_clear
from torch.testing import assert_close

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.commands import adapt as adapt_command
from microclip_hf.commands import evaluate as evaluate_command
from microclip_hf.data.labels import align_labels
from microclip_hf.data.sources import load_images
from microclip_hf.presets import load_preset, load_split


# Of six images: two of each class, the last without a label.
NUMBERS = [0, 1, 2, 0, 1, None]
NAMES = ["Red_Disc", "green-square", "blue bar", "red disc", "GREEN SQUARE", None]
IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
USABLE = {
    "string": pa.array(NAMES, pa.string()),
    "large_string": pa.array(NAMES, pa.large_string()),
    "string_view": pa.array(NAMES, pa.string_view()),
    "dictionary": pa.array(NAMES).dictionary_encode(),
    "large dictionary": pa.array(NAMES, pa.large_string()).dictionary_encode(),
    "blank": pa.array([*NAMES[:5], " "]),
    "digits": pa.array(["0", "1", "2", "0", "1", "-1"]),
    "int": pa.array(NUMBERS, pa.int8()),
    "uint": pa.array(NUMBERS, pa.uint64()),
    "float": pa.array([0.0, 1.0, 2.0, 0.0, 1.0, float("nan")], pa.float32()),
    "hidden": pa.array([0, 1, 2, 0, 1, -1]),
}
if Version(datasets.__version__) < Version("4.2"):
    del USABLE["string_view"]  # which the oldest versions don't know
UNUSABLE = {
    "list": pa.array([[0], [1], [2], [0, 1], [1], None]),
    "date": pa.array([datetime.date(2025, 1, 1)] * 6),
    "bytes": pa.array([b"red disc"] * 6),
    "fraction": pa.array([0.5] * 6),
    "infinite": pa.array([float("inf")] * 6),
    "too high": pa.array([0, 1, 3, 0, 1, 2]),
    "far too high": pa.array([2**64 - 1] * 6, pa.uint64()),
    "other names": pa.array(["red disc"] * 5 + ["star"]),
    "high digits": pa.array(["1", "2", "3"] * 2),
    "bool": pa.array([True, False] * 3),
    "struct": pa.array([{"name": "red disc", "number": 0}] * 6),
}


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def rows():
    return [{"bytes": png(image), "path": f"{index}.png"} for index, image in enumerate(draw_images(6)["image"])]


def write(path, labels, name="label"):
    """A Parquet file as other programs than `datasets` write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(rows(), IMAGES), name: labels}), path)
    return str(path)


def known(dataset):
    return [label if label is not None and label >= 0 else None for label in (row["label"] for row in dataset)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make_trainer(clip_folder, tmp_path):
    def make(class_names=CLASS_NAMES, **options):
        model = MicroCLIPForImageClassification.from_clip(clip_folder, class_names, prior_weighting="uniform")
        args = MicroCLIPTrainingArguments(
            str(tmp_path / "trainer"), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4, max_steps=1
        )
        return MicroCLIPTrainer(model=model, args=args, **options)

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", USABLE)
def test_labels_of_a_table(kind, streaming, tmp_path):
    path = write(tmp_path / "table.parquet", USABLE[kind])
    with warnings.catch_warnings(action="error", category=UserWarning):
        dataset = load_images(path, CLASS_NAMES, streaming=streaming)
    assert known(dataset) == NUMBERS
    reverse = load_images(path, CLASS_NAMES[::-1], streaming=streaming, labels_required=True)
    by_name = USABLE[kind].type not in (pa.int8(), pa.uint64(), pa.int64(), pa.float32()) and kind != "digits"
    assert known(reverse) == ([None if number is None else 2 - number for number in NUMBERS] if by_name else NUMBERS)


def test_columns_without_any_label(tmp_path):
    for labels in (pa.nulls(6), pa.array([None] * 6, pa.string()), pa.array([-1] * 6)):
        path = write(tmp_path / "table.parquet", labels)
        assert known(load_images(path, CLASS_NAMES)) == [None] * 6
        with pytest.raises(ValueError, match=r"None of the 6 images of .*table.parquet has a label"):
            load_images(path, CLASS_NAMES, labels_required=True)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_labels_that_are_none(kind, tmp_path):
    """Left out with a warning where nobody asked for them; an error where somebody did."""
    path = write(tmp_path / "table.parquet", UNUSABLE[kind])
    with pytest.warns(UserWarning, match="labels of .*table.parquet are left out, and nothing is measured by them"):
        assert load_images(path, CLASS_NAMES).column_names == ["image"]
    for options in ({"label_column": "label"}, {"labels_required": True}):
        with pytest.raises(ValueError, match="abel"):
            load_images(path, CLASS_NAMES, **options)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_labels_of_a_stream_that_are_none(kind, tmp_path):
    """A stream is judged as it is read: in adaptation a label that is no class never ends it."""
    path = write(tmp_path / "table.parquet", UNUSABLE[kind])
    with pytest.warns(UserWarning, match="left out|counts as missing"):
        found = list(load_images(path, CLASS_NAMES, streaming=True))
    assert len(found) == 6
    classes = {"too high": [0, 1, None, 0, 1, 2], "other names": [0] * 5 + [None], "high digits": [1, 2, None] * 2}
    assert [row.get("label") for row in found] == classes.get(kind, [None] * 6)
    with pytest.raises(ValueError, match="abel"):
        list(load_images(path, CLASS_NAMES, streaming=True, labels_required=True))


def test_a_column_that_is_asked_for(tmp_path):
    path = write(tmp_path / "table.parquet", USABLE["string"], "species")
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert load_images(path, CLASS_NAMES).column_names == ["image"]
    assert known(load_images(path, CLASS_NAMES, label_column="species")) == NUMBERS
    for options in ({"label_column": "kind"}, {"label_column": "species.name"}, {"labels_required": True}):
        for streaming in (False, True):
            with pytest.raises(
                ValueError, match=r"has the columns 'image', 'species'; .* which one with label_column"
            ):
                load_images(path, CLASS_NAMES, streaming=streaming, **options)


def test_a_folder_has_no_columns(inputs):
    """An option for a table beside it doesn't make its labels required."""
    assert load_images(str(inputs / "photos"), CLASS_NAMES, label_column="species").column_names == ["image"]
    with pytest.warns(UserWarning, match="labels of .*test are left out"):
        dataset = load_images(str(inputs / "test"), ["star", "moon"], label_column="species")
    assert dataset.column_names == ["image"]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_webdataset_files(tmp_path, streaming):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for index, row in enumerate(rows()):
            details = json.dumps({"label": NAMES[index], "width": 64}).encode()
            label = str(-1 if NUMBERS[index] is None else NUMBERS[index]).encode()
            contents = {"png": row["bytes"], "cls": label, "txt": (NAMES[index] or "").encode(), "json": details}
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{index}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for column in ("cls", "txt", "json.label"):
        dataset = load_images(str(tmp_path), CLASS_NAMES, label_column=column, streaming=streaming)
        assert known(dataset) == NUMBERS
    with pytest.raises(ValueError, match=r"or a field of them: 'json.label', 'json.width'"):
        load_images(str(tmp_path), CLASS_NAMES, label_column="json", streaming=streaming)


def test_saved_data_sets_and_repositories(tmp_path):
    images = load_dataset("parquet", data_files=write(tmp_path / "t.parquet", USABLE["large_string"]), split="train")
    images.save_to_disk(tmp_path / "saved")
    (tmp_path / "repo").mkdir()
    (tmp_path / "t.parquet").rename(tmp_path / "repo" / "train.parquet")
    for source, hub in (("saved", False), ("repo", True)):
        for streaming in (False, True):
            dataset = load_images(str(tmp_path / source), CLASS_NAMES, hub=hub, streaming=streaming)
            assert known(dataset) == NUMBERS


def test_class_names_that_are_digits():
    dataset = Dataset.from_dict({"label": ["7", "9", "8"], "row": range(3)})
    assert align_labels(dataset, ["9", "8", "7"])["label"][:] == [2, 0, 1]
    assert [row["label"] for row in align_labels(dataset.to_iterable_dataset(), ["9", "8", "7"])] == [2, 0, 1]
    numbered = Dataset.from_dict({"label": [2, 0, -1], "row": range(3)})
    numbered = numbered.cast_column("label", ClassLabel(num_classes=3))
    assert align_labels(numbered, CLASS_NAMES)["label"][:] == [2, 0, None]
    years = numbered.select(range(1)).cast_column("label", ClassLabel(names=["1", "2", "4"]))
    with pytest.raises(ValueError, match="labels '1', '2', '4' are none of the 3 classes"):
        align_labels(years, CLASS_NAMES)


def test_classes_that_are_true_and_false():
    dataset = Dataset.from_dict({"label": [True, None, False], "row": range(3)})
    assert align_labels(dataset, ["true", "false"])["label"][:] == [0, None, 1]


def test_formats_and_transforms_dont_matter():
    named = draw_images(3).cast_column("label", ClassLabel(names=CLASS_NAMES[::-1]))
    for dataset in (named.with_format("torch"), named.with_transform(lambda batch: {"image": batch["image"]})):
        assert align_labels(dataset, CLASS_NAMES).with_format(None)["label"][:] == [2, 1, 0]


def kinds_of_data_sets():
    """The same twelve images with labels of other kinds, and their numbers in the order of `CLASS_NAMES`."""
    images = draw_images(12)
    bare, numbers = images.remove_columns("label"), images["label"][:]
    names = [CLASS_NAMES[number] for number in numbers]
    order = ClassLabel(names=sorted(CLASS_NAMES))
    return {
        "numbers": images,
        "names": bare.add_column("label", names),
        "other order": bare.add_column("label", [order.str2int(name) for name in names]).cast_column("label", order),
        "floats": bare.add_column("label", [float(number) for number in numbers]),
        "lists": bare.add_column("label", [[number] for number in numbers]),
        "none": bare.add_column("label", [None] * 12),
        "absent": bare,
    }


@pytest.mark.parametrize("is_stream", [False, True])
def test_no_kind_of_labels_influences_adaptation(clip_folder, tmp_path, is_stream):
    weights = {}
    for kind, dataset in kinds_of_data_sets().items():
        dataset = dataset.to_iterable_dataset() if is_stream else dataset
        with warnings.catch_warnings(record=True, action="always") as caught:
            trainer = adapt(clip_folder, tmp_path / kind, dataset, max_steps=2)
        weights[kind] = trainer.model.state_dict()
        told = [warning for warning in caught if "labels of train_dataset are left out" in str(warning.message)]
        assert len(told) == (kind == "lists"), kind
        measured = any("pseudo_label_accuracy" in entry for entry in trainer.state.log_history)
        assert measured == (kind not in ("lists", "none", "absent")), kind
    for kind, other in weights.items():
        assert all(value.equal(other[name]) for name, value in weights["numbers"].items()), kind


@pytest.mark.numerical
def test_evaluation_by_any_kind_of_labels(make_trainer):
    kinds = kinds_of_data_sets()
    trainer = make_trainer()
    expected = trainer.evaluate(kinds["numbers"])
    for kind in ("names", "other order", "floats"):
        for dataset in (kinds[kind], kinds[kind].to_iterable_dataset()):
            found = trainer.evaluate(dataset)
            assert found["eval_accuracy"] == expected["eval_accuracy"], kind
            assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=LOSS)
    assert "eval_accuracy" not in trainer.evaluate(kinds["none"])
    with pytest.raises(ValueError, match=r"The labels are List\(.*expected names or numbers of classes"):
        trainer.evaluate(kinds["lists"])
    unknown = kinds["absent"].add_column("label", ["star"] * 12)
    with pytest.raises(ValueError, match="label 'star' of an image is none of the 3 classes"):
        trainer.evaluate(unknown.to_iterable_dataset())
    with pytest.raises(ValueError, match="labels 'star' are none of the 3 classes"):
        make_trainer(eval_dataset=unknown)


def test_a_stream_that_doesnt_say_what_it_holds(clip_folder, tmp_path):
    """Its labels are judged one by one."""
    images = draw_images(12)

    def examples():
        for index, row in enumerate(images):
            label = [CLASS_NAMES[row["label"]], row["label"], None, [1]][index % 4]
            yield {"image": row["image"], "label": label}

    stream = align_labels(IterableDataset.from_generator(lambda: iter(())), CLASS_NAMES)
    assert list(stream) == []
    mixed = IterableDataset.from_generator(examples)
    with pytest.warns(UserWarning, match=r"label \[1\] of an image .* counts as missing"):
        found = list(align_labels(mixed, CLASS_NAMES, strict=False))
    assert [row["label"] for row in found] == [0, 1, None, None, 1, 2, None, None, 2, 0, None, None]
    with pytest.warns(UserWarning, match="counts as missing"):
        trainer = adapt(clip_folder, tmp_path, mixed, max_steps=2)
    assert trainer.state.global_step == 2


@pytest.mark.numerical
def test_the_loss_of_partly_labelled_images(make_trainer):
    """It is the mean over those with a label, however they fall into batches; it was NaN for a batch without any."""
    images = draw_images(12)
    labels = [None] * 5 + images["label"][5:]
    partly = images.remove_columns("label").add_column("label", labels)
    trainer = make_trainer()
    with ClearDecisions():
        assert_clear(trainer.predict(images).predictions)
    expected = trainer.evaluate(images.select(range(5, 12)))
    found = trainer.evaluate(partly)
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=LOSS)
    assert "eval_loss" not in trainer.evaluate(partly.select(range(5)))


def flags(inputs, output, **options):
    options = {
        "model_name_or_path": inputs / "clip",
        "class_names": inputs / "names.txt",
        "output_dir": output,
        "max_steps": 1,
        "num_crops": 1,
        "use_cpu": True,
        "report": False,
        "disable_tqdm": True,
        "config_overrides": '{"prior_weighting": "uniform"}',
        **options,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_commands(inputs, tmp_path, capsys):
    table = write(tmp_path / "shards" / "0.parquet", USABLE["large_string"], "species")
    options = {"train_dir": tmp_path / "shards", "label_column": "species"}
    adapt_command.main(flags(inputs, tmp_path / "out", streaming=True, test_dir=table, **options))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert_clear_answers(tmp_path / "out", draw_images(6)["image"])
    command = ["--model_name_or_path", str(tmp_path / "out"), "--test_dir", table, "--label_column", "species"]
    evaluate_command.main([*command, "--num_crops", "0", "--output_dir", str(tmp_path / "results")])
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    assert report["ways"]["fused"]["accuracy"] == pytest.approx(results["adapted_accuracy"])
    assert report["num_images"] == 5 and report["num_unlabelled"] == 1
    options["label_column"] = "kind"
    with pytest.raises(SystemExit, match="has the columns 'image', 'species'"):
        adapt_command.main(flags(inputs, tmp_path / "other", **options))
    with pytest.raises(SystemExit, match="has the columns 'image', 'species'"):
        evaluate_command.main([*command[:-1], "kind", "--output_dir", str(tmp_path / "other")])


def test_a_preset_with_class_names_of_ones_own(tmp_path):
    """Labels of one's own table are no part of the preset, and none is required to adapt."""
    preset = load_preset("eurosat").override(class_names=CLASS_NAMES)
    other = write(tmp_path / "other.parquet", UNUSABLE["other names"], preset.label_column)
    with pytest.warns(UserWarning, match="labels of .*other.parquet are left out"):
        dataset = load_split(preset, "train", other, labels_required=False)
    assert dataset.column_names == ["image"]
    with pytest.raises(ValueError, match="labels 'star' are none"):
        load_split(preset, "train", other)
    named = write(tmp_path / "named.parquet", USABLE["large_string"], preset.label_column)
    assert known(load_split(preset, "train", named)) == NUMBERS


def test_images_keep_their_labels(tmp_path):
    """Whatever is done to the column of labels, each stays with its image."""
    path = write(tmp_path / "table.parquet", USABLE["dictionary"])
    expected = [png(image) for image in draw_images(6)["image"]]
    dataset = load_images(path, CLASS_NAMES)
    assert isinstance(dataset.features["image"], Image) and dataset.features["label"] != Value("string")
    assert [png(row["image"]) for row in dataset] == expected
    assert_close([row["label"] for row in dataset.select(range(5))], NUMBERS[:5])
