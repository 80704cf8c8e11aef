"""The page about a run: what it says against a hand-made run, what it may not hold, and how it comes about."""

import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny_inputs
import torch
from accelerate import Accelerator
from adaptation import adapt as adapt_in_python
from adaptation import draw_images
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file

from microclip_hf.commands import adapt
from microclip_hf.commands import report as report_command
from microclip_hf.data.image_columns import image_names
from microclip_hf.data.sources import load_image_folder
from microclip_hf.prediction import find_photos
from microclip_hf.report.page import write_report
from microclip_hf.report.record import _name_images, read_record, write_record
from microclip_hf.report.thumbnails import truncate_left
from microclip_hf.training.diagnostics import Diagnostics


LIMIT = 5_000_000
VOID = {"meta", "link", "img", "source", "br", "wbr"}
STRANGE = ['<script>alert("1")</script>', "a & b, 'c' | $x^2$", "naïve Ω \u202eright to left", "{{ 7 * 7 }}"]


class Page(HTMLParser):
    """A page's text, tags and attributes; tags that aren't closed in their order are an error."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self._open = "", [], []
        self.feed(html)
        self.close()
        assert not self._open
        self.words = " ".join(self.text.replace("\x00", " ").split())  # also across tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "title"):
            self.text += f"{data}\x00"

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read_page(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(html.encode()) < LIMIT
    assert not re.search(r"https?://|//[a-z]", re.sub(r"data:[^\"]*", "", html))
    assert not page.all("script")
    for attrs in page.all("img"):
        assert attrs["src"].startswith("data:image/") and attrs["alt"] and int(attrs["width"]) and int(attrs["height"])
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in page.all("a")} <= ids
    assert page.all("th") and all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    return page


def write_csv(path, rows):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_run(folder, names, rows, swaps=(), history=(), noise=None, steps=9, **facts):
    """A run's folder by hand; `rows` are file, label, confidence, changes and perhaps the true class."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": list(history), "global_step": steps}))
    columns = ["file", "label", "confidence", "changes", "truth"][: len(rows[0])]
    write_csv(folder / "pseudo_labels.csv", [columns, *rows])
    write_csv(folder / "report" / "swaps.csv", [["old", "new", "count"], *swaps])
    facts = {
        "results": {},
        "settings": [["seed", "3"]],
        "versions": "torch 9",
        "finished": "today",
        "root": str(folder),
        **facts,
    }
    facts = {"model": "some/clip", "images": "photos", "num_images": len(rows), **facts}
    (folder / "report" / "run.json").write_text(json.dumps(facts))
    rng = np.random.default_rng(0)
    for file, *_ in rows if noise else ():
        Image.fromarray(rng.integers(0, 256, (noise, noise, 3), dtype=np.uint8)).save(folder / file)


HISTORY = [
    {"epoch": epoch, "loss": 2.0, "cross_entropy": 3.0 - epoch, "student_agreement": 0.5, "effective_classes": 1.8}
    | {"label_changes": 0.25, "pseudo_label_confidence": 0.625}
    for epoch in (0.5, 1.0, 1.5)
]


