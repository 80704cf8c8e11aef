"""`microclip evaluate` interrupted, by several processes, and what it keeps until its results are written."""

import copy
import io
import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps
from test_labelling import Interruption
from test_labelling_processes import EXAMPLE as PREDICT
from test_labelling_processes import TESTS, TWO, finish, kill_later, launch
from tiny_inputs import draw_shape, save_clip
from tolerances import within

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import INTERRUPTED, evaluate
from microclip_hf.data.photo_sources import digest_images
from microclip_hf.data.sources import load_image_folder
from microclip_hf.evaluation.predictions import (
    EvaluationSettings,
    ImageReader,
    PlainCLIP,
    WayClassifier,
    predict_all_ways,
    remove_parts,
)
from microclip_hf.loading import load_adapted
from microclip_hf.passes import photo_batches


CLOSE = 1e-6  # of shares
NUM_PHOTOS = 22
UNREADABLE = "photos/green square/10.png"
EXAMPLE = PREDICT.with_name("evaluate_model.py")
FILES = {"results.json", "results.md", "confusion.png"}


@pytest.fixture
def place(adapted, clip_folder, tmp_path, monkeypatch):
    """A folder with `adapted`, `clip`, two files of descriptions and `photos`, of which one can't be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(photo_batches, "BLOCK", 4)
    rng = np.random.default_rng(0)
    for index in range(NUM_PHOTOS):
        folder = Path("photos", CLASS_NAMES[index % 3])
        folder.mkdir(parents=True, exist_ok=True)
        draw_shape(CLASS_NAMES[index % 3], rng).save(folder / f"{index:02d}.png")
    Path(UNREADABLE).write_bytes(b"no photo")
    Path("words.txt").write_text("red disc: it is round\ngreen square: four sides\nblue bar: a stripe\n")
    Path("others.txt").write_text("red disc: it is red\ngreen square: four sides\nblue bar: a stripe\n")
    shutil.copytree(adapted, "adapted")
    shutil.copytree(clip_folder, "clip")
    return tmp_path


def options(output, **changes):
    """As a command line; a change to `None` leaves an option out."""
    values = {
        "model_name_or_path": "adapted",
        "clip": "clip",
        "descriptions": "words.txt",
        "test_dir": "photos",
        "num_crops": 2,
        "batch_size": 2,
        "output_dir": output,
    }
    values |= changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def run(output, **changes):
    """The command's exit code, and its error where it is a text."""
    try:
        evaluate.main(options(output, **changes))
    except SystemExit as end:
        return end.code
    return 0


def leaves(value):
    """Keys and values of what JSON holds, in their order."""
    if isinstance(value, dict):
        return [leaf for key, own in value.items() for leaf in (key, *leaves(own))]
    return [leaf for own in value for leaf in leaves(own)] if isinstance(value, list) else [value]


def assert_same_results(folder, expected):
    """But for the rounding of an image that is alone in a batch, where a weight's place in memory matters."""
    found, wanted = (json.loads(Path(own, "results.json").read_text()) for own in (folder, expected))
    assert found.keys() == wanted.keys()
    # The model may be called by another path.
    assert leaves(found | {"model": ""}) == pytest.approx(leaves(wanted | {"model": ""}), abs=CLOSE)


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.fixture
def photos(place):
    return load_image_folder("photos", CLASS_NAMES, labels_required=True)


@pytest.fixture
def plain(model):
    return PlainCLIP(model, {"zero_shot": model.prior_head.weight})


def assert_same(found, expected):
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert list(found.logits) == list(expected.logits) and found.num_unreadable == expected.num_unreadable
    for way, logits in expected.logits.items():
        np.testing.assert_array_equal(found.logits[way], logits)


# Interrupted


