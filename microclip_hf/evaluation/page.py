"""What an evaluation found, for people: tables in Markdown, a picture, and the folder that holds them."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..plots import plot_confusion
from .predictions import ANSWER, BASELINE, MAIN_WAYS, WAYS, Predictions, has_parts
from .results import COMPARISONS, classes_to_draw


RESULTS = "results.json"
PAGE = "results.md"
PICTURE = "confusion.png"
NUM_PAIRS = 20  # in the page; the JSON file holds all
COLUMNS = {
    "top5_accuracy": "top-5",
    "mean_class_accuracy": "mean per class",
    "expected_calibration_error": "calibration error",
}


def ways_table(report: Mapping[str, Any], show_all: bool = False) -> str:
    """The ways side by side, those of `MAIN_WAYS` or all, as a table in Markdown, and what its numbers are."""
    ways = {way: report["ways"][way] for way in _shown(report, show_all)}
    reference = BASELINE if BASELINE in ways else ANSWER
    title = ways[reference]["title"]
    rows = [["in percent", "top-1 (95 % interval)", f"against {title} (+ is better)", *COLUMNS.values()]]
    for way in ways.values():
        top1 = f"{_percent(way['accuracy'])} ({_span(way['accuracy_interval'], '.1f')})"
        rows.append([way["title"], top1, _gain(way, reference), *(_percent(way[name]) for name in COLUMNS)])
    note = "Intervals: 95 %, percentile bootstrap over images."
    if len(ways) == 1:  # there is nothing to compare it with
        return f"{markdown_table([row[:2] + row[3:] for row in rows])}\n\n{note}"
    return (
        f"{markdown_table(rows)}\n\nPlus and minus: percentage points of top-1 above and below {title}. Where their "
        f"interval holds 0, the difference may be chance. {note}"
    )


def _shown(report: Mapping[str, Any], show_all: bool) -> list[str]:
    return [way for way in report["ways"] if show_all or way in MAIN_WAYS]


def _gain(way: Mapping[str, Any], reference: str) -> str:
    """What a way gains over another, with the interval; a dash for that other."""
    name = COMPARISONS[reference]
    if name not in way:
        return "-"
    return f"{100 * way[name]:+.1f} ({_span(way[f'{name}_interval'], '+.1f')})"


def classes_table(report: Mapping[str, Any], ways: Sequence[str], limit: int | None = None) -> str:
    """Accuracy by class, as a table in Markdown, the worst of the model's answer first."""
    classes = sorted(report["classes"], key=lambda row: row["accuracy"][ANSWER])[:limit]
    head = ["top-1 in percent", "images", *(report["ways"][way]["title"] for way in ways)]
    rows = [[row["name"], str(row["images"]), *(_percent(row["accuracy"][way]) for way in ways)] for row in classes]
    return markdown_table([head, *rows])


def pairs_table(report: Mapping[str, Any], limit: int) -> str:
    """The most confused pairs, as a table in Markdown."""
    pairs = report["confused_pairs"][:limit]
    rows = [[pair["label"], pair["predicted"], str(pair["images"]), _percent(pair["share"])] for pair in pairs]
    return markdown_table([["true class", "taken for", "images", "of its images (%)"], *rows])


def describe_images(report: Mapping[str, Any]) -> str:
    """How many images were measured, and what was left out, in a sentence."""
    count = len(report["classes"])
    total = len(report["class_names"])
    which = f"all {total}" if count == total else f"{count} of the {total}"
    text = f"{report['num_images']} images of {which} classes"
    counts = {"unreadable": report["num_unreadable"], "without a label": report["num_unlabelled"]}
    left_out = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"{text}; left out: {left_out}." if left_out else f"{text}."


def describe_left_out(report: Mapping[str, Any], show_all: bool = False) -> str:
    """The ways, of `MAIN_WAYS` or all, that weren't computed, and those that aren't shown, a line each."""
    shown = WAYS if show_all else MAIN_WAYS
    lines = [f"- {WAYS[way]}: left out, {reason}" for way, reason in report["left_out"].items() if way in shown]
    hidden = "; ".join(way["title"] for name, way in report["ways"].items() if name not in shown)
    if hidden:
        lines.append(f"- in {RESULTS}, and here with --all: {hidden}")
    return "\n".join(lines)


def report_page(report: Mapping[str, Any], show_all: bool = False) -> str:
    """The report, with the ways of `MAIN_WAYS` or all, as a page in Markdown, which shows the picture beside it."""
    pairs = pairs_table(report, NUM_PAIRS) if report["confused_pairs"] else "No image was taken for another class."
    parts = [
        f"# {report['model']} on {report['dataset']}",
        describe_images(report),
        ways_table(report, show_all),
        describe_left_out(report, show_all),
        "The intervals cover other draws of such images, not other runs of training.",
        "## Classes",
        classes_table(report, _shown(report, show_all)),
        _without_images(report),
        f"## Most confused, by {report['ways'][ANSWER]['title']}",
        pairs,
        f"![Which classes are taken for which]({PICTURE})",
        "## How it was measured",
        "\n".join(f"- {name}: {value}" for name, value in {**report["settings"], **report["versions"]}.items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _without_images(report: Mapping[str, Any]) -> str:
    measured = {row["name"] for row in report["classes"]}
    names = [_cell(name) for name in report["class_names"] if name not in measured]
    return f"Without images: {', '.join(names)}." if names else ""


def check_results_dir(folder: str | os.PathLike, argument: str = "output_dir") -> None:
    """Refuse a folder that holds results, unless there are parts that say they aren't complete, is a file or has no
    name; `argument` is what the error calls it.
    """
    if not os.fspath(folder):
        raise ValueError(f"{argument} is empty; pass a folder, new or not.")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{argument} {folder} is a file; pass a folder, new or not.")
    earlier = [name for name in (RESULTS, PAGE, PICTURE) if os.path.exists(os.path.join(folder, name))]
    if earlier and not has_parts(folder):
        raise ValueError(f"{argument} {folder} already holds {', '.join(earlier)}; choose another folder.")


def write_results(
    folder: str | os.PathLike, report: Mapping[str, Any], predictions: Predictions, show_all: bool = False
) -> None:
    """Write a report by [`make_report`] as `results.json`, `results.md` and `confusion.png`, each as a whole.

    `show_all` makes `results.md` show all ways, not only those of `MAIN_WAYS`; `results.json` always has all.
    """
    predicted = predictions.logits[ANSWER].argmax(1)
    classes = classes_to_draw(predictions.labels, predicted)
    picture = io.BytesIO()
    plot_confusion(picture, predictions.labels, predicted, classes, report["class_names"])
    contents = {
        PICTURE: picture.getvalue(),
        PAGE: report_page(report, show_all),
        RESULTS: json.dumps(report, indent=2, ensure_ascii=False) + "\n",
    }
    # All are made before the first is written: an error in one leaves none.
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(Path(folder, name), content)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _span(interval: Sequence[float], form: str) -> str:
    return " to ".join(format(100 * value, form) for value in interval)


def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown. The first row is the head; columns are padded, so that it reads well in a terminal too."""
    rows = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