def test_what_the_page_says(tmp_path):
    """By hand: 6 images, one without a label; of 4 with a true class 2 are right."""
    rows = [
        ["a.png", "cat", 0.9, 0, "cat"],
        ["b.png", "cat", 0.2, 3, "dog"],
        ["c.png", "cat", 0.7, 1, "cat"],
        ["d.png", "dog", 0.4, 2, "fox"],
        ["e.png", "dog", 0.6, 0, ""],
        ["f.png", "", "", 0, "dog"],
    ]
    write_run(tmp_path, ["cat", "dog", "fox"], rows, [["cat", "dog", 2], ["dog", "cat", 5]], HISTORY, noise=40)
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert "Undecided: 25 % of the labels still change" in page.words
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", (tmp_path / "report.html").read_text()))
    assert facts == {
        "Images": "6",
        "Images without a label": "1",
        "Classes": "3",
        "Classes without an image": "1",
        "Epochs": "1.5",
        "Mean confidence at the end": "62\N{NO-BREAK SPACE}%",
        "Labels that still change": "25\N{NO-BREAK SPACE}%",
        "Effective classes at the end": "1.8",
    }
    assert "Without any image: fox ." in page.words
    alts = [attrs["alt"] for attrs in page.all("img")]
    changed = [alt for alt in alts if "change" in alt and "labelled" in alt]
    assert [alt.split(",")[0] for alt in changed] == ["b.png", "d.png", "c.png"]
    assert changed[-1].endswith(" 1 change, now 70\N{NO-BREAK SPACE}%")
    assert changed[1].endswith(" 2 changes, now 40\N{NO-BREAK SPACE}%")
    assert "Curve over epochs: cross entropy goes from 2.5 to 1.5." in alts
    assert sum("Curve over epochs" in alt for alt in alts) == 5
    start = page.words.index("Images of each class Look at the most")
    assert page.words.index("dog 2 images, 50 % on average") < page.words.index("cat 3 images, 60 % on average", start)
    assert "cat 90 % dog 60 % 2 5" in page.words  # a pair with the surest image of each, there and back
    assert "Pseudo-labels: 50.0 % of 4 are right" in page.words
    assert "dog 1 0 % cat (1) fox 1 0 % dog (1) cat 2 100 %" in page.words
    assert "seed 3" in page.words and "torch 9" in page.words and "some/clip" in page.words
    assert (tmp_path / "report" / "loss_light.png").exists() and (tmp_path / "report" / "loss_dark.png").exists()
    headings = re.findall(r"<h3>(.*?)</h3>", (tmp_path / "report.html").read_text())
    assert headings.index("Classes in use") < headings.index("Agreement")  # which says little without it


@pytest.mark.parametrize(
    ("truth", "results", "history", "known"),
    [
        ("", {}, HISTORY, "Without labels nobody can compute how good the adapted model is."),
        ("dog", {}, HISTORY, "Some images have true labels, so this page says how often the model is right ."),
        ("", {"adapted_accuracy": 0.5}, HISTORY, "this page says how often the model is right ."),
        ("", {}, [], "The run logged too little for curves."),
    ],
)
def test_the_page_begins_with_what_is_known(tmp_path, truth, results, history, known):
    write_run(tmp_path, ["cat", "dog"], [["a.png", "cat", 0.9, 0, truth]], (), history, results=results)
    write_report(tmp_path)
    page = read_page(tmp_path)
    opening = page.words[: page.words.index("pseudo-label")]
    assert known in opening
    assert ("Without labels" in opening) == (not truth and not results)
    has_curves = "Look at the classes in use first" in page.words
    assert has_curves == bool(history) and ("too little for curves" in opening) == (not history)


FREQUENCIES = {"cat": [0.25, 0.0312], "<b>dog</b>": [0.75, 0.04], "fox": [0.0, 0.0]}


def write_mixture_run(folder, swaps=(), history=(), changes=0, frequencies=FREQUENCIES, **facts):
    """A run's folder by hand, whose labels are a mixture's."""
    rows = [["a.png", name, confidence, changes] for name, confidence in zip(frequencies, (0.25, 1), strict=False)]
    facts["settings"] = list({"class_frequencies": "estimated", **facts.pop("settings", {})}.items())
    write_run(folder, [*frequencies], rows, swaps, history, frequencies=frequencies, absent=["fox"], **facts)
    write_report(folder)
    return read_page(folder)


def test_a_run_without_training(tmp_path):
    """Nothing on curves, nor on labels that change, which can't; the mean of both confidences, 0.25 and 1."""
    page = write_mixture_run(tmp_path, history=[{"epoch": 0, "effective_classes": 1.8}], steps=0)
    assert [attrs["href"] for attrs in page.all("a")] == ["#sizes", "#classes", "#settings"]
    assert {attrs["id"] for tag, attrs in page.tags if tag == "h2"} == {"sizes", "classes", "settings"}
    assert not any(words in page.words for words in ("logging_steps", "too little", "while it learned"))
    assert "Nothing was trained" in page.words and "Mean confidence at the end 62 %" in page.words
    assert page.words.count("A class mixture's probabilities are too sure") == 2  # where it is explained and used