@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_it_goes_on_where_it_was_interrupted(place, monkeypatch, capsys):
    """To the same results, and no image is classified twice."""
    assert run("whole") == 0
    count = Interruption(monkeypatch, KeyboardInterrupt(), moments=(3, 4, 8))
    for _ in count.moments:
        assert run("results") == INTERRUPTED
        assert names("results") == {".parts"}
        assert "what was computed so far is in results/.parts, and the same command goes on" in capsys.readouterr().err
    assert run("results") == 0
    assert count.num_images == NUM_PHOTOS - 1
    assert_same_results("results", "whole")
    assert names("results") == FILES


@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_results_that_are_half_written_are_written_anew(place, monkeypatch):
    """As after a kill at the end: nothing is computed again."""
    assert run("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "remove_parts", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("results")
    Path("results/results.json").write_text("{")
    Path("results/results.md").unlink()
    count = Interruption(monkeypatch, KeyboardInterrupt(), moments=())
    assert run("results") == 0
    assert count.num_images == 0
    assert_same_results("results", "whole")
    assert names("results") == FILES
    assert "already holds results.json, results.md, confusion.png" in run("results")


def change_model(change):
    model = MicroCLIPForImageClassification.from_pretrained("adapted")
    with torch.no_grad():
        if change == "weight":
            model.clip.vision_model.pre_layrnorm.bias[3] += 1e-3
        elif change == "head":
            model.prior_head.weight[1, 2] += 1e-3
        else:
            model.image_processor.resample = PILImage.Resampling.BILINEAR
    model.save_pretrained("adapted")


def change_clip():
    shutil.rmtree("clip")
    save_clip(Path("clip"), image_size=64)


CHANGES = {  # What is done before the command is given again, other options, and what the error says.
    "crops": (None, {"num_crops": 3}, "whose num crops was '2' and is now '3'"),
    "seed": (None, {"seed": 1}, "whose seed was '0' and is now '1'"),
    "no CLIP": (None, {"clip": None, "descriptions": None}, "whose clip was '"),
    "another CLIP": (change_clip, {}, "whose clip was '"),
    "other texts": (None, {"descriptions": "others.txt"}, "whose texts was 'zero_shot, cupl, "),
    "templates": (None, {"templates": "some {}"}, "whose texts was 'zero_shot, cupl, "),
    "no descriptions": (None, {"descriptions": None}, "and is now 'zero_shot, "),
    "weight": (lambda: change_model("weight"), {}, "whose model was '"),
    "head": (lambda: change_model("head"), {}, "whose model was '"),
    "image processor": (lambda: change_model("processor"), {}, "whose model was '"),
    "a name": (lambda: Path("photos/blue bar/02.png").rename("photos/blue bar/2.png"), {}, "whose images was '22 "),
    "another photo": (lambda: Path("photos/blue bar/02.png").write_bytes(b"other"), {}, "whose images was '22 images"),
    "fewer photos": (lambda: Path("photos/blue bar/02.png").unlink(), {}, "and is now '21 images"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_of_something_else_are_refused(place, monkeypatch, name):
    change, others, message = CHANGES[name]
    with monkeypatch.context() as patch:
        Interruption(patch, KeyboardInterrupt(), moments=(4,))
        assert run("results") == INTERRUPTED
    before = {path.name: path.read_bytes() for path in Path("results/.parts").iterdir()}
    if change is not None:
        change()
    error = run("results", **others)
    assert message in error and "results/.parts holds rows of an earlier run" in error
    assert {path.name: path.read_bytes() for path in Path("results/.parts").iterdir()} == before


@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_folders_may_be_moved_and_reading_may_change(place, monkeypatch):
    """None of these matters to the logits."""
    assert run("whole") == 0
    with monkeypatch.context() as patch:
        Interruption(patch, KeyboardInterrupt(), moments=(6,))
        assert run("results") == INTERRUPTED
    Path("elsewhere").mkdir()
    for name in ("photos", "adapted"):
        Path(name).rename(f"elsewhere/{name}")
    moved = {"model_name_or_path": "elsewhere/adapted", "test_dir": "elsewhere/photos"}
    assert run("results", num_workers=1, **moved) == 0
    assert_same_results("results", "whole")


def test_texts_are_known_by_what_they_say(model, plain):
    """The last bits of their features depend on the number of threads."""
    other = copy.deepcopy(model)
    other.prior_head.weight *= 1 + 1e-6
    clips = [PlainCLIP(each, {"zero_shot": each.prior_head.weight}, "two classes") for each in (model, other)]
    facts = [WayClassifier(each.model, each, EvaluationSettings()).facts() for each in clips]
    assert facts[0] == facts[1]
    assert facts[0] != WayClassifier(model, plain, EvaluationSettings()).facts()


def test_a_column_with_a_mode_is_read_image_by_image(photos, model):
    """So that one that can't be read is left out."""
    gray = photos.cast_column("image", Image(mode="L"))
    with pytest.warns(UserWarning, match="1 of 22 images can't be read"):
        found = predict_all_ways(model, gray)
    assert found.num_unreadable == 1
    pixels = [example["image"].convert("RGB") for example in gray.select(range(2))]
    expected = model(model.image_processor(pixels, return_tensors="pt")["pixel_values"]).logits
    np.testing.assert_allclose(found.logits["fused"][:2], expected.detach(), **within(model.logit_scale))


# Several processes


@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_two_processes_of_which_one_is_killed_go_on(place):
    """The results are one process's, and nothing else is left."""
    assert run("whole", batch_size=4) == 0
    two = [*TWO, TESTS / "evaluating.py", *options("results", device="cpu", batch_size=None)]
    Path("hold").touch()
    kill_later(launch("log", *two), random.Random(0), "results/.parts")
    Path("hold").unlink()
    assert names("results") == {".parts"}
    finish("log", launch("log", *two))
    assert "Evaluating (of 1 in 2 processes)" in Path("log").read_text()
    assert_same_results("results", "whole")
    assert names("results") == FILES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_the_example_by_two_processes(place):
    """The card is written once."""
    assert run("whole") == 0
    Path("adapted/README.md").write_text("# A model\n")
    finish("log", launch("log", *TWO, EXAMPLE, *options("results", device="cpu", update_card="true")))
    assert_same_results("results", "whole")
    assert Path("adapted/README.md").read_text().count("## Measured on photos") == 1
    assert Path("log").read_text().count("Saved to results: ") == 1


# What is computed


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_logits_by_way_of_files_are_those_in_memory(model, plain, photos, batch_size):
    """Also of a batch of which nothing can be read."""
    settings = EvaluationSettings(num_crops=2, batch_size=batch_size, progress=False)
    expected = predict_all_ways(model, photos, plain, settings)
    assert_same(predict_all_ways(model, photos, plain, settings, "results"), expected)
    assert expected.num_unreadable == 1 and expected.labels.tolist().count(1) == 6
    assert names("results") == {".parts"}
    remove_parts("results")
    assert not names("results")


@pytest.mark.filterwarnings("ignore:1 of 22 images can't be read")
def test_workers_leave_the_random_numbers_of_a_run_alone(model, photos):
    settings = [EvaluationSettings(2, batch_size=2, num_workers=workers, progress=False) for workers in (0, 2)]
    before = torch.get_rng_state()
    threads, workers = (predict_all_ways(model, photos, settings=own) for own in settings)
    assert torch.get_rng_state().equal(before)
    assert_same(workers, threads)


def test_crops_hang_on_the_seed_and_the_row(model):
    photo = draw_shape("red disc", np.random.default_rng(0)).resize((400, 300))
    readers = [ImageReader([model.image_processor], 32, EvaluationSettings(2, seed=seed)) for seed in (0, 0, 1)]
    places = itertools.product(readers, ((0, 3), (0, 4)))
    crops = [reader(photo, place)["crops"] for reader, place in places]
    assert crops[0].equal(crops[2]) and crops[1].equal(crops[3])
    assert not any(one.equal(other) for one, other in itertools.combinations([crops[0], crops[1], *crops[4:]], 2))


def test_large_jpegs_are_decoded_whole(model, tmp_path):
    """Turned ones too; of prediction's drafts the pixels would be others."""
    smooth = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    turned = PILImage.Exif()
    turned[0x0112] = 6
    smooth.resize((800, 600)).save(tmp_path / "turned.jpg", quality=95, exif=turned)
    stored = {"path": str(tmp_path / "turned.jpg"), "bytes": None}
    pixel_values = ImageReader([model.image_processor], 32, EvaluationSettings())(stored, (0, 0))["pixel_values"][0]
    upright = ImageOps.exif_transpose(PILImage.open(tmp_path / "turned.jpg"))
    assert upright.size == (600, 800)
    assert pixel_values.equal(model.image_processor(upright, return_tensors="pt")["pixel_values"][0])
    assert not photo_batches.PixelReader(model.image_processor)(stored).equal(pixel_values)


@pytest.mark.parametrize("kind", ["a transform", "a mode"])
def test_images_that_a_data_set_makes_in_its_own_way(model, kind):
    """As if they were stored so."""
    rng = np.random.default_rng(0)
    images = [draw_shape(name, rng) for name in CLASS_NAMES]
    labels = [0, 1, 2]
    stored = Dataset.from_dict({"image": images, "label": labels}).cast_column("image", Image())
    if kind == "a mode":
        own = stored.cast_column("image", Image(mode="L"))
        made = [image.convert("L") for image in images]
    else:
        own = stored.with_transform(lambda rows: {**rows, "image": list(map(ImageOps.mirror, rows["image"]))})
        made = list(map(ImageOps.mirror, images))
    expected = Dataset.from_dict({"image": made, "label": labels}).cast_column("image", Image())
    settings = EvaluationSettings(1, batch_size=2, progress=False)
    found = predict_all_ways(model, own, settings=settings)
    assert_same(found, predict_all_ways(model, expected, settings=settings))


def test_images_are_told_by_names_and_sizes(place, tmp_path):
    """Of files and of tables, of those that are selected, wherever the folder is."""
    photos = load_image_folder("photos", CLASS_NAMES)
    assert digest_images(photos) == digest_images(load_image_folder(tmp_path / "photos", CLASS_NAMES))
    stored = []
    for size in (3, 4, 5):
        PILImage.new("RGB", (size, size)).save(file := io.BytesIO(), "bmp")
        stored.append({"bytes": file.getvalue(), "path": f"{size}.bmp"})
    nameless = [{**row, "path": None} for row in stored]
    tables = [
        *(photos, photos.select([0, 2]), photos.select([2, 0])),
        *(Dataset.from_dict({"image": rows}).cast_column("image", Image()) for rows in (stored, nameless)),
        *(Dataset.from_dict({"image": rows[:2]}).cast_column("image", Image()) for rows in (stored, stored[::-1])),
    ]
    texts = list(map(digest_images, tables))
    assert len(set(texts)) == len(tables)
    assert [text.partition(" images, ")[0] for text in texts] == ["22", "2", "2", "3", "3", "2", "2"]
    assert digest_images(tables[3].select([0, 1])) == texts[5]
    assert digest_images(tables[3].select([2, 1])) == texts[6]


def test_no_image(model, plain):
    dataset = Dataset.from_dict({"image": [], "label": []}).cast_column("image", Image())
    with pytest.raises(ValueError, match=r"0 of 0 images can't be read .*so nothing can be measured"):
        predict_all_ways(model, dataset, plain)


def test_a_folder_in_the_way_is_left_alone(place):
    Path("results/.parts").mkdir(parents=True)
    Path("results/.parts/mine.txt").write_text("mine")
    assert "results/.parts is in the way" in run("results")
    assert load_adapted("adapted").num_labels == 3 and Path("results/.parts/mine.txt").read_text() == "mine"
