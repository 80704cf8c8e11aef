"""`microclip predict` against transformers' pipeline, photo by photo; its files, messages and exit codes."""

import csv
import io
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from PIL import Image
from tiny_inputs import LOGIT_SCALE, draw_shape
from tolerances import within
from transformers import pipeline

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import predict
from microclip_hf.prediction import Classifier, find_photos, predict_photos


pytestmark = pytest.mark.numerical


# How far scores may be apart, which are written with six digits.
CLOSE = within(LOGIT_SCALE / 2)["atol"] + 1e-6
HEADER = ["file", "label", "score", "runner_up", "runner_up_score"]


@pytest.fixture(scope="module")
def adapted(clip_folder, tmp_path_factory):
    """A model with a class whose name has to be quoted."""
    folder = tmp_path_factory.mktemp("adapted")
    names = [*CLASS_NAMES[:2], 'bar, "blue"']
    MicroCLIPForImageClassification.from_clip(clip_folder, names, prior_weighting="uniform").save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """`photos/` with every kind: sub-folders, odd names, greyscale, a palette, alpha, turned by EXIF."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "b sub").mkdir(parents=True)
    for index in range(7):
        draw_shape(CLASS_NAMES[index % 3], rng).save(folder / f"{index}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    draw_shape("red disc", rng).save(folder / "b sub" / 'née, "1".jpg', exif=turned)
    for name, mode in (("grey", "L"), ("palette", "P"), ("alpha", "RGBA")):
        draw_shape("green square", rng).convert(mode).save(folder / "b sub" / f"{name}.PNG")
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden.png").write_bytes(b"no photo either")
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments):
    """The command's exit code, and its error where it is a text."""
    try:
        predict.main([*map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def read(text):
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header == HEADER
    return {row[0]: row[1:] for row in rows}


def assert_pipelines_answers(adapted, folder, rows):
    model = MicroCLIPForImageClassification.from_pretrained(adapted)
    classify = pipeline("image-classification", model=str(adapted), image_processor=model.image_processor)
    for name, (label, score, runner_up, runner_up_score) in rows.items():
        best, second, third = classify(str(Path(folder, name)))
        assert min(best["score"] - second["score"], second["score"] - third["score"]) > 2 * CLOSE
        assert (label, runner_up) == (best["label"], second["label"]), name
        assert float(score) == pytest.approx(best["score"], abs=CLOSE)
        assert float(runner_up_score) == pytest.approx(second["score"], abs=CLOSE)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_folder_gets_the_pipelines_answers(adapted, photos, capsys, batch_size):
    assert run("photos/", "--model", adapted, "--output", "labels.csv", "--batch_size", batch_size) == 0
    rows = read(Path("labels.csv").read_bytes().decode())
    files = [str(path.relative_to(photos)) for path in photos.rglob("*.*") if path.suffix in (".png", ".jpg", ".PNG")]
    assert list(rows) == sorted(name for name in files if not name.startswith("."))
    assert 'b sub/née, "1".jpg' in rows and len({row[0] for row in rows.values()}) > 1
    assert_pipelines_answers(adapted, photos, rows)
    assert {path.name for path in Path().iterdir()} == {"photos", "labels.csv"}
    printed = capsys.readouterr()
    assert printed.out == "Saved the labels of 11 photos to labels.csv.\n"
    assert "11/11" in printed.err
    counts = Counter(row[0] for row in rows.values()).most_common()
    named = ", ".join(f"{label} ({count})" for label, count in counts)
    assert f"The most frequent labels, with their numbers of photos: {named}." in printed.err


def test_without_a_file_the_rows_alone_are_printed(adapted, photos, capsys):
    """Of files and patterns, which keep the names they were given by."""
    assert run("photos/3.png", "photos/[01].png", f"{photos}/**/*.jpg", "photos/1.png", "--model", adapted) == 0
    rows = read(capsys.readouterr().out)
    assert list(rows) == ["photos/3.png", "photos/0.png", "photos/1.png", f'{photos}/b sub/née, "1".jpg']
    assert_pipelines_answers(adapted, ".", rows)


@pytest.mark.parametrize(("counts", "is_told"), [((45, 5), False), ((46, 4), True), ((49, 0), False)])
def test_one_label_for_nearly_all_photos_is_told(adapted, photos, monkeypatch, capsys, counts, is_told):
    """Of 50 photos or more, and only where it is over 90 % of them."""
    labels = [label for label, count in zip(CLASS_NAMES[:2], counts, strict=True) for _ in range(count)]
    classes = iter(labels)
    for index in range(7, len(labels) - 4):  # four lie in a sub-folder
        shutil.copy(photos / "0.png", photos / f"{index}.png")

    def answer(self, pixel_values):
        best = [[self.class_names.index(next(classes)), 1] for _ in pixel_values]
        return torch.tensor([[0.9, 0.1]] * len(best)), torch.tensor(best)

    monkeypatch.setattr(Classifier, "__call__", answer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert run("photos", "--model", adapted) == 0
    assert [row[0] for row in read(capsys.readouterr().out).values()] == labels
    expected = [f"46 of 50 photos got the label {CLASS_NAMES[0]!r}."] if is_told else []
    assert [str(warning.message)[: len(expected[0])] for warning in told] == expected


def test_of_many_labels_the_most_frequent_are_told(capsys):
    predict._tell_most_frequent(Counter({f"class {index}": index for index in range(1, 8)}))
    printed = capsys.readouterr()
    assert not printed.out
    told = "class 7 (7), class 6 (6), class 5 (5), class 4 (4), class 3 (3) and 2 other labels."
    assert printed.err == f"The most frequent labels, with their numbers of photos: {told}\n"


def test_photos_that_cannot_be_read(adapted, photos, capsys):
    """They keep their rows, in their places, in batches with others and in batches of their own."""
    whole = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(whole[: len(whole) // 2])
    (photos / "5.png").write_text("no photo")
    (photos / "6.png").unlink()
    (photos / "6.png").symlink_to("nowhere.png")
    for batch_size in (1, 4):
        assert run("photos", "--model", adapted, "--batch_size", batch_size) == 3
        printed = capsys.readouterr()
        rows = read(printed.out)
        unreadable = [name for name, row in rows.items() if row == [""] * 4]
        assert unreadable == ["2.png", "5.png", "6.png"] and len(rows) == 11
        assert_pipelines_answers(adapted, photos, {name: rows[name] for name in rows if name not in unreadable})
        assert all(f"photos/{name} can't be read: " in printed.err for name in unreadable)
        assert "3 of 11 photos can't be read" in printed.err


def test_grey_of_16_bits_counts_like_8(adapted, photos, capsys):
    """As in adaptation; the pipeline would see a white image."""
    grey = np.asarray(Image.open(photos / "b sub" / "grey.PNG"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(photos / "sixteen.png")
    assert run("photos", "--model", adapted) == 0
    rows = read(capsys.readouterr().out)
    deep, plain = rows["sixteen.png"], rows["b sub/grey.PNG"]
    assert deep[0] == plain[0] and deep[2] == plain[2]
    assert [float(deep[1]), float(deep[3])] == pytest.approx([float(plain[1]), float(plain[3])], abs=CLOSE)


def test_names_that_are_no_text_are_written(adapted, tmp_path, capsys):
    name = os.fsdecode(b"\xff.png")
    try:
        draw_shape("red disc", np.random.default_rng(0)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert run(tmp_path, "--model", adapted, "--output", tmp_path / "labels.csv") == 0
    assert list(read((tmp_path / "labels.csv").read_text(encoding="utf-8"))) == ["\\udcff.png"]


def pipeline_scores(adapted, folder):
    """Of each photo the classes with their probabilities, best first."""
    model = MicroCLIPForImageClassification.from_pretrained(adapted)
    classify = pipeline("image-classification", model=str(adapted), image_processor=model.image_processor)
    return {
        path.relative_to(folder).as_posix(): [(best["label"], best["score"]) for best in classify(str(path))]
        for path in Path(folder).rglob("*.*")
        if path.suffix.lower() in (".png", ".jpg") and not path.name.startswith(".")
    }


def test_top_k_names_as_many_classes(adapted, photos):
    for top_k, columns in ((1, HEADER[:3]), (3, [*HEADER, "label_3", "score_3"])):
        assert run("photos", "--model", adapted, "--top_k", top_k, "--output", f"{top_k}.csv") == 0
        with open(f"{top_k}.csv", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == columns
        expected = pipeline_scores(adapted, photos)
        assert {row[0] for row in rows} == set(expected)
        for name, *found in rows:
            assert found[::2] == [label for label, _ in expected[name][:top_k]]
            assert [*map(float, found[1::2])] == pytest.approx([s for _, s in expected[name][:top_k]], abs=CLOSE)


def test_some_classes_share_the_whole(adapted, photos, capsys):
    """Their probabilities among all classes, divided by the sum of those; names match as everywhere."""
    Path("names.json").write_text('["BAR, \\"blue\\"", "Red_Disc"]')
    assert run("photos", "--model", adapted, "--classes", "names.json") == 0
    rows = read(capsys.readouterr().out)
    expected = pipeline_scores(adapted, photos)
    assert rows.keys() == expected.keys()
    for name, (label, score, runner_up, runner_up_score) in rows.items():
        left = [(known, share) for known, share in expected[name] if known != "green square"]
        total = sum(share for _, share in left)
        assert [label, runner_up] == [known for known, _ in left]
        # A sum of 0.1 or more magnifies an error tenfold at most.
        assert total > 0.1
        shares = [share / total for _, share in left]
        assert [float(score), float(runner_up_score)] == pytest.approx(shares, abs=20 * CLOSE)


def test_bfloat16_gives_scores_that_are_near(adapted, photos, capsys):
    """It keeps 8 bits of each number, and the logit scale and the heads all 24."""
    assert run("photos", "--model", adapted, "--precision", "bfloat16", "--top_k", 3) == 0
    _, *rows = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
    expected = pipeline_scores(adapted, photos)
    scores = {row[0]: dict(zip(row[1::2], map(float, row[2::2]), strict=True)) for row in rows}
    differences = [abs(scores[name][label] - score) for name in expected for label, score in expected[name]]
    # Cosines that are 2^-8 off, times the logit scale, times the slope of a softmax, which is at most 1 / 2.
    assert 0 < max(differences) < LOGIT_SCALE * 2**-8


def test_of_several_processes_what_cannot_be_shared_is_refused(adapted, photos, monkeypatch):
    state = SimpleNamespace(num_processes=2, device=torch.device("cuda:1"), is_main_process=True)
    monkeypatch.setattr("microclip_hf.commands.options.join_processes", lambda device: state)
    assert "2 processes need an --output to write to" in run("photos", "--model", adapted)
    monkeypatch.setattr("microclip_hf.commands.options.choose_device", lambda name, option: torch.device(name))
    error = run("photos", "--model", adapted, "--output", "labels.csv", "--device", "cuda:0")
    assert "--device cuda:0 is one; of 2 processes each has its own" in error


ERRORS = {  # Arguments, and what the error says.
    "a plain CLIP": ("photos --model {clip}", "is a model of type 'clip'; pass a microCLIP, which brings its class"),
    "no model": ("photos --model ./nowhere", "nowhere"),
    "existing output": ("photos --model {adapted} --output old.csv", "--output old.csv exists already"),
    "no folder": ("photos --model {adapted} --output new/a.csv", "there is no folder new; make it"),
    "batch size": ("photos --model {adapted} --batch_size 0", "--batch_size is 0; pass 1 or more"),
    "device": ("photos --model {adapted} --device gpu", "--device gpu can't be used here"),
    "no photos": ("empty --model {adapted}", "empty holds no image files"),
    "no source": ("photo --model {adapted}", "photo is no file or folder here"),
    "no match": ("photos/*.gif --model {adapted}", "photos/*.gif is no file or folder here, and no file matches"),
    "twice": ("photos --dataset_name repo --model {adapted}", "Pass either photos, or --dataset_name"),
    "workers": ("photos --model {adapted} --num_workers -1", "--num_workers is -1; pass 0 or more"),
    "split of a folder": ("photos --model {adapted} --dataset_split test", "--dataset_split only goes with"),
    "stream of a folder": ("photos --model {adapted} --streaming true", "--streaming only goes with --dataset_name"),
    "column of files": (
        "photos --model {adapted} --image_column image",
        "files have no column; leave --image_column",
    ),
    "a table and photos": ("photos/0.png t.parquet --model {adapted}", "Pass photos, or tables of one kind; got"),
    "two kinds of tables": ("t.parquet t.tar --model {adapted}", "Pass photos, or tables of one kind; got t.parquet"),
    "no table": ("t.parquet --model {adapted}", "t.parquet can't be read"),
    "no classes": ("photos --model {adapted} --classes names.txt", "--classes names.txt: there is no such file"),
    "other classes": ("photos --model {adapted} --classes old.csv", "The model's 3 classes don't include 'red disk'."),
    "too many": ("photos --model {adapted} --top_k 4", "--top_k is 4; pass a number from 1 to 3, the classes"),
    "none": ("photos --model {adapted} --top_k 0", "--top_k is 0; pass a number from 1 to 3, the classes"),
    "two folders": ("photos empty --model {adapted}", "photos is a folder, and not the only source"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do_and_leave_files_alone(adapted, clip_folder, photos, name):
    Path("empty").mkdir()
    Path("old.csv").write_text("red disk\ngreen square")
    for table in ("t.parquet", "t.tar"):
        Path(table).write_text("no table")
    arguments, message = ERRORS[name]
    error = run(*arguments.format(clip=clip_folder, adapted=adapted).split())
    assert error.startswith("microclip predict: ") and message in error
    assert {path.name for path in Path().iterdir()} == {"photos", "empty", "old.csv", "t.parquet", "t.tar"}
    assert Path("old.csv").read_text() == "red disk\ngreen square"


def test_interrupted_the_same_command_goes_on(adapted, photos, monkeypatch, capsys):
    """No photo is classified twice, and the file is that of a run that wasn't interrupted."""
    forward, sizes = MicroCLIPForImageClassification.forward, []

    def interrupted(self, **kwargs):
        sizes.append(len(kwargs["pixel_values"]))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return forward(self, **kwargs)

    options = ["photos", "--model", adapted, "--batch_size", 2, "--output"]
    assert run(*options, "whole.csv") == 0
    monkeypatch.setattr(MicroCLIPForImageClassification, "forward", interrupted)
    assert run(*options, "labels.csv") == 128 + signal.SIGINT
    printed = capsys.readouterr()
    told = "interrupted; what was computed so far is in labels.csv.parts, and the same command goes on.\n"
    assert told in printed.err
    assert not Path("labels.csv").exists() and Path("labels.csv.parts").is_dir()
    assert run(*options, "labels.csv") == 0
    assert sizes == [2, 2, 2, 2, 2, 2, 1]  # the third batch twice
    assert Path("labels.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert {path.name for path in Path().iterdir()} == {"photos", "whole.csv", "labels.csv"}


def test_a_pipe_that_closes_ends_it_quietly(adapted, photos, monkeypatch, capsys):
    """As `head` closes it."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run("photos", "--model", adapted) == 1
    assert "microclip predict" not in capsys.readouterr().err


def test_photos_are_read_as_they_are_needed(adapted, photos):
    """Two batches at most are in memory, whatever the number of photos."""
    model, taken = MicroCLIPForImageClassification.from_pretrained(adapted), []

    def endless():
        while True:
            taken.append(photos / "0.png")
            yield taken[-1]

    predictions = predict_photos(model, endless(), batch_size=5)
    for count in range(1, 42):
        next(predictions)
        assert len(taken) <= 5 * (-(-count // 5) + 1)


def test_links_into_other_folders_are_followed(photos, tmp_path):
    shutil.copytree(photos / "b sub", tmp_path / "elsewhere")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    assert find_photos(["photos"])["linked/grey.PNG"] == Path("photos/linked/grey.PNG")