def test_labels_that_were_made_once(tmp_path):
    """They can change once, from the first mixture to the last one, where training was kept; so the panels say."""
    history = [{name: value for name, value in entry.items() if name != "label_changes"} for entry in HISTORY]
    settings = {"label_refresh": "never"}
    page = write_mixture_run(tmp_path / "kept", [["cat", "fox", 1]], history, 1, settings=settings)
    assert "Each of these changed from the first mixture, before training, to the last one." in page.words
    assert "2 images changed their label. All are in" in page.words and "Classes that swap most often" in page.words
    assert "These labels were made once" in page.words and page.words.count("The labels were made once, so") == 2
    assert "Labels that still change" not in page.words and "if neither line moves" not in page.words
    history += [{"training_was_kept": 0.0, "epoch": 1.5}]
    page = write_mixture_run(tmp_path / "taken back", [], history, settings=settings)
    assert {"#changed", "#swaps"}.isdisjoint(attrs["href"] for attrs in page.all("a"))
    assert "#curves" in [attrs["href"] for attrs in page.all("a")]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("estimated", "as the mixture estimated it. It counts"),
        ("equal", "The mixture took all classes for equally frequent"),
        ("my <i>shares</i>.csv", "You gave the frequencies (class_frequencies: my <i>shares</i>.csv);"),
    ],
)
def test_frequencies_of_a_mixture(tmp_path, source, words):
    page = write_mixture_run(tmp_path, settings={"class_frequencies": source})
    assert words in page.words
    assert "<b>dog</b> 75.0 % ± 4.0 cat 25.0 % ± 3.1 fox (probably absent) 0.0 % ± 0.0" in page.words
    assert "are left out; all are in" not in page.words


def test_frequencies_of_many_classes(tmp_path):
    frequencies = {f"species {index}": [index / 4950, 0.01] for index in range(100)}
    page = write_mixture_run(tmp_path, frequencies=frequencies)
    assert "40 classes that are rarer are left out; all are in report/run.json" in page.words
    assert "species 99 2.0 % ± 1.0 species 98" in page.words and "species 40 0.8 %" in page.words
    assert "species 39 0.8 %" not in page.words


def test_file_names_keep_their_folder(tmp_path):
    """Below an image the folder and the name, whole where one points at it; of a long path the end."""
    long = f"{'deep/' * 40}sparrows/{'x' * 20}.png"
    rows = [["photos/a/b/sparrows/1.png", "cat", 0.9, 2], [long, "cat", 0.8, 1], ["b/2.png", "cat", 0.7, 1]]
    for file, *_ in rows[::2]:
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    write_run(tmp_path, ["cat"], rows, history=HISTORY)
    write_report(tmp_path)
    page = read_page(tmp_path)
    text = page.text.replace("\x00", "")
    assert "…/sparrows/1.png" in text and "b/2.png" in text and f"…/sparrows/{'x' * 20}.png" in text
    assert {attrs["title"] for attrs in page.all("img") if "title" in attrs} == {rows[0][0], "b/2.png"}
    assert truncate_left(long) == f"…{long[-79:]}" and truncate_left(long).endswith(f"sparrows/{'x' * 20}.png")


def test_names_may_hold_anything(tmp_path):
    rows = [[f"{index}<i>&\"'.png", name, 0.5, index, name] for index, name in enumerate(STRANGE)]
    rows += [["long", STRANGE[0], 0.1, 0, "x" * 3000], ["line\nbreak", "x" * 3000, 0.2, 1, ""]]
    names = [*STRANGE, "x" * 3000]
    write_run(tmp_path, names, rows, [[STRANGE[0], STRANGE[1], 1]], HISTORY, images="<b>bold</b>")
    assert [image.truth for image in read_record(tmp_path).images] == [row[4] for row in rows]
    write_report(tmp_path)
    page = read_page(tmp_path)
    for name in (*STRANGE, "<b>bold</b>", "2<i>&\"'.png"):
        assert name in page.text
    assert "x" * 100 not in page.text and not page.all("b") and not page.all("i")


