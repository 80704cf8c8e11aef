"""`microclip check` from the draw to the verdict: its files, its sentence, and what odd labels and inputs are told."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_inputs import DESCRIPTIONS, draw_shape
from transformers import AutoProcessor, CLIPModel

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.check import finish_check
from microclip_hf.check.folder import check_new_folder, read_check
from microclip_hf.check.labels import set_label
from microclip_hf.check.tables import fingerprint
from microclip_hf.commands import check
from microclip_hf.commands import main as microclip
from microclip_hf.prediction.predictions import column_names


NAMES = list(DESCRIPTIONS)
NUM_PHOTOS = 120


def write_table(path, labels):
    """As `microclip predict` does, with scores that fall."""
    rows = [[f"{index:03}.png", label, 0.9 - index / 1000, NAMES[0], 0.05] for index, label in enumerate(labels)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([column_names(2), *rows])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photos, their true classes, and what two models said: CLIP is wrong on every third, the other on every tenth."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    truths = [NAMES[index % 3] for index in range(NUM_PHOTOS)]
    for index, name in enumerate(truths):
        draw_shape(name, rng).save(folder / "photos" / f"{index:03}.png")
    for file, step in (("clip.csv", 3), ("adapted.csv", 10)):
        wrong = [NAMES[(index + 1) % 3] for index in range(NUM_PHOTOS)]
        write_table(folder / file, [wrong[i] if i % step == 0 else name for i, name in enumerate(truths)])
    return folder, {f"{index:03}.png": name for index, name in enumerate(truths)}


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder of one's own with `photos/`, `clip.csv` and `adapted.csv`."""
    shutil.copytree(world[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def drawn(place, capsys):
    """A check of 40 photos."""
    run("photos", "--model", "adapted.csv", "--clip", "clip.csv", "--output_dir", "check", "--num_labels", "40")
    capsys.readouterr()
    return place / "check"


def run(*arguments):
    check.main([*map(str, arguments)])


def refused(*arguments):
    """The one line of an error."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    text = str(ended.value.code)
    assert "\n" not in text and text.startswith("microclip check: ")
    return text


def rows_of(folder):
    with open(folder / "to_label.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def fill(folder, labels, limit=None, style=lambda label: label):
    """Label the first rows as a person does."""
    head, *rows = rows_of(folder)
    rows[:limit] = [[file, label or style(labels[file])] for file, label in rows[:limit]]
    with open(folder / "to_label.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])


# From the draw to the verdict


def test_models_predict_draw_and_are_judged(inputs, tmp_path, monkeypatch, capsys):
    """CLIP's labels are those of transformers' CLIPModel with the mean of unit descriptions; the adapted ones are
    what `microclip predict` writes."""
    names = {"class_names": NAMES, "descriptions": DESCRIPTIONS, "prior_weighting": "uniform"}
    MicroCLIPForImageClassification.from_clip(inputs / "clip", **names).save_pretrained(tmp_path / "adapted")
    monkeypatch.chdir(tmp_path)
    models = ("--model", "adapted", "--clip", inputs / "clip", "--descriptions", inputs / "descriptions.json")
    run(inputs / "photos", *models, "--output_dir", "check", "--num_labels", 20)
    assert "20 drawn" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["microclip", "predict", str(inputs / "photos"), "--model", "adapted", "--output", "own.csv"]
    )
    microclip()
    assert Path("check/adapted.csv").read_text() == Path("own.csv").read_text()
    photos = sorted((inputs / "photos").iterdir())
    table = list(csv.DictReader(Path("check/clip.csv").read_text().splitlines()))
    assert [row["file"] for row in table] == [path.name for path in photos]
    scores = clip_scores(inputs / "clip", photos)
    np.testing.assert_allclose([float(row["score"]) for row in table], scores.max(1), atol=1e-3)
    fill(Path("check"), {path.name: NAMES[0] for path in photos})
    run("--finish", "check")
    assert "20 of 20 drawn photos have a label, of 48 photos" in capsys.readouterr().out


def test_an_interrupted_check_goes_on_with_both_models(inputs, tmp_path, monkeypatch, capsys):
    """However often it is interrupted, each model sees each photo once, and the files are those of one run."""
    names = {"class_names": NAMES, "descriptions": DESCRIPTIONS, "prior_weighting": "uniform"}
    MicroCLIPForImageClassification.from_clip(inputs / "clip", **names).save_pretrained(tmp_path / "adapted")
    monkeypatch.chdir(tmp_path)
    options = (inputs / "photos", "--model", "adapted", "--clip", inputs / "clip", "--batch_size", 8, "--output_dir")
    run(*options, "whole")
    seen = []

    def forward(model, pixel_values, own=MicroCLIPForImageClassification.forward):
        seen.append(len(pixel_values))
        if len(seen) in (3, 5, 12):  # of 6 batches a model
            seen[-1] = 0
            raise KeyboardInterrupt
        return own(model, pixel_values=pixel_values)

    monkeypatch.setattr(MicroCLIPForImageClassification, "forward", forward)
    for place in ("clip.csv", "clip.csv", "adapted.csv"):
        with pytest.raises(SystemExit):
            run(*options, "check")
        assert f"interrupted; what was computed so far is in check/{place}.parts" in capsys.readouterr().err
        assert not Path("check/draw.json").exists()
    run(*options, "check")
    assert sum(seen) == 2 * 48
    assert {path.name for path in Path("check").iterdir()} == {path.name for path in Path("whole").iterdir()}
    for path in Path("whole").iterdir():
        assert Path("check", path.name).read_bytes() == path.read_bytes()


def clip_scores(folder, photos):
    """Probabilities `(num_photos, num_classes)` by transformers alone."""
    import torch

    model, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        images = processor(images=[Image.open(path).convert("RGB") for path in photos], return_tensors="pt")
        embeds = torch.nn.functional.normalize(model.get_image_features(**images).pooler_output, dim=-1)
        head = []
        for sentences in DESCRIPTIONS.values():
            tokens = processor(text=sentences, return_tensors="pt", padding=True)
            own = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            head.append(torch.nn.functional.normalize(own.mean(0), dim=-1))
        return (model.logit_scale.exp() * embeds @ torch.stack(head).T).softmax(-1).numpy()


def test_all_labels_give_the_truth(place, world, capsys):
    """By arithmetic: of 120 photos CLIP is wrong on 40, the other model on 12."""
    run("photos", "--model", "adapted.csv", "--clip", "clip.csv", "--output_dir", "check", "--num_labels", "500")
    assert "no more photos than these 120" in capsys.readouterr().out
    fill(place / "check", world[1], style=lambda label: label.upper().replace(" ", "_"))
    run("--finish", "check")
    results = json.loads((place / "check" / "check.json").read_text())
    assert results["status"] == "better"
    assert results["difference"] == pytest.approx(dict.fromkeys(("value", "low", "high"), 28 / 120))
    assert results["clip"]["value"] == pytest.approx(80 / 120)
    assert results["adapted"]["high"] == pytest.approx(108 / 120)
    assert results["photos_on_which_they_differ"] == 40 - 4 + 12 - 4


def test_a_sample_gives_a_verdict_and_files(drawn, world, capsys):
    fill(drawn, world[1])
    run("--finish", "check")
    printed = capsys.readouterr().out
    results = json.loads((drawn / "check.json").read_text())
    assert re.match(r"Better: on these 120 photos the adapted model is [0-9.]+ points above CLIP \(95 %", printed)
    assert results["difference"]["low"] <= 28 / 120 <= results["difference"]["high"]
    assert results["sentence"] in (drawn / "check.md").read_text()
    assert Image.open(drawn / "check.png").format == "PNG"
    for stratum in results["strata"]:
        assert stratum["probability"] == pytest.approx(stratum["drawn"] / stratum["photos"])


def test_the_other_way_round_it_is_worse(place, world):
    run("photos", "--model", "clip.csv", "--clip", "adapted.csv", "--output_dir", "check", "--num_labels", "40")
    fill(place / "check", world[1])
    assert finish_check("check")["status"] == "worse"


def test_undecided_says_what_to_do(drawn, world):
    fill(drawn, world[1], limit=6)
    results = finish_check("check")
    assert results["status"] == "not decided"
    assert "Label the 34 drawn photos that have no label yet." in results["advice"]
    assert results["without_label"] == 34


def test_undecided_of_all_drawn_asks_for_more(place, world):
    table = (place / "clip.csv").read_text()
    write_table(place / "clip.csv", [NAMES[(index + (index % 9 == 0)) % 3] for index in range(NUM_PHOTOS)])
    assert (place / "clip.csv").read_text() != table
    run("photos", "--model", "adapted.csv", "--clip", "clip.csv", "--output_dir", "check", "--num_labels", "10")
    fill(place / "check", world[1])
    results = finish_check("check")
    assert results["status"] == "not decided"
    assert results["advice"] == "Label 40 more: microclip check --more 40 --output_dir check."
    page = (place / "check" / "check.md").read_text()
    assert f"{results['sentence']} {results['advice']}" in page and "--output_dir" not in results["sentence"]


def test_undecided_asks_for_no_more_where_the_rest_agrees(place, world):
    """All 44 on which they differ were drawn, and four of these have a label that names a class."""
    run("photos", *BOTH, "--output_dir", "check", "--num_labels", "80")
    own = read_check("check")
    differ = [file for file in own.drawn if own.differs[file]]
    for file in own.drawn:
        set_label(own.labels, file, "unknown" if own.differs[file] else world[1][file])
    for file in differ[:4]:
        set_label(own.labels, file, world[1][file])
    results = finish_check("check")
    assert len(differ) == results["photos_on_which_they_differ"] and results["drawn"] < results["photos"]
    assert results["status"] == "not decided"
    assert results["advice"] == (
        "All photos on which they differ were drawn; labels of those that are unknown would be needed."
    )


def test_models_that_agree_everywhere_are_equal(place, world):
    run("photos", "--model", "clip.csv", "--clip", "clip.csv", "--output_dir", "check", "--num_labels", "10")
    fill(place / "check", world[1])
    results = finish_check("check")
    assert results["status"] == "equal" and results["clip"] == results["adapted"]


def test_more_keeps_labels_and_draws_what_a_larger_check_would(drawn, place, world):
    fill(drawn, world[1], limit=25)
    before = rows_of(drawn)
    run("--more", "30", "--output_dir", "check")
    after = rows_of(drawn)
    assert after[: len(before)] == before and len(after) == len(before) + 30
    assert all(label == "" for _, label in after[len(before) :])
    models = ("--model", "adapted.csv", "--clip", "clip.csv")
    run("photos", *models, "--output_dir", "larger", "--num_labels", "40")
    run("--more", "30", "--output_dir", "larger")
    assert {row[0] for row in rows_of(place / "larger")} == {row[0] for row in after}
    fill(drawn, world[1])
    assert finish_check("check")["labelled"] == 70


def test_more_that_was_interrupted_goes_on(drawn, monkeypatch, capsys):
    """Killed before the rows were written: they are added by the next call, and nothing is refused."""
    monkeypatch.setattr("microclip_hf.check.run.add_files", interrupt)
    with pytest.raises(SystemExit):
        run("--more", "10", "--output_dir", "check")
    assert len(rows_of(drawn)) == 1 + 40 and "rows that are missing are added by --more 1" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(drawn.parent)
    run("--more", "1", "--output_dir", "check")
    assert len(rows_of(drawn)) == 1 + 51


def test_more_of_all_that_was_interrupted_goes_on(drawn, monkeypatch):
    """Though no photo is left to draw, rows that are missing are added; then there is nothing to do."""
    with monkeypatch.context() as patch:
        patch.setattr("microclip_hf.check.run.add_files", interrupt)
        with pytest.raises(SystemExit):
            run("--more", "80", "--output_dir", "check")
    run("--more", "1", "--output_dir", "check")
    assert len(rows_of(drawn)) == 1 + NUM_PHOTOS
    assert "All 120 photos were drawn already" in refused("--more", "1", "--output_dir", "check")


def test_more_that_is_refused_draws_nothing(drawn):
    edit(drawn / "to_label.csv", "file,label", "photo,class")
    before = (drawn / "draw.json").read_bytes()
    assert "expected 'file,label'" in refused("--more", "10", "--output_dir", "check")
    assert (drawn / "draw.json").read_bytes() == before


def test_a_page_that_is_missing_is_written_again(drawn):
    """As of a drawing that was interrupted before it."""
    page = (drawn / "label.html").read_bytes()
    (drawn / "label.html").unlink()
    assert "has no label yet" in refused("--finish", "check")
    assert (drawn / "label.html").read_bytes() == page


def interrupt(*_):
    raise KeyboardInterrupt


# Labels


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_tables_of_spreadsheets(drawn, world, delimiter):
    fill(drawn, world[1])
    expected = finish_check("check")
    _, *rows = rows_of(drawn)
    text = "\r\n".join(delimiter.join([*row, "a note"]) for row in [["File", "Label"], *rows, ["", ""]])
    (drawn / "to_label.csv").write_text(text, encoding="utf-16")
    assert finish_check("check") == expected


def test_none_and_unknown_are_counted_apart(drawn, world):
    """A photo of no class is wrong for both; an unknown one wasn't drawn."""
    fill(drawn, world[1])
    files = [row[0] for row in rows_of(drawn)[1:]]
    set_label(drawn / "to_label.csv", files[0], "None of these")
    set_label(drawn / "to_label.csv", files[1], "UNKNOWN")
    set_label(drawn / "to_label.csv", files[2], "")
    results = finish_check("check")
    assert (results["none_of_these"], results["unknown"], results["without_label"]) == (1, 1, 1)
    assert results["labelled"] == 38
    assert sum(stratum["labelled"] for stratum in results["strata"]) == 38
    page = (drawn / "check.md").read_text()
    assert "Photos that show none of the classes, so that both models are wrong: 1." in page
    assert "1 unknown, 1 without a label" in page


def edit(table, old, new):
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [[rows[0][0], "red disk"], *rows[1:]],
            "'red disk', which is none of the 3 classes. The nearest",
        ),
        (lambda rows: [[rows[0][0], "2"], *rows[1:]], "labels .* as '2', which is none of the 3 classes"),
        (lambda rows: [*rows, ["strange.png", "red disc"]], "rows of photos that weren't drawn .'strange.png'."),
        (lambda rows: [*rows, rows[0]], "has several rows of"),
        (lambda rows: [[file, ""] for file, _ in rows], "has no label yet"),
    ],
)
def test_odd_labels_get_one_line_and_stay(drawn, world, change, message):
    fill(drawn, world[1])
    head, *rows = rows_of(drawn)
    with open(drawn / "to_label.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *change(rows)])
    before = (drawn / "to_label.csv").read_bytes()
    line = refused("--finish", "check")
    assert re.search(message, line), line
    assert (drawn / "to_label.csv").read_bytes() == before and not (drawn / "check.json").exists()


def test_a_row_that_was_removed_counts_as_not_drawn(drawn, world):
    fill(drawn, world[1])
    head, *rows = rows_of(drawn)
    with open(drawn / "to_label.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows[3:]])
    results = finish_check("check")
    assert (results["rows_missing"], results["labelled"]) == (3, 37)


def test_a_head_that_was_removed(drawn, world):
    fill(drawn, world[1])
    (drawn / "to_label.csv").write_text((drawn / "to_label.csv").read_text().partition("\n")[2])
    assert "expected 'file,label'" in refused("--finish", "check")


def test_labels_are_never_overwritten(drawn, world, monkeypatch):
    """Neither by another check, nor by a writing that fails."""
    fill(drawn, world[1], limit=5)
    before = (drawn / "to_label.csv").read_bytes()
    line = refused("photos", "--model", "adapted.csv", "--clip", "clip.csv", "--output_dir", "check")
    assert "already holds draw.json, to_label.csv" in line
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError):
            set_label(drawn / "to_label.csv", rows_of(drawn)[9][0], "red disc")
    assert (drawn / "to_label.csv").read_bytes() == before
    (drawn / "draw.json").unlink()
    line = refused("photos", "--model", "adapted.csv", "--clip", "clip.csv", "--output_dir", "check")
    assert "already holds to_label.csv" in line and "Move it away" in line and "--finish" not in line


def fail(*_):
    raise OSError("No space left on device")


def test_the_tab_labels_the_photo_that_is_shown(drawn, world, monkeypatch):
    """Though rows were sorted and taken away meanwhile, and one is of a photo that wasn't drawn."""
    pytest.importorskip("gradio", reason="gradio isn't installed; it is in the extra demo")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "space")
    from labelling import Labelling

    tab = Labelling("check")
    files = [row[0] for row in rows_of(drawn)[1:]]
    assert tab.open()[0] == files[0]
    assert tab.label(files[0], "none of these")[0] == files[1]
    strange = next(file for file in world[1] if file not in files)
    rows = [[strange, ""], *reversed(rows_of(drawn)[1:-1])]  # the last is taken away
    with open(drawn / "to_label.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "label"], *rows])
    tab.choose(files[1], 0)
    with pytest.warns(UserWarning, match="has no row"):
        tab.label(files[-1], "unknown")
    given = {file: label for file, label in rows_of(drawn)[1:] if label}
    assert given == {files[0]: "none of these", files[1]: read_check("check").candidates(files[1])[0]}
    assert strange not in tab.rows() and tab.move(files[1], -1)[0] == files[2]
    fill(drawn, {strange: "red disc", **world[1]})
    assert tab.open()[0] == "" and "All are labelled" in tab.open()[1]


# What changes between the draw and the end


def test_another_model_since_is_told(drawn, place, world):
    fill(drawn, world[1])
    expected = finish_check("check")
    edit(place / "adapted.csv", "000.png", "000.PNG")
    with pytest.warns(UserWarning, match="isn't the model any more that it was when the photos were drawn"):
        assert finish_check("check") == expected


def test_a_model_folder_is_known_by_its_weights(place, world):
    (place / "model").mkdir()
    (place / "model" / "model.safetensors").write_bytes(b"one")
    first = fingerprint(place / "model")
    (place / "model" / "README.md").write_text("a card")
    assert fingerprint(place / "model") == first
    (place / "model" / "model.safetensors").write_bytes(b"other")
    assert fingerprint(place / "model") != first
    second = fingerprint(place / "model")
    (place / "model" / "preprocessor_config.json").write_text("{}")
    assert fingerprint(place / "model") not in (first, second)
    assert fingerprint("me/on-the-hub") is None


def test_predictions_that_were_changed_are_refused(drawn, world):
    fill(drawn, world[1])
    edit(drawn / "adapted.csv", "blue bar", "red disc")
    assert "adapted.csv changed" in refused("--finish", "check")


def test_photos_that_are_gone(drawn, place, world):
    """The page tells how many; labels that were given count."""
    fill(drawn, world[1])
    shutil.rmtree(place / "photos")
    assert finish_check("check")["labelled"] == 40
    with pytest.warns(UserWarning, match="5 of the photos to label can't be read"):
        run("--more", "5", "--output_dir", "check")


@pytest.mark.parametrize("name", ["draw.json", "clip.csv", "to_label.csv"])
def test_a_folder_that_is_no_check(drawn, name):
    (drawn / name).unlink()
    assert f"has no {name}" in refused("--finish", "check")
    assert f"has no {name}" in refused("--more", "4", "--output_dir", "check")


def test_a_damaged_draw(drawn):
    (drawn / "draw.json").write_text("{}")
    assert "isn't as microclip check wrote it" in refused("--finish", "check")


# Options and inputs


BOTH = ("--model", "adapted.csv", "--clip", "clip.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos", "--clip", "clip.csv", "--output_dir", "new"), "--model is missing"),
        (("photos", *BOTH), "--output_dir is missing"),
        ((*BOTH, "--output_dir", "new"), "There are 0 folders"),
        (("photos", *BOTH, "--output_dir", "new", "--num_labels", "0"), "--num_labels is 0"),
        (("nowhere", *BOTH, "--output_dir", "new"), "nowhere is no folder"),
        (("photos", "--model", "no.csv", "--clip", "clip.csv", "--output_dir", "new"), "There is no file no.csv"),
        (("photos", *BOTH, "--descriptions", "no.json", "--output_dir", "new"), "--descriptions no.json"),
        (("photos", "--model", "adapted.csv", "--clip", "clip", "--output_dir", "new"), "pass --class_names"),
        (("photos", *BOTH, "--output_dir", "photos/check"), "--output_dir photos/check lies in photos"),
        (("photos", "--finish", "check"), "photos can't go with --finish"),
        (("--finish", "check", "--more", "40"), "--more can't go with --finish"),
        (("--more", "40"), "--output_dir is missing"),
        (("--more", "0", "--output_dir", "check"), "--more is 0"),
        (("--finish", "photos"), "has no draw.json"),
    ],
)
def test_odd_options(place, arguments, message):
    assert message in refused(*arguments)
    assert not Path("new").exists()


