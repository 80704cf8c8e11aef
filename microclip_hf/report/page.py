"""A page about a finished run, for somebody without labels, who has to look: curves, images, classes that swap.

One HTML file, without network or script, of limited size whatever the number of images and classes.
"""

import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..evaluation.results import classes_to_draw, confused_pairs
from ..files import write_whole
from ..plots import plot_class_sizes, plot_confusion, plot_curves
from ..run_names import ACCURACIES, FACTS, LABELS, REPORT, REPORT_DIR
from ..verdict import Verdict, judge
from .record import ImageLabel, RunRecord, read_record
from .templates import load_template
from .thumbnails import Thumbnails, data_uri, percent, truncate


EARLIER = "report-earlier.html"
TEMPLATE = Path(__file__).with_name("report_template.html")
NUM_EACH = 4  # most, and least, confident images of a class
NUM_CLASSES = 40  # whose images are shown
NUM_CHANGED = 24  # images that changed
NUM_PAIRS = 20  # of classes
NUM_PAIRS_WITH_IMAGES = 8
NUM_ROWS = 60  # of tables
NUM_NAMES = 20  # in a sentence
AXIS_NAME_LENGTH = 30  # in characters


class Panel(NamedTuple):
    """A picture of curves, to which the template adds a title and what to look for."""

    key: str
    names: tuple[str, ...]
    axis: str


PANELS = (
    Panel("balance", ("effective_classes",), "effective classes"),  # first, since it tells what the others mean
    Panel("loss", ("cross_entropy", "fairness"), "loss"),
    Panel("agreement", ("student_agreement", "head_agreement"), "share of images"),
    Panel("confidence", ("pseudo_label_confidence",), "mean probability"),
    Panel("label_changes", ("label_changes",), "share of images"),
)
ACCURACY_PANEL = Panel("pseudo_label_accuracy", ("pseudo_label_accuracy",), "share of labelled images")


def write_report(folder: str | os.PathLike, dataset: Any = None) -> int:
    """Write `report.html`, and its curves as PNGs in `report/`, from what a run left in its folder.

    Args:
        folder (`str` or `os.PathLike`): the run's output folder, after [`write_record`].
        dataset (*optional*): the trainer's `train_dataset`. Default: images are read from their files, where they
            still are. Where some aren't, a page that is there already is kept as `report-earlier.html`.

    Returns:
        `int`: how many of the images that it would show couldn't be read.

    Raises:
        ValueError: if the folder is no run's.
    """
    folder = Path(folder)
    record = read_record(folder)
    thumbnails = Thumbnails(record, dataset)
    pictures = folder / REPORT_DIR
    pictures.mkdir(exist_ok=True)
    page = load_template(TEMPLATE).render(
        title=os.path.basename(os.path.abspath(folder)),
        record=record,
        verdict=_judge(record),
        overview=_list_facts(record),
        curves=list(filter(None, (_draw_panel(pictures, record, panel) for panel in PANELS))),
        accuracy_curve=_draw_panel(pictures, record, ACCURACY_PANEL),
        sizes=_count_classes(pictures, record),
        frequencies=_list_frequencies(record),
        changed=_show_changed(record.images, thumbnails),
        swaps=_show_swaps(record, thumbnails),
        classes=_show_classes(record.images, thumbnails),
        accuracies=[(title, record.results[name]) for name, title in ACCURACIES.items() if name in record.results],
        measured=_measure_labels(pictures, record),
        num_missing=len(thumbnails.missing),
        files={"labels": LABELS, "folder": REPORT_DIR, "facts": FACTS},
        check={"model": os.fspath(folder), "clip": record.facts.get("model") or "CLIP"},
    )
    # A page that shows more than can be shown now isn't lost; of several the first.
    if thumbnails.missing and (folder / REPORT).exists() and not (folder / EARLIER).exists():
        (folder / REPORT).replace(folder / EARLIER)
    write_whole(folder / REPORT, page)
    return len(thumbnails.missing)


def _judge(record: RunRecord) -> Verdict:
    counts = Counter(image.label for image in record.images)
    return judge(
        record.class_names,
        [counts[name] for name in record.class_names],
        record.log_history,
        record.results,
        record.facts.get("undescribed", ()),
    )