def test_a_thousand_classes(tmp_path):
    """Photos that don't compress, and true labels that are mostly wrong: the page is still below its limit."""
    names = [f"species number {index}" for index in range(1000)]
    rows = [
        [f"{i % 50}.png", names[i % 1000], 0.3 + i % 7 / 10, i % 4, names[i * 7 % 1000]]
        for i in range(len(names) * 10)
    ]
    swaps = [[names[i], names[(i * 3 + 1) % 1000], i % 9 + 1] for i in range(1000)]
    write_run(tmp_path, names, rows[:50], swaps, HISTORY, noise=200)
    write_run(tmp_path, names, rows, swaps, HISTORY)
    write_report(tmp_path)
    page = read_page(tmp_path)
    left_out = int(re.search(r"(\d+) classes of which the model is surer are left out", page.words)[1])
    galleries = [attrs for attrs in page.all("details") if "gallery" in attrs["class"]]
    assert left_out == 1000 - len(galleries) and 20 <= len(galleries) <= 40
    assert ["open" in attrs for attrs in galleries] == [True] + [False] * (len(galleries) - 1)
    assert re.search(r"\d{3} pairs that swapped less often are left out", page.words)
    assert re.search(r"940 classes that are right more often are left out", page.words)


def test_what_is_not_there_is_left_out(tmp_path, capsys):
    """Images that were moved; an older run's folder; no folder of a run at all."""
    write_run(tmp_path / "moved", ["cat", "dog"], [["a.png", "cat", 0.9, 1]], [["dog", "cat", 1]], HISTORY)
    (tmp_path / "moved" / "report.html").write_text("with pictures")
    report_command.main([str(tmp_path / "moved")])
    assert (tmp_path / "moved" / "report-earlier.html").read_text() == "with pictures"
    page = read_page(tmp_path / "moved")
    assert "1 of the images to show can't be read" in page.words and "left out" in page.words
    for name in ("pseudo_labels.csv", "report/swaps.csv", "report/run.json"):
        (tmp_path / "moved" / name).unlink()
    report_command.main([str(tmp_path / "moved")])
    page = Page((tmp_path / "moved" / "report.html").read_text())
    assert "This run knows no label of single images" in page.words
    with pytest.raises(SystemExit, match=r"holds no trainer_state\.json; pass the --output_dir"):
        report_command.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        report_command.main([str(tmp_path / "moved"), "--color"])
    assert "There is no setting --color" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file;label\n", "begins with 'file;label'; expected 'file,label,confidence,changes'"),
        ("file,label,confidence,changes\na,b\n", "isn't as the run wrote it: row 1 has 2 values for 4 columns"),
        ("file,label,confidence,changes\na,b,high,0\n", "isn't as the run wrote it"),
        ("file,label,confidence,changes\na,fox,0.5,0\n", "isn't as the run wrote it: 'fox' are no classes"),
        (f"file,label,confidence,changes\n{'a' * 200_000},cat,0.5,0\n", "field larger than"),
        ({"trainer_state.json": {}}, "isn't as the run left it: KeyError.'log_history'"),
        ({"trainer_state.json": {"log_history": None}}, "isn't as the run left it"),
        ({"trainer_state.json": {"log_history": []}}, "isn't as the run left it: KeyError.'global_step'"),
        ({"config.json": []}, "config.json holds a list"),
        ({"config.json": {"id2label": {"a": "b"}}}, "isn't as the run left it"),
        ({"report/run.json": {"results": {}}}, "run.json lacks finished, images, "),
        ({"report/run.json": {"results": {"adapted_accuracy": "high"}}}, "isn't as the run left it"),
    ],
)
def test_files_that_were_changed(tmp_path, text, message):
    write_run(tmp_path, ["cat", "dog"], [["a.png", "cat", 0.9, 0]])
    for name, content in ({"pseudo_labels.csv": text} if isinstance(text, str) else text).items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        report_command.main([str(tmp_path)])