def rows(*others):
    return "\n".join([",".join(column_names(2)), *others])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n000.png,red disc", "begins with 'file,label'"),
        (rows("000.png,red disc,0.9"), "line 2 has 3 values"),
        (rows("000.png,red disc,much,blue bar,0.1"), "line 2 has a score that is no number"),
        (rows(*["000.png,red disc,0.9,blue bar,0.1"] * 2), "line 3 names a file again"),
        (rows("000.png,red disc,0.9,blue bar,0.1"), "119 photos are in the predictions of the adapted model alone"),
    ],
)
def test_odd_tables(place, text, message):
    Path("clip.csv").write_text(text)
    assert message in refused("photos", *BOTH, "--output_dir", "new")


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_of_any_number_of_classes(place, world, drawn, top_k, ending):
    """As `microclip predict --top_k` writes them; draw and verdict don't depend on the classes after the first."""
    for name in ("clip", "adapted"):
        table = pd.read_csv(f"{name}.csv")
        table["label_3"], table["score_3"] = NAMES[1], 0.01
        table = table[column_names(top_k)]
        if ending == "csv":
            table.to_csv(f"{name}_{top_k}.csv", index=False)
        else:
            table.to_parquet(f"{name}_{top_k}.parquet", index=False)
    models = ("--model", f"adapted_{top_k}.{ending}", "--clip", f"clip_{top_k}.{ending}")
    run("photos", *models, "--output_dir", "other", "--num_labels", "40")
    assert rows_of(place / "other") == rows_of(drawn)
    for folder in (drawn, place / "other"):
        fill(folder, world[1])
    expected, results = finish_check("check"), finish_check("other")
    assert results["difference"] == expected["difference"] and results["strata"] == expected["strata"]
    own, other = read_check("check"), read_check("other")
    for file in own.drawn:
        assert set(other.candidates(file)) <= set(own.candidates(file))
        assert top_k == 1 or other.candidates(file) == own.candidates(file)


