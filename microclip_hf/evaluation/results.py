"""What an evaluation found: intervals, classes, confused pairs, as JSON, Markdown and a picture.

n images, C classes, W ways of predicting, R bootstrap resamples.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .. import __version__
from ..metrics import classification_metrics
from ..plots import plot_confusion
from .predictions import ANSWER, WAYS, Predictions


RESULTS, PAGE, PICTURE = "results.json", "results.md", "confusion.png"
RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
NUM_PAIRS = 20  # in the page; the JSON file holds all
MAX_SHOWN = 20  # classes in the picture


@dataclass(frozen=True)
class EvaluationFacts:
    """What was measured, for the report.

    Args:
        model (`str`): Hub id or folder.
        dataset (`str`): what the images are called.
        class_names (`Sequence[str]`): the C classes.
        titles (`Mapping[str, str]`): ways that are called otherwise than in `WAYS`.
        left_out (`Mapping[str, str]`): ways that weren't computed, and why.
        num_unlabelled (`int`): images without a label, which were left out.
        settings (`Mapping[str, Any]`): whatever else the numbers depend on.
    """

    model: str
    dataset: str
    class_names: Sequence[str]
    titles: Mapping[str, str]
    left_out: Mapping[str, str]
    num_unlabelled: int
    settings: Mapping[str, Any]


def bootstrap_accuracies(correct: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Accuracies of images drawn with replacement, the same images for every way.

    Accuracies depend only on how often each pattern of right and wrong is drawn, so that a draw of images is a
    multinomial draw of patterns.

    Args:
        correct (`np.ndarray` of shape `(num_images, num_ways)`): bool.
        resamples (`int`): R.
        seed (`int`): of the draws.

    Returns:
        `np.ndarray` of shape `(resamples, num_ways)`.
    """
    patterns, counts = np.unique(correct, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(correct), counts / len(correct), resamples)
    return draws @ patterns / len(correct)


def confused_pairs(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """`(true class, predicted class, images)` of all wrong predictions, the most frequent first.

    Args:
        labels, predicted (`np.ndarray` of shape `(num_images,)`): class indices.
    """
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(*pair, count) for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)]


def make_report(predictions: Predictions, facts: EvaluationFacts, seed: int = 0) -> dict[str, Any]:
    """All numbers, ready for JSON; accuracies are fractions, intervals hold 95 %.

    Args:
        predictions ([`Predictions`]): of every way, the model's answer among them.
        facts ([`EvaluationFacts`]): what was measured.
        seed (`int`): of the bootstrap.
    """
    labels, logits = predictions.labels, predictions.logits
    predicted = {way: own.argmax(1) for way, own in logits.items()}
    correct = np.stack([own == labels for own in predicted.values()], 1)
    drawn = bootstrap_accuracies(correct, seed=seed)
    answer = list(logits).index(ANSWER)
    ways = {}
    for place, (way, scores) in enumerate(logits.items()):
        ways[way] = {
            "title": facts.titles.get(way, WAYS[way]),
            **classification_metrics(scores, labels),
            "accuracy_interval": _interval(drawn[:, place]),
        }
        if way != ANSWER:
            ways[way]["difference"] = float(correct[:, place].mean() - correct[:, answer].mean())
            ways[way]["difference_interval"] = _interval(drawn[:, place] - drawn[:, answer])
    images = np.bincount(labels, minlength=len(facts.class_names))
    names = facts.class_names
    return {
        "model": facts.model,
        "dataset": facts.dataset,
        "num_images": len(labels),
        "num_unreadable": predictions.num_unreadable,
        "num_unlabelled": facts.num_unlabelled,
        "class_names": list(names),
        "ways": ways,
        "left_out": dict(facts.left_out),
        "classes": [
            {
                "name": names[index],
                "images": int(images[index]),
                "accuracy": {
                    way: float(own[labels == index].mean()) for way, own in zip(predicted, correct.T, strict=True)
                },
            }
            for index in images.nonzero()[0]
        ],
        "confused_pairs": [
            {"label": names[true], "predicted": names[other], "images": count, "share": count / int(images[true])}
            for true, other, count in confused_pairs(labels, predicted[ANSWER])
        ],
        "settings": {**facts.settings, "seed": seed, "resamples": RESAMPLES},
        "versions": {
            "microclip_hf": __version__,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        },
    }


def _interval(values: np.ndarray) -> list[float]:
    return np.percentile(values, PERCENTILES).tolist()


def ways_table(report: Mapping[str, Any]) -> str:
    """The ways side by side, as a table in Markdown, and what its numbers are."""
    columns = {"top5_accuracy": "top-5", "mean_class_accuracy": "mean per class"}
    columns["expected_calibration_error"] = "calibration error"
    rows = [["in percent", "top-1 (95 % interval)", "less the answer's", *columns.values()]]
    for own in report["ways"].values():
        difference = "-"
        if "difference" in own:
            difference = f"{100 * own['difference']:+.1f} ({_span(own['difference_interval'], '+.1f')})"
        top1 = f"{_percent(own['accuracy'])} ({_span(own['accuracy_interval'], '.1f')})"
        rows.append([own["title"], top1, difference, *(_percent(own[name]) for name in columns)])
    answer = report["ways"][ANSWER]["title"]
    return f"{_table(rows)}\n\nDifferences are to: {answer}. Intervals: 95 %, percentile bootstrap over images."