def _list_facts(record: RunRecord) -> list[tuple[str, str]]:
    labels = [image.label for image in record.images if image.label]
    last = {name: value for entry in record.log_history for name, value in entry.items()}
    facts = {"Images": len(record.images) or record.facts.get("num_images") or "unknown"}
    if record.images:
        facts["Images without a label"] = len(record.images) - len(labels)
    facts["Classes"] = len(record.class_names)
    if labels:
        facts["Classes without an image"] = len(set(record.class_names) - set(labels))
    if record.facts.get("absent"):
        facts["Probably absent"] = ", ".join(record.facts["absent"])
    facts["Epochs"] = f"{last.get('epoch', 0):g}"
    if record.has_mixture and record.images:  # which the mixture labels anew at the end
        confidences = [image.confidence for image in record.images if image.label]
        facts["Mean confidence at the end"] = percent(float(np.mean(confidences or [math.nan])))
    elif "pseudo_label_confidence" in last:
        facts["Mean confidence at the end"] = percent(last["pseudo_label_confidence"])
    if "label_changes" in last:
        facts["Labels that still change"] = percent(last["label_changes"])
    if "effective_classes" in last:
        facts["Effective classes at the end"] = f"{last['effective_classes']:.1f}"
    return [(title, str(value)) for title, value in facts.items()]


def _draw_panel(folder: Path, record: RunRecord, panel: Panel) -> dict[str, Any] | None:
    """A curve in both colour schemes, and what it shows in words; `None` where too little of it was logged."""
    parts = []
    for name in panel.names:
        values = [entry[name] for entry in record.log_history if name in entry]
        if len(values) > 1:
            parts.append(f"{name.replace('_', ' ')} goes from {values[0]:.3g} to {values[-1]:.3g}")
    if not parts:
        return None
    draw = partial(
        plot_curves,
        log_history=record.log_history,
        names=panel.names,
        label=panel.axis,
        limit=len(record.class_names) if panel.key == "balance" else None,
        from_zero=panel.key != "loss",
    )
    alt = f"Curve over epochs: {', '.join(parts)}."
    return {"key": panel.key, "alt": alt, **_draw_both(folder / panel.key, draw)}


def _draw_both(path: Path, draw: Callable[..., None]) -> dict[str, str]:
    """A picture for light and for dark pages: PNGs whose names begin with `path`, and data URIs."""
    return {
        scheme: _draw(Path(f"{path}_{scheme}.png"), partial(draw, dark=scheme == "dark"))
        for scheme in ("light", "dark")
    }


def _draw(path: Path, draw: Callable[[io.BytesIO], None]) -> str:
    """A PNG, written and as a data URI."""
    content = io.BytesIO()
    draw(content)
    write_whole(path, content.getvalue())
    return data_uri(content.getvalue(), "png")


def _count_classes(folder: Path, record: RunRecord) -> dict[str, Any] | None:
    """How many images each class has; the largest classes, the smallest, and those without any."""
    counts = Counter(dict.fromkeys(record.class_names, 0))
    counts.update(image.label for image in record.images if image.label)
    if not counts.total():
        return None
    ordered = counts.most_common()
    used = [(name, count) for name, count in ordered if count]
    unused = [name for name, count in ordered if not count]
    return {
        "largest": used[:5],
        "smallest": used[5:][-5:],
        "unused": unused[:NUM_NAMES],
        "num_more_unused": max(0, len(unused) - NUM_NAMES),
        "alt": f"Images of each class, from {ordered[0][1]} in the largest to {ordered[-1][1]} in the smallest; "
        f"{counts.total() / len(counts):.1f} on average.",
        **_draw_both(folder / "class_sizes", partial(plot_class_sizes, sizes=list(counts.values()))),
    }


def _list_frequencies(record: RunRecord) -> dict[str, Any] | None:
    """The share that the mixture gives each class, with its standard error, the largest first."""
    if not record.has_mixture:
        return None
    shares = record.facts["frequencies"]
    rows = [(name, *shares[name]) for name in sorted(shares, key=lambda name: (-shares[name][0], name))]
    return {
        "rows": rows[:NUM_ROWS],
        "num_left_out": max(0, len(rows) - NUM_ROWS),
        "source": record.settings.get("class_frequencies"),
    }