def test_a_file_that_is_no_parquet(place):
    Path("clip.parquet").write_bytes(b"PAR1")
    line = refused("photos", "--model", "adapted.csv", "--clip", "clip.parquet", "--output_dir", "new")
    assert "clip.parquet can't be read as a table" in line


def test_tables_of_other_classes(place):
    Path("names.txt").write_text("red disc\ngreen square\n")
    assert "has the classes 'blue bar'" in refused(
        "photos", *BOTH, "--class_names", "names.txt", "--output_dir", "new"
    )


def test_tables_of_other_photos(place):
    (place / "photos" / "007.png").unlink()
    assert "1 of 120 photos with predictions aren't in photos ('007.png')" in refused(
        "photos", *BOTH, "--output_dir", "new"
    )


def test_a_class_called_unknown(place):
    text = (place / "clip.csv").read_text()
    (place / "clip.csv").write_text(text.replace("blue bar", "Unknown"))
    assert "A class is called 'Unknown'" in refused("photos", *BOTH, "--output_dir", "new")


def test_photos_without_a_prediction_are_left_out(place, world):
    edit(place / "clip.csv", "001.png,green square", "001.png,")
    run("photos", *BOTH, "--output_dir", "check", "--num_labels", "119")
    fill(place / "check", world[1])
    results = finish_check("check")
    assert (results["photos"], results["photos_left_out"]) == (119, 1)