def test_diagnostics_remember_each_image(tmp_path):
    accelerator, diagnostics = Accelerator(cpu=True), Diagnostics(4)
    for labels, index, confidences in (
        ([0, 1, 2], [3, 0, 1], [0.5, 0.25, 0.75]),
        ([1, 1, 2], [3, 0, 1], [0.1, 0.2, 0.3]),
        ([0, 3], [3, 1], [0.6, 0.7]),
        ([1, 1], [3, 3], [0.8, 0.9]),  # in place of an unreadable one the same image comes twice: one change
    ):
        diagnostics.record_labels(torch.tensor(labels), torch.tensor(index), torch.tensor(confidences))
        diagnostics.flush(accelerator)
    assert diagnostics.pseudo_labels.tolist() == [1, 3, -1, 1]
    assert diagnostics.changes.tolist() == [0, 1, 0, 3]
    assert diagnostics.confidences[[0, 1, 3]].tolist() == pytest.approx([0.2, 0.7, 0.9])
    assert math.isnan(diagnostics.confidences[2])
    assert diagnostics.swaps.tolist() == [[0, 1, 2], [1, 0, 1], [2, 3, 1]]
    save_file(diagnostics.state_dict(), tmp_path / "state.safetensors")
    resumed = Diagnostics(4)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for own in (diagnostics, resumed):
        own.record_labels(torch.tensor([0, 2]), torch.tensor([3, 2]), torch.tensor([0.5, 0.5]))
        own.flush(accelerator)
        assert own.swaps.tolist() == [[0, 1, 2], [1, 0, 2], [2, 3, 1]]
        assert own.changes.tolist() == [0, 1, 0, 4] and own.confidences.tolist() == diagnostics.confidences.tolist()
    earlier = Diagnostics(4)
    earlier.load_state_dict({"pseudo_labels": torch.tensor([1, 0], dtype=torch.int32)})
    earlier.record_labels(torch.tensor([2]), torch.tensor([0]))
    earlier.flush(accelerator)
    assert earlier.changes.tolist() == [1, 0] and earlier.swaps.tolist() == [[1, 2, 1]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_inputs.write_inputs(folder)
    (folder / "photos" / "0.png").write_bytes(b"no image")
    return folder


def run(inputs, output, **options):
    options = {
        "model_name_or_path": inputs / "clip",
        "train_dir": inputs / "photos",
        "class_names": inputs / "names.txt",
        "output_dir": output,
        "config_overrides": '{"prior_weighting": "uniform"}',
        "num_train_epochs": 2,
        "num_crops": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    adapt.main([text for name, value in options.items() for text in (f"--{name}", str(value))])


@pytest.mark.filterwarnings("ignore:1 of 49 images can't be read")
def test_a_run_writes_its_labels_and_its_report(inputs, tmp_path, monkeypatch, capsys):
    """Each photo has its row; the unreadable one has no label. The command writes the page anew from anywhere. It says
    at its end how good the model is and what to open; its CLIP can be found from anywhere too."""
    monkeypatch.chdir(inputs)
    options = {"model_name_or_path": "clip", "train_dir": "photos", "test_dir": "test"}
    run(inputs, tmp_path / "out", logging_steps=1, **options)
    accuracies = {name: f"{100 * value:.1f} %" for name, value in read_record(tmp_path / "out").results.items()}
    line = "Right on the test images: names {zero_shot_accuracy} -> adapted {adapted_accuracy}\n".format(**accuracies)
    output = capsys.readouterr().out
    assert output.count(line) == 1
    assert f"{tmp_path / 'out' / 'adaptation.png'}, {tmp_path / 'out' / 'report.html'}\n" in output
    record = read_record(tmp_path / "out")
    assert [image.file for image in record.images] == sorted(p.name for p in (inputs / "photos").iterdir())
    assert [image.file for image in record.images] == list(find_photos(["photos"]))  # as `predict` calls them
    assert [image.file for image in record.tests] == list(find_photos(["test"]))
    assert record.images[0].label == "" and math.isnan(record.images[0].confidence)
    assert all(image.label in tiny_inputs.DESCRIPTIONS for image in record.images[1:])
    assert all(1 / 3 < image.confidence < 1 and image.changes <= 1 for image in record.images[1:])
    assert sum(image.changes for image in record.images) == sum(count for _, _, count in record.swaps)
    right = np.mean([image.label == image.truth for image in record.tests])
    assert right == pytest.approx(record.results["adapted_accuracy"]) and len(record.tests) == 12
    page = read_page(tmp_path / "out")
    assert f"Test images: {100 * right:.1f} % of 12 are right" in page.words and "can't be read" not in page.words
    assert record.facts["model"] == str(inputs / "clip")
    settings = dict(record.facts["settings"])
    assert settings["num_train_epochs"] == "2.0" and settings["prior_weighting"] == "uniform"
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "out" / "report.html").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    report_command.main(["out"])
    assert (tmp_path / "out" / "report.html").read_bytes() == before


@pytest.mark.filterwarnings("ignore:1 of 49 images can't be read")
def test_a_run_that_goes_on_keeps_nothing_of_before(inputs, tmp_path):
    """Test images of the first part, whose last batch was dropped, don't count for the second, which has none."""
    batches = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "dataloader_drop_last": "true"}
    options = {"train_dir": inputs / "photos", **batches}
    run(inputs, tmp_path, test_dir=inputs / "test", num_train_epochs=1, **options)
    assert len(read_record(tmp_path).tests) == 8
    assert "Accuracy on the test images" in read_page(tmp_path).words
    run(inputs, tmp_path, num_train_epochs=2, resume_from_checkpoint="true", **options)
    record = read_record(tmp_path)
    assert not record.tests and not record.results and record.images[1].label
    assert "Accuracy on the test images" not in read_page(tmp_path).words