def _show_changed(images: Sequence[ImageLabel], thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The images whose label changed most often, the least confident first."""
    changed = [index for index, image in enumerate(images) if image.changes]
    if not changed:
        return None
    changed.sort(key=lambda index: (-images[index].changes, images[index].confidence, index))
    entries = [
        thumbnails.show(index, f"{_count_changes(images[index])}, now {percent(images[index].confidence)}")
        for index in changed[:NUM_CHANGED]
    ]
    return {"shown": entries, "num": len(changed), "num_left_out": max(0, len(changed) - NUM_CHANGED)}


def _count_changes(image: ImageLabel) -> str:
    return "1 change" if image.changes == 1 else f"{image.changes} changes"


def _show_swaps(record: RunRecord, thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The pairs of classes that most images went to and fro between, with the surest image of each."""
    counts: Counter[tuple[str, str]] = Counter()
    for old, new, count in record.swaps:
        counts[old, new] += count
    pairs = {tuple(sorted(pair)) for pair in counts}
    if not pairs:
        return None
    rows = [(one, other, counts[one, other], counts[other, one]) for one, other in pairs]
    rows.sort(key=lambda row: (-row[2] - row[3], row))
    surest: dict[str, int] = {}
    for index, image in enumerate(record.images):
        best = surest.get(image.label)
        if image.label and (best is None or image.confidence > record.images[best].confidence):
            surest[image.label] = index
    entries = []
    for position, row in enumerate(rows[:NUM_PAIRS]):
        names = row[:2] if position < NUM_PAIRS_WITH_IMAGES else ()
        images = [thumbnails.show(surest[name]) if name in surest else None for name in names]
        entries.append({"pair": row, "images": images})
    return {"rows": entries, "num_left_out": max(0, len(rows) - NUM_PAIRS)}


def _show_classes(images: Sequence[ImageLabel], thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The most and the least confident images of each class, the least sure classes first."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        if image.label and not math.isnan(image.confidence):
            members[image.label].append(index)
    if not members:
        return None
    means = {name: float(np.mean([images[index].confidence for index in members[name]])) for name in members}
    entries = []
    for name in sorted(members, key=lambda name: (means[name], name)):
        # Once the room is used up: each class is shown whole, so that the page is a little larger at most.
        if len(entries) == NUM_CLASSES or thumbnails.room <= 0:
            break
        surest = sorted(members[name], key=lambda index: (-images[index].confidence, index))
        least = surest[NUM_EACH:][-NUM_EACH:]
        entries.append(
            {
                "name": name,
                "count": len(surest),
                "confidence": means[name],
                "most": [thumbnails.show(index) for index in surest[:NUM_EACH]],
                "least": [thumbnails.show(index) for index in reversed(least)],
            }
        )
    return {"shown": entries, "num_left_out": len(members) - len(entries)}


def _measure_labels(folder: Path, record: RunRecord) -> list[dict[str, Any]]:
    """How labels compare with true ones, of test images and of those adapted to, where both are known."""
    parts = []
    for kind, images in (("test images", record.tests), ("pseudo-labels", record.images)):
        labelled = [image for image in images if image.truth and image.label]
        if labelled:
            parts.append(_measure_part(folder, kind, labelled, record.class_names))
    return parts


def _measure_part(folder: Path, kind: str, images: Sequence[ImageLabel], class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of all images, of each class, and which classes are taken for which."""
    position = {name: index for index, name in enumerate(class_names)}
    truths = np.array([position[image.truth] for image in images])
    labels = np.array([position[image.label] for image in images])
    pairs = [(class_names[true], class_names[other], count) for true, other, count in confused_pairs(truths, labels)]
    mistakes: dict[str, tuple[str, int]] = {}
    for true, other, count in pairs:
        mistakes.setdefault(true, (other, count))
    rows = []
    for index in np.unique(truths):
        right = labels[truths == index] == index
        rows.append((class_names[index], len(right), right.mean(), mistakes.get(class_names[index])))
    rows.sort(key=lambda row: (row[2], row[0]))
    classes = classes_to_draw(truths, labels)
    names = [truncate(name, AXIS_NAME_LENGTH) for name in class_names]
    path = folder / f"confusion_{kind.replace(' ', '_')}.png"
    picture = _draw(path, partial(plot_confusion, labels=truths, predicted=labels, classes=classes, names=names))
    width, height = Image.open(path).size
    return {
        "kind": kind,
        "num": len(images),
        "accuracy": float((truths == labels).mean()),
        "rows": rows[:NUM_ROWS],
        "num_rows_left_out": max(0, len(rows) - NUM_ROWS),
        "pairs": pairs[:NUM_PAIRS],
        "picture": picture,
        "width": width,
        "height": height,
        "num_confusion_left_out": max(0, len(rows) - len(classes)),
    }
