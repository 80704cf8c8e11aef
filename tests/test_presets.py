"""Every preset on a stand-in of its data set: the same columns, splits and form of class names, with a few pixels."""

import json
import re
from pathlib import Path

import pytest
import tiny_inputs
from datasets import ClassLabel, Dataset, Features, Image, Value
from decisions import ClearDecisions
from PIL import Image as PilImage
from tolerances import assert_clear

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt, evaluate
from microclip_hf.data import tables
from microclip_hf.data.sources import load_images
from microclip_hf.presets import list_presets, load_preset, load_split, readable_name


ROOT = Path(__file__).parents[1]
# What class names look like in the data sets that spell them in their own way.
FORMS = {
    "cub": ("{:03}.Red_{}", "Red {}"),
    "imagenet": ("red {}, Rubrum {}", "red {}"),
    "ucf101": ("ApplyRed{}", "Apply Red {}"),
    "aid": ("Red{}", "Red {}"),
    "pets": ("red_{}", "red {}"),
}


def letters(index):
    """A word of its own for each number: "Aaa", "Baa", ..., "Aba", ..."""
    return "".join(chr(97 + index // 26**place % 26) for place in range(3)).title()


def class_names(preset):
    """Invented names in the form of the data set's own, and the ones that the preset renames, last."""
    form, readable = FORMS.get(preset.name, ("red {}", "red {}"))
    count = preset.num_classes - len(preset.rename)
    words = [letters(index) for index in range(count)]
    if "{:03}" in form:
        names = [form.format(index + 1, word) for index, word in enumerate(words)]
    else:
        names = [form.replace("{}", word) for word in words]
    expected = [readable.replace("{}", word) for word in words]
    return [*names, *preset.rename], [*expected, *preset.rename.values()]


def write_repo(folder, columns, names, splits, labels=(1, 0, -1)):
    """A repository of Parquet files, one image a label (-1: the last class)."""
    image, label = columns
    features = Features({image: Image(), label: ClassLabel(names=names), "image_id": Value("string")})
    labels = [number % len(names) for number in labels]
    images = [PilImage.new("RGB", (4, 3), (number % 256, 0, 0)) for number in labels]
    dataset = Dataset.from_dict({image: images, label: labels, "image_id": ["x"] * len(labels)}, features=features)
    (folder / "data").mkdir(parents=True)
    for split in filter(None, splits):
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def stand_in(preset, folder, names=None, **changes):
    columns = (preset.image_column, preset.label_column)
    changes = {"columns": columns, "splits": (preset.train_split, preset.test_split), **changes}
    return write_repo(folder, names=names or class_names(preset)[0], **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_loads_its_schema_and_refuses_another(name, tmp_path):
    preset = load_preset(name)
    here = preset.override(dataset=stand_in(preset, tmp_path / "copy"))
    for split, own in (("train", preset.train_split), ("test", preset.test_split)):
        if own is None:
            with pytest.raises(ValueError, match=rf"has no split to {split} with; pass your own images \(`source`"):
                load_split(here, split)
            continue
        dataset = load_split(here, split)
        assert dataset.column_names == ["image", "label"] and dataset["label"] == [1, 0, preset.num_classes - 1]
        assert dataset.features["label"].names == class_names(preset)[1]
        assert dataset[0]["image"].size == (4, 3) and dataset[0]["image"].getpixel((0, 0))[0] == 1
    wrong = preset.override(dataset=stand_in(preset, tmp_path / "wrong", names=["a", "b"]))
    difference = rf"isn't the data set of the preset '{name}': it has 2 classes \('a', 'b'\), not {preset.num_classes}"
    with pytest.raises(ValueError, match=difference):
        load_split(wrong, "train")


def test_what_differs_is_named_with_what_is_there(tmp_path):
    preset = load_preset("cifar100")
    names = class_names(preset)[0]

    def refused(folder, split="train", **changes):
        with pytest.raises(ValueError) as caught:
            load_split(preset.override(dataset=stand_in(preset, tmp_path / folder, **changes)), split)
        return str(caught.value)

    error = refused("columns", columns=("image", "label"))
    assert "expects images in 'img', labels in 'fine_label'" in error
    assert "has the columns 'image', 'label', 'image_id'" in error
    error = refused("label", columns=("img", "label"))
    assert "'fine_label'" in error and "has the columns 'img', 'label', 'image_id'" in error
    error = refused("splits", "test", splits=("train", "validation"))
    assert "the split 'test'" in error and "['train', 'validation']" in error
    error = refused("renamed", names=[*names[:-1], "carb"])
    assert "it lacks the classes 'cra' (it has 'red Aaa'," in error
    assert "100 classes" not in error
    renamed = preset.override(dataset=stand_in(preset, tmp_path / "fixed", names=[*names[:-1], "crab"]))
    assert load_split(renamed, "train").features["label"].names[-1] == "crab"
    (tmp_path / "numbers").mkdir()
    images = Features({"img": Image(), "fine_label": Value("int64")})
    photo = PilImage.new("RGB", (4, 3))
    for column, features, message in (
        (["photo"], None, r"The column 'img' of .*numbers holds Value\('string'\), not images"),
        ([photo], images, "its column 'fine_label' holds Value.*, without the names of classes"),
    ):
        Dataset.from_dict({"img": column, "fine_label": [3]}, features=features).to_parquet(
            tmp_path / "numbers" / "train.parquet"
        )
        with pytest.raises(ValueError, match=message):
            load_split(preset.override(dataset=str(tmp_path / "numbers")), "train")
    with pytest.raises(ValueError, match="split is 'validation'; expected one of train, test"):
        load_split(preset, "validation")
    with pytest.raises(ValueError, match="preset 'kinetics400' names no data set on the Hub; pass your own"):
        load_split(load_preset("kinetics400"), "train")


def test_the_hub_is_asked_for_the_presets_commit_and_a_copy_is_not(tmp_path, monkeypatch):
    preset, asked = load_preset("dtd"), []
    copy = stand_in(preset, tmp_path / "copy")
    load_dataset = tables.load_dataset

    def record(source, config, revision, **options):
        asked.append((source, config, revision, options["split"]))
        return load_dataset(copy, **options)

    monkeypatch.setattr(tables, "load_dataset", record)
    load_split(preset, "test")
    load_split(preset.override(dataset="me/textures"), "train")
    load_split(preset.override(dataset="me/textures", revision="v2", config="large", train_split="test"), "train")
    assert asked == [
        ("tanganke/dtd", None, "d2afa97d9f335b1a6b3b09c637aef667f98f966e", "test"),
        ("me/textures", None, None, "train"),
        ("me/textures", "large", "v2", "test"),
    ]


def test_data_sets_of_numbers_take_names_from_the_preset(tmp_path):
    preset = load_preset("eurosat")
    names = [f"kind {letters(index)}" for index in range(10)]
    images = [PilImage.new("RGB", (4, 3))] * 3
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": images, "label": [4, -1, 0]}, features=features).save_to_disk(tmp_path / "own")
    with pytest.raises(ValueError, match=r"'label' holds Value\('int64'\), without the names of classes"):
        load_split(preset, "train", str(tmp_path / "own"))
    dataset = load_split(preset.override(class_names=names), "train", str(tmp_path / "own"))
    assert dataset["label"] == [4, -1, 0] and dataset.features["label"].names == names


def test_your_own_folder_in_place_of_the_hubs(tmp_path):
    preset = load_preset("aid")
    names, readable = class_names(preset)
    for index, name in enumerate(reversed(names)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        PilImage.new("RGB", (4, 3), (index, 0, 0)).save(tmp_path / "photos" / name / "a.png")
    dataset = load_split(preset, "train", str(tmp_path / "photos"))
    assert dataset.features["label"].names == sorted(readable)
    reds = [example["image"].getpixel((0, 0))[0] for example in dataset]
    assert [dataset.features["label"].names[label] for label in dataset["label"]] == [
        readable[29 - red] for red in reds
    ]
    backwards = load_split(preset.override(class_names=readable[::-1]), "test", str(tmp_path / "photos"))
    assert backwards["label"] == reds
    PilImage.new("RGB", (4, 3)).save(tmp_path / "photos" / "loose.png")
    with pytest.raises(ValueError, match="lie in no sub-folder"):
        load_split(preset, "train", str(tmp_path / "photos"))
    assert load_split(preset, "train", str(tmp_path / "photos"), labels_required=False).column_names == ["image"]


def test_a_stream_has_the_same_names(tmp_path):
    """Its features; a pass over it would end with the pause of `datasets`."""
    preset = load_preset("cub")
    stream = load_split(preset.override(dataset=stand_in(preset, tmp_path / "copy")), "train", streaming=True)
    assert stream.features["label"].names == class_names(preset)[1] and set(stream.features) == {"image", "label"}
    first = next(iter(stream))
    assert first["label"] == 1 and isinstance(first["image"]["bytes"], bytes)


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("104.American_Pipit", "American Pipit"),
        ("american_bulldog", "american bulldog"),
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("Archery", "Archery"),
        ("TaiChi", "Tai Chi"),
        ("tench, Tinca tinca", "tench"),
        ("iPod", "iPod"),
        ("F/A-18", "F/A-18"),
        ("707-320", "707-320"),
        ("MD-11", "MD-11"),
        ("DHC-8-100", "DHC-8-100"),
        ("McLaren MP4-12C Coupe 2012", "McLaren MP4-12C Coupe 2012"),
        ("polka-dotted", "polka-dotted"),
        ("end / de-restriction of 80 kph speed limit", "end / de-restriction of 80 kph speed limit"),
    ],
)
def test_readable_names(name, readable):
    assert readable_name(name) == readable == readable_name(readable)


def test_an_unknown_preset_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"no preset 'CIFAR'; did you mean cifar10, cifar100, cars\?"):
        load_preset("CIFAR")
    with pytest.raises(ValueError, match="no preset 'xyzxyz'; there are aid, aircraft, birdsnap"):
        load_preset("xyzxyz")


def test_twenty_presets_agree_with_the_page():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in page.splitlines() if row[:3] == "| `"]
    assert len(rows) == 20 and sorted(row[0] for row in rows) == list_presets()
    for name, title, dataset, num_classes, train, test, verified in rows:
        preset = load_preset(name)
        assert (title, int(num_classes)) == (preset.title, preset.num_classes)
        assert dataset == (preset.dataset or "none") and verified == ("yes" if preset.verified else "no")
        assert (train, test) == (preset.train_split or "-", preset.test_split or "-")
        assert preset.checked and preset.citation and preset.license
        pinned = re.fullmatch("[0-9a-f]{40}", preset.revision or "")
        assert pinned if preset.verified else preset.revision == (None if preset.dataset is None else "main")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny CLIP, and a stand-in of EuroSAT with pictures of three of its classes."""
    folder = tmp_path_factory.mktemp("run")
    tiny_inputs.write_inputs(folder)
    preset = load_preset("eurosat")
    stand_in(preset, folder / "copy", labels=[0, 1, 2] * 4)
    stand_in(preset, folder / "wrong", names=["a", "b"])
    (folder / "words.json").write_text(json.dumps({"annual_crop_land": ["Rows of plants."]}))
    (folder / "star.json").write_text(json.dumps({"star": ["It shines."]}))
    return folder


def flags(run, output, **options):
    options = {
        "preset": "eurosat",
        "model_name_or_path": run / "clip",
        "dataset_name": run / "copy",
        "output_dir": output,
        "num_train_epochs": 1,
        "num_crops": 1,
        "use_cpu": True,
        "config_overrides": '{"prior_weighting": "uniform"}',
        **options,
    }
    return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]


def evaluate_with_a_preset(run, output, model, **options):
    options = {"model_name_or_path": model, "dataset_name": run / "copy", "output_dir": output, **options}
    options |= {"preset": "eurosat", "num_crops": 0, "device": "cpu"}
    evaluate.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    return json.loads((output / "results.json").read_text())


@pytest.mark.numerical
def test_adapt_and_evaluate_with_a_preset(run, tmp_path, monkeypatch):
    asked = []
    load = MicroCLIPForImageClassification.from_clip
    monkeypatch.setattr(
        MicroCLIPForImageClassification,
        "from_clip",
        lambda *args, **texts: asked.append(texts) or load(*args, **texts),
    )
    with pytest.warns(UserWarning, match="9 of 10 classes have no descriptions"):
        adapt.main(flags(run, tmp_path / "out", descriptions=run / "words.json"))
    names = class_names(load_preset("eurosat"))[1]
    assert names[-1] == "Sea or Lake" and names[2] == "Annual Crop Land"
    assert asked[0]["class_names"] == names and asked[0]["templates"] == ["a centered satellite photo of {}."]
    assert asked[0]["descriptions"] == {"Annual Crop Land": ["Rows of plants."]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(10)] == names
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["adapted_accuracy"] * 12 == pytest.approx(round(results["adapted_accuracy"] * 12))
    predict = evaluate.predict_all_ways

    def predict_clearly(*args, **kwargs):
        with ClearDecisions():
            predictions = predict(*args, **kwargs)
        for logits in predictions.logits.values():
            assert_clear(logits)
        return predictions

    monkeypatch.setattr(evaluate, "predict_all_ways", predict_clearly)
    measured = evaluate_with_a_preset(run, tmp_path / "of_clip", model=run / "clip", descriptions=run / "words.json")
    assert measured["dataset"] == "copy" and measured["class_names"] == names
    for way in ("zero_shot", "cupl"):
        assert measured["ways"][way]["accuracy"] == pytest.approx(results[f"{way}_accuracy"])
    measured = evaluate_with_a_preset(run, tmp_path / "adapted", model=tmp_path / "out")
    assert measured["ways"]["fused"]["accuracy"] == pytest.approx(results["adapted_accuracy"])
    options = adapt.AdaptArguments(model_name_or_path="x", preset="eurosat", templates=["{}!"], image_column="photo")
    preset = options.apply_preset(None)
    assert preset.revision == load_preset("eurosat").revision and preset.image_column == "photo"
    assert options.dataset_name == "timm/eurosat-rgb" and options.templates == ["{}!"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "eurosta"}, r"no preset 'eurosta'; did you mean eurosat\?"),
        ({"preset": None}, "Pass the classes with --class_names, .* or with --preset"),
        ({"dataset_name": "wrong"}, r"it has 2 classes \('a', 'b'\), not 10; it lacks the classes 'AnnualCrop', "),
        ({"dataset_split": "trian"}, r"the split 'trian'. The data set .*\['train', 'test'\]"),
        ({"label_column": "kind"}, "has the columns 'image', 'label', 'image_id'"),
        ({"descriptions": "star.json"}, "'star', which is none of the 10 class names"),
        ({"class_names": "names.txt"}, "; the classes 'red disc', 'green square', 'blue bar' have no label"),
        ({"preset": "kinetics400", "dataset_name": None}, "names no data set on the Hub"),
        ({"train_dir": "photos", "dataset_name": None}, "lie in no sub-folder"),
        ({"train_dir": "photos"}, "either --train_dir or --dataset_name"),
        ({"test_split": "test", "test_dir": "photos"}, "either --test_split or --test_dir"),
        ({"output_dir": "clip"}, "already holds a model"),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(run, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(MicroCLIPForImageClassification, "from_clip", None)
    files = {"dataset_name", "descriptions", "class_names", "train_dir", "output_dir"}
    options = {name: run / value if name in files and value else value for name, value in options.items()}
    with pytest.raises(SystemExit, match=message):
        adapt.main(flags(run, **{"output": tmp_path / "out", **options}))
    assert not (tmp_path / "out").exists()


def test_labels_that_are_no_class_and_classes_without_labels_are_both_named(tmp_path):
    names = [f"kind {letters(index)}" for index in range(8)]
    write_repo(tmp_path / "repo", ("image", "label"), names, ("train",))
    with pytest.raises(ValueError) as caught:
        load_images(str(tmp_path / "repo"), [*names[6:], "star"], hub=True, labels_required=True)
    assert str(caught.value).startswith(
        "The labels 'kind Aaa', 'kind Baa', 'kind Caa', 'kind Daa', 'kind Eaa', ... are none of the 3 classes; "
        "the classes 'star' have no label. The nearest to 'kind Aaa' in the class names is 'kind Haa': make the two "
        "the same. Labels are names of sub-folders or entries of a column. Rename them or the classes, or leave"
    )