@pytest.mark.filterwarnings("ignore:1 of 49 images can't be read")
def test_a_report_that_fails_loses_nothing(inputs, tmp_path, monkeypatch, capsys):
    run(inputs, tmp_path / "without", report="false", num_train_epochs=1)
    assert (tmp_path / "without" / "pseudo_labels.csv").exists()
    assert not (tmp_path / "without" / "report.html").exists()

    def fail(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr("microclip_hf.training.run.write_report", fail)
    with pytest.warns(UserWarning, match="The run is saved, but not its report: .*no room"):
        run(inputs, tmp_path / "out", num_train_epochs=1)
    assert "says of the first image" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "README.md").exists()


def test_other_data_sets(clip_folder, tmp_path):
    """Images in memory with labels have no names but truths; views without numbers leave curves alone."""
    trainer = adapt_in_python(clip_folder, tmp_path / "memory", draw_images().cast_column("image", ImageFeature()))
    trainer.save_model()
    trainer.save_state()
    write_record(trainer)
    write_report(tmp_path / "memory", trainer.train_dataset)
    record = read_record(tmp_path / "memory")
    assert {image.file for image in record.images} == {""} and record.facts["root"] is None
    names = list(tiny_inputs.DESCRIPTIONS)
    assert [image.truth for image in record.images] == [names[label] for label in draw_images()["label"]]
    accuracies = [entry for entry in record.log_history if "pseudo_label_accuracy" in entry]
    page = read_page(tmp_path / "memory")
    assert accuracies and "Pseudo-labels that are right" in page.words and "can't be read" not in page.words
    report_command.main([str(tmp_path / "memory")])
    assert "can't be read (moved, or not files of their own)" in read_page(tmp_path / "memory").words

    views = [{"weak": view, "strong": view} for view in torch.zeros(8, 3, 32, 32, dtype=torch.uint8)]
    trainer = adapt_in_python(clip_folder, tmp_path / "views", views)
    trainer.save_model()
    trainer.save_state()
    write_record(trainer)
    write_report(tmp_path / "views", trainer.train_dataset)
    assert not (tmp_path / "views" / "pseudo_labels.csv").exists()
    page = read_page(tmp_path / "views")
    assert "This run knows no label of single images" in page.words and "Agreement" in page.words
    headings = ["Class balance", "Images whose label changed", "Classes that swap", "Images of each class"]
    assert not any(heading in page.words for heading in headings)


def test_files_are_called_by_their_place_in_the_folder_of_images(tmp_path, monkeypatch):
    """Whether that is named from here or not; files that lie elsewhere, too, keep all their names as given."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/only/b.png", "photos/only/c/a.png", "other/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)
    inside = load_image_folder("photos", None)
    for source in ("photos", "./photos/", str(tmp_path / "photos")):
        assert _name_images(inside, source) == (["only/b.png", "only/c/a.png"], str(tmp_path / "photos"))
    given = ["photos/only/b.png", "photos/only/c/a.png", "other/d.png"]
    both = Dataset.from_dict({"image": given}).cast_column("image", ImageFeature())
    assert _name_images(both, "photos") == _name_images(both, "user/photos") == (given, str(tmp_path))
    assert _name_images(inside, None) == (given[:2], str(tmp_path))
    assert _name_images(draw_images(3), "photos") == (["", "", ""], None)


def test_files_of_a_selection_in_its_order(tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(5)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())
    assert image_names(dataset.select([4, 1])) == ([paths[4], paths[1]], True)
    assert image_names(draw_images(3)) == (["", "", ""], False)
    assert image_names([{"image": None}]) == ([], False)