def classes_table(report: Mapping[str, Any], ways: Sequence[str], limit: int | None = None) -> str:
    """Accuracy by class, as a table in Markdown, the worst of the model's answer first."""
    classes = sorted(report["classes"], key=lambda own: own["accuracy"][ANSWER])[:limit]
    head = ["top-1 in percent", "images", *(report["ways"][way]["title"] for way in ways)]
    rows = [[own["name"], str(own["images"]), *(_percent(own["accuracy"][way]) for way in ways)] for own in classes]
    return _table([head, *rows])


def pairs_table(report: Mapping[str, Any], limit: int) -> str:
    """The most confused pairs, as a table in Markdown."""
    pairs = report["confused_pairs"][:limit]
    rows = [[own["label"], own["predicted"], str(own["images"]), _percent(own["share"])] for own in pairs]
    return _table([["true class", "taken for", "images", "of its images (%)"], *rows])


def describe_images(report: Mapping[str, Any]) -> str:
    """How many images were measured, and what was left out, in a sentence."""
    text = f"{report['num_images']} images of {len(report['classes'])} of {len(report['class_names'])} classes"
    left_out = [
        f"{report[key]} {words}"
        for key, words in (("num_unreadable", "unreadable"), ("num_unlabelled", "without a label"))
        if report[key]
    ]
    return f"{text}; left out: {' and '.join(left_out)}." if left_out else f"{text}."


def describe_left_out(report: Mapping[str, Any]) -> str:
    """The ways that weren't computed, a line each."""
    return "\n".join(f"- {WAYS[way]}: left out, {reason}" for way, reason in report["left_out"].items())


def report_page(report: Mapping[str, Any], picture: str | None = PICTURE) -> str:
    """The report as a page in Markdown; `picture` is the name of the picture beside it."""
    pairs = pairs_table(report, NUM_PAIRS) if report["confused_pairs"] else "No image was taken for another class."
    parts = [
        f"# {report['model']} on {report['dataset']}",
        describe_images(report),
        ways_table(report),
        describe_left_out(report),
        "They say how far another draw of such images might move a number, and nothing of another run of training.",
        "## Classes",
        classes_table(report, list(report["ways"])),
        _without_images(report),
        f"## Most confused, by {report['ways'][ANSWER]['title']}",
        pairs,
        f"![Which classes are taken for which]({picture})" if picture else "",
        "## How it was measured",
        "\n".join(f"- {name}: {value}" for name, value in {**report["settings"], **report["versions"]}.items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _without_images(report: Mapping[str, Any]) -> str:
    seen = {own["name"] for own in report["classes"]}
    names = [_cell(name) for name in report["class_names"] if name not in seen]
    return f"Without images: {', '.join(names)}." if names else ""


def check_output(folder: str | os.PathLike) -> None:
    """Refuse a folder that holds results.

    Raises:
        ValueError: if it does, is a file, or has no name.
    """
    if not os.fspath(folder):
        raise ValueError("--output_dir is empty; pass a folder, new or not.")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--output_dir {folder} is a file; pass a folder, new or not.")
    if found := [name for name in (RESULTS, PAGE, PICTURE) if os.path.exists(os.path.join(folder, name))]:
        raise ValueError(f"--output_dir {folder} already holds {', '.join(found)}; choose another folder.")


def write_report(folder: str | os.PathLike, report: Mapping[str, Any], predictions: Predictions) -> None:
    """Write `results.json`, `results.md` and `confusion.png`; no file is left half-written.

    Args:
        folder (`str` or `os.PathLike`): made where it doesn't exist.
        report: by [`make_report`].
        predictions ([`Predictions`]): for the picture.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = {name: folder / f"_{name}" for name in (PICTURE, PAGE, RESULTS)}
    text = {"encoding": "utf-8", "errors": "backslashreplace"}  # a folder's name may be any bytes
    labels, predicted = predictions.labels, predictions.logits[ANSWER].argmax(1)
    classes = shown_classes(labels, predicted)
    plot_confusion(incomplete[PICTURE], labels, predicted, classes, report["class_names"])
    incomplete[PAGE].write_text(report_page(report), **text)
    incomplete[RESULTS].write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", **text)
    for name, path in incomplete.items():
        path.replace(folder / name)


def shown_classes(labels: np.ndarray, predicted: np.ndarray) -> list[int]:
    """The classes of the most confused pairs, then others that have images."""
    pairs = confused_pairs(labels, predicted)
    ordered = [index for true, other, _ in pairs for index in (true, other)]
    return list(dict.fromkeys([*ordered, *np.unique(labels).tolist()]))[:MAX_SHOWN]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _span(interval: Sequence[float], form: str) -> str:
    return " to ".join(format(100 * value, form) for value in interval)


def _table(rows: list[list[str]]) -> str:
    """The first row is the head; columns are padded, so that it reads well in a terminal too."""
    rows = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