# The card


def test_the_card_cites_the_verdict(place, world, capsys):
    """Once, however often; not the card of another model, nor where there is none."""
    (place / "model").mkdir()
    (place / "model" / "model.safetensors").write_bytes(b"one")
    run("photos", *BOTH, "--output_dir", "check", "--num_labels", "40")
    fill(place / "check", world[1])
    record = json.loads((place / "check" / "draw.json").read_text())
    record["sources"]["adapted"], record["fingerprints"]["adapted"] = "model", fingerprint(place / "model")
    (place / "check" / "draw.json").write_text(json.dumps(record))
    assert "isn't a folder with a card" in refused("--finish", "check", "--update_card", "true")
    assert not (place / "check" / "check.json").exists()
    (place / "model" / "README.md").write_text("---\ntags: [microclip]\n---\n# A model\n\n## How it was made\n")
    for _ in range(2):
        run("--finish", "check", "--update_card", "true")
    card = (place / "model" / "README.md").read_text()
    assert card.count("## Did it help?") == 1 and card.count("Better: on these 120 photos") == 1
    assert card.index("## Did it help?") < card.index("## How it was made")
    (place / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.warns(UserWarning, match="isn't the model any more"):
        assert "leave its card as it is" in refused("--finish", "check", "--update_card", "true")


def test_the_card_has_no_advice(place, world):
    """Which names the folder on this machine."""
    (place / "model").mkdir()
    (place / "model" / "README.md").write_text("# A model\n")
    run("photos", *BOTH, "--output_dir", "check", "--num_labels", "40")
    record = json.loads((place / "check" / "draw.json").read_text())
    record["sources"]["adapted"] = "model"
    (place / "check" / "draw.json").write_text(json.dumps(record))
    fill(place / "check", world[1], limit=6)
    run("--finish", "check", "--update_card", "true")
    card = (place / "model" / "README.md").read_text()
    assert "Not decided: on these 120 photos" in card and "Label the 34" not in card


# The page


def test_the_page_shows_each_photo_and_hides_who_said_what(drawn, place):
    """Candidates are in an order that differs from photo to photo, agreed or not; nothing names a model's answer."""
    page = (drawn / "label.html").read_text()
    assert page.count("data:image/jpeg") == 40 and not re.search(r"\bCLIP\b|adapted", page)
    own = read_check(drawn)
    places = {}
    for file in own.drawn:
        names = own.candidates(file)
        label = own.tables["adapted"][file].label
        assert label in names and own.tables["clip"][file].label in names
        assert names == own.candidates(file)
        places.setdefault(len(names), set()).add(names.index(label))
    assert all(len(found) > 1 for number, found in places.items() if number > 1)
    order = [row[0] for row in rows_of(drawn)[1:]]
    assert sorted(order) == sorted(own.drawn) and order != own.drawn


def test_as_many_classes_are_shown_with_each_photo(place):
    """Four, those of both models among them, whether the models differ or not; others vary."""
    others = [f"other {index}" for index in range(6)]
    Path("names.txt").write_text("\n".join([*NAMES, *others]))
    run("photos", *BOTH, "--class_names", "names.txt", "--output_dir", "check")
    own = read_check("check")
    shown = {file: own.candidates(file) for file in own.drawn}
    assert {own.differs[file] for file in shown} == {True, False}
    for file, names in shown.items():
        assert len(set(names)) == 4 and names == read_check("check").candidates(file)
        assert {name for table in own.tables.values() for name in table[file].names[:2]} <= set(names)
    assert set(others) <= {name for names in shown.values() for name in names}


def test_the_page_escapes_and_describes(place):
    Path("descriptions.json").write_text(json.dumps({"red disc": ["<b>round</b> & red"]}))
    run("photos", *BOTH, "--descriptions", "descriptions.json", "--output_dir", "check")
    page = (place / "check" / "label.html").read_text()
    assert "&lt;b&gt;round&lt;/b&gt; &amp; red" in page and "<b>" not in page


def test_labelled_photos_leave_the_page(drawn, world):
    fill(drawn, world[1])
    run("--more", "5", "--output_dir", "check")
    assert (drawn / "label.html").read_text().count("data:image/jpeg") == 5


def test_tables_of_other_origin_are_left_alone(tmp_path):
    (tmp_path / "adapted.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"already holds adapted\.csv.* Move it away"):
        check_new_folder(tmp_path)
    assert (tmp_path / "adapted.csv").read_text() == "mine"
