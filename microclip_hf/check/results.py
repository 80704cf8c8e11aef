"""What a check found: numbers, a verdict in a sentence, a page in Markdown and a picture."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..evaluation.page import markdown_table
from ..files import write_whole
from ..plots import plot_check
from .estimates import Comparison, Estimate, compare
from .folder import MODELS, PAGE, Check
from .labels import NO_CLASS, read_labels, read_rows


RESULTS = "check.json"
RESULTS_PAGE = "check.md"
PICTURE = "check.png"
MORE = 40  # labels to add where nothing is decided

Status = Literal["better", "worse", "equal", "not decided"]


def measure(check: Check) -> dict[str, Any]:
    """All numbers, ready for JSON; accuracies and differences are fractions.

    Raises:
        ValueError: if the table of labels isn't as it should be (see [`~labels.read_labels`]), or has too few.
    """
    labels = read_labels(check.labels, check.record.class_names, set(check.drawn))
    if not labels:
        raise ValueError(f"{check.labels} has no label yet; label its photos, which {PAGE} shows.")
    right = check.predicted(list(labels)) == np.array(list(labels.values()))[:, None]
    strata_of = dict(zip(check.record.order, check.record.strata, strict=True))
    strata = np.array([strata_of[file] for file in labels])
    differs = np.array(check.record.differs)
    sizes = np.bincount(check.record.strata, minlength=len(differs))
    found = compare(right, strata, differs, sizes)
    counts = {"photos_on_which_they_differ": int(sizes[differs].sum()), **_count(check, labels)}
    status = judge(found.difference)
    return {
        "status": status,
        "sentence": describe(status, found.difference, counts, check),
        "advice": advise(status, counts, check),
        **counts,
        "difference": asdict(found.difference),
        **{name: _as_dict(found, index) for index, name in enumerate(MODELS)},
        "strata": _describe_strata(check, right, strata, sizes),
        "titles": check.titles,
        "models": check.record.sources,
        "seed": check.record.seed,
        "microclip_hf": __version__,
    }


def _count(check: Check, labels: Mapping[str, int]) -> dict[str, int]:
    """How many photos there are, and labels of every kind."""
    rows = read_rows(check.labels)
    num_unknown = sum(bool(row[1].strip()) and row[0] not in labels for row in rows)
    return {
        "photos": len(check.record.order),
        "photos_left_out": check.record.num_left_out,
        "drawn": len(check.drawn),
        "labelled": len(labels),
        "unknown": num_unknown,
        "without_label": len(check.drawn) - len(labels) - num_unknown,
        "rows_missing": len(check.drawn) - len(rows),
        "none_of_these": sum(label == NO_CLASS for label in labels.values()),
    }


def _as_dict(found: Comparison, index: int) -> dict[str, float] | None:
    estimate = found.accuracies[index]
    return None if estimate is None else asdict(estimate)


def _describe_strata(check: Check, right: np.ndarray, strata: np.ndarray, sizes: np.ndarray) -> list[dict[str, Any]]:
    """Of each stratum its photos, those drawn with what probability, and what their labels say."""
    drawn = np.bincount(check.record.strata[: check.record.num_drawn], minlength=len(sizes))
    rows = []
    for stratum, differs in enumerate(check.record.differs):
        own = right[strata == stratum]
        rows.append(
            {
                "models_differ": differs,
                "photos": int(sizes[stratum]),
                "drawn": int(drawn[stratum]),
                "probability": float(drawn[stratum] / sizes[stratum]),
                "labelled": len(own),
                "clip_right": int(own[:, 0].sum()),
                "adapted_right": int(own[:, 1].sum()),
            }
        )
    return rows


def judge(difference: Estimate) -> Status:
    """What an interval decides."""
    if difference.low > 0:
        return "better"
    if difference.high < 0:
        return "worse"
    return "equal" if difference.low == difference.high else "not decided"


def describe(status: Status, difference: Estimate, counts: Mapping[str, int], check: Check) -> str:
    """The verdict in a sentence."""
    photos = f"on these {counts['photos']} photos"
    if status == "equal":
        return f"Equal: {photos} both are right equally often."
    side = "above" if difference.value >= 0 else "below"
    if difference.low == difference.high:
        certainty = "exactly, since all photos on which they differ have labels; other photos may differ more or less"
    else:
        certainty = f"95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return (
        f"{status.capitalize()}: {photos} the adapted model is {100 * abs(difference.value):.1f} points {side} "
        f"{check.titles['clip']} ({certainty})."
    )


def advise(status: Status, counts: Mapping[str, int], check: Check) -> str:
    """What to do where nothing is decided; it names the check's folder."""
    if status != "not decided":
        return ""
    more = min(MORE, len(check.record.order) - len(check.drawn))
    if counts["without_label"]:
        return f"Label the {counts['without_label']} drawn photos that have no label yet."
    if any(check.record.differs[stratum] for stratum in check.record.strata[len(check.drawn) :]):
        return f"Label {more} more: microclip check --more {more} --output_dir {check.folder}."
    return "All photos on which they differ were drawn; labels of those that are unknown would be needed."


def told(results: Mapping[str, Any]) -> str:
    """The verdict, and what to do."""
    return f"{results['sentence']} {results['advice']}".rstrip()


def accuracies_table(results: Mapping[str, Any]) -> str:
    """Both accuracies and their difference, as a table in Markdown."""
    rows = [
        ["in percent", "right", "95 % interval"],
        *([results["titles"][name], *_cells(results[name], ".1f")] for name in MODELS),
        ["the second less the first, in points", *_cells(results["difference"], "+.1f")],
    ]
    return markdown_table(rows)


def results_page(results: Mapping[str, Any]) -> str:
    """The results as a page in Markdown, which shows the picture beside it."""
    strata = [["models", "photos", "drawn", "probability", "labelled", "CLIP right", "adapted right"]]
    for row in results["strata"]:
        numbers = [row["photos"], row["drawn"], f"{row['probability']:.3f}", row["labelled"]]
        kind = "differ" if row["models_differ"] else "agree"
        strata.append([kind, *map(str, [*numbers, row["clip_right"], row["adapted_right"]])])
    models = "\n".join(f"- {results['titles'][name]}: {source}" for name, source in results["models"].items())
    parts = [
        "# Did it help?",
        told(results),
        accuracies_table(results),
        describe_labels(results),
        f"![Both accuracies, and their difference, with intervals]({PICTURE})",
        "## How it was measured",
        "The photos to label were drawn at random, most of them from those on which the models differ, in strata by "
        "how much surer one model is than the other. Each label counts for as many photos as its stratum has for each "
        "label. The labels only measured.",
        markdown_table(strata),
        f"{models}\n- seed: {results['seed']}\n- microclip_hf: {results['microclip_hf']}",
    ]
    return "\n\n".join(parts) + "\n"


def _cells(estimate: Mapping[str, float] | None, form: str) -> list[str]:
    if estimate is None:
        return ["unknown", "no photo on which they agree has a label"]
    value, low, high = (format(100 * estimate[name], form) for name in ("value", "low", "high"))
    return [value, f"{low} to {high}"]


def describe_labels(results: Mapping[str, Any]) -> str:
    """How many labels there are, and what was left out, in sentences."""
    text = (
        f"{results['labelled']} of {results['drawn']} drawn photos have a label, of {results['photos']} photos; the "
        f"models differ on {results['photos_on_which_they_differ']}."
    )
    num_missing = results["without_label"] + results["unknown"]
    if num_missing:
        text += (
            f" The {num_missing} others ({results['unknown']} unknown, {results['without_label']} without a label) "
            "count as not drawn: if these are unlike the rest, the intervals don't know of it."
        )
    if results["rows_missing"]:
        text += f" Rows of {results['rows_missing']} of them are missing."
    if results["none_of_these"]:
        text += f" Photos that show none of the classes, so that both models are wrong: {results['none_of_these']}."
    if results["photos_left_out"]:
        text += f" Left out, since they can't be read: {results['photos_left_out']}."
    return text


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `check.json`, `check.md` and `check.png`, each as a whole."""
    accuracies = {results["titles"][name]: results[name] for name in MODELS}
    plot_check(folder / PICTURE, accuracies, results["difference"])
    write_whole(folder / RESULTS_PAGE, results_page(results))
    write_whole(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
