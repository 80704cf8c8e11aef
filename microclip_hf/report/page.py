"""A page about a finished run, for somebody without labels, who has to look: curves, images, classes that swap.

One HTML file that needs nothing but itself: no network, no script. Its size is limited, whatever the number of images
and classes.
"""

import base64
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
from PIL import Image

from ..evaluation.results import confused_pairs, shown_classes
from ..files import write_whole
from ..hub.model_card import METHODS
from ..images import UNREADABLE, decode, to_rgb
from ..plots import plot_class_sizes, plot_confusion, plot_curves
from ..training.view_datasets import ViewDataset
from .record import LABELS, REPORT, REPORT_DIR, ImageLabel, RunRecord, read_record


EARLIER = "report-earlier.html"
TEMPLATE = Path(__file__).with_name("report_template.html")
# Most and least confident images of a class; classes; images that changed; pairs of classes, and those with images.
NUM_EACH, NUM_CLASSES, NUM_CHANGED, NUM_PAIRS, NUM_SHOWN_PAIRS = 4, 40, 24, 20, 8
# Rows of tables; names in a sentence; characters of a name.
NUM_ROWS, NUM_NAMES, NAME_LENGTH = 60, 20, 80
# Thumbnails: their longer side in pixels, JPEG's quality, and bytes of all of them, in base64.
SIDE, QUALITY, THUMBNAIL_BYTES = 128, 72, 3_000_000
CURVES = (
    (
        "loss",
        "Loss",
        ("cross_entropy", "fairness"),
        "loss",
        "Look for lines that fall and then level off. Jumps say that the steps were too large: lower learning_rate. "
        "Fairness that rises says that fewer classes are in use.",
    ),
    (
        "agreement",
        "Agreement",
        ("student_agreement", "head_agreement"),
        "share of images",
        "Look for lines that rise. The student sees strongly distorted views, so it usually stays below 1; the "
        "heads should agree ever more often. If neither moves, the model learned little.",
    ),
    (
        "confidence",
        "Confidence",
        ("pseudo_label_confidence",),
        "mean probability",
        "Look for a calm line. High confidence doesn't mean right: compare it with the images below. A jump to 1, "
        "while fewer classes are in use, is a collapse.",
    ),
    (
        "label_changes",
        "Labels that change",
        ("label_changes",),
        "share of images",
        "Look for a line that falls towards 0. If many labels still change at the end, more epochs may help; the "
        "first epoch has no earlier labels to compare with.",
    ),
    (
        "balance",
        "Classes in use",
        ("effective_classes",),
        "effective classes",
        "Look for a line that stays near the number of classes that your photos really show. The dashed line is the "
        "number of class names. A line that sinks says that the model gives up classes.",
    ),
)
ACCURACY_CURVE = (
    "pseudo_label_accuracy",
    "Pseudo-labels that are right",
    ("pseudo_label_accuracy",),
    "share of labelled images",
    "Look for a line that rises. If it falls while confidence rises, the model confirms its own mistakes.",
)


def write_report(folder: str | os.PathLike, dataset: Any = None) -> int:
    """Write `report.html`, and its curves as PNGs in `report/`, from what a run left in its folder.

    Args:
        folder (`str` or `os.PathLike`): the run's output folder, after [`~run_record.write_record`].
        dataset (*optional*): the trainer's `train_dataset`. Default: images are read from their files, where they
            still are. Where some aren't, a page that is there already is kept as `report-earlier.html`.

    Returns:
        `int`: how many of the images that it would show couldn't be read.

    Raises:
        ValueError: if the folder is no run's.
    """
    folder = Path(folder)
    record = read_record(folder)
    thumbnails = Thumbnails(record.images, _reader(dataset) if dataset is not None else partial(_open, record))
    (folder / REPORT_DIR).mkdir(exist_ok=True)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "name": shorten}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=os.path.basename(os.path.abspath(folder)),
        record=record,
        overview=_overview(record),
        curves=[_curve(folder / REPORT_DIR, record, *curve) for curve in CURVES if _is_known(record, curve)],
        accuracy_curve=_curve(folder / REPORT_DIR, record, *ACCURACY_CURVE)
        if _is_known(record, ACCURACY_CURVE)
        else None,
        sizes=_class_sizes(folder / REPORT_DIR, record),
        changed=_changed(record.images, thumbnails),
        swaps=_swaps(record, thumbnails),
        classes=_classes(record, thumbnails),
        accuracies=[(title, record.results[name]) for name, title in METHODS.items() if name in record.results],
        measured=[
            _measured(folder / REPORT_DIR, name, labels, record.class_names)
            for name, labels in (("test images", record.tests), ("pseudo-labels", record.images))
            if any(image.truth and image.label for image in labels)
        ],
        num_missing=len(thumbnails.missing),
        files={"labels": LABELS, "folder": REPORT_DIR},
    )
    if thumbnails.missing and (folder / REPORT).exists() and not (folder / EARLIER).exists():
        (folder / REPORT).replace(folder / EARLIER)
    write_whole(folder / REPORT, page)
    return len(thumbnails.missing)


class Thumbnails:
    """Small JPEGs of images, as data URIs, as long as there is room for them.

    Args:
        images (`Sequence[ImageLabel]`): all of a run.
        read: gives the PIL image of an index, or raises one of `UNREADABLE`.
    """

    def __init__(self, images: Sequence[ImageLabel], read: Callable[[int], Image.Image]) -> None:
        self.images, self._read = images, read
        self.room, self.missing = THUMBNAIL_BYTES, set()

    def show(self, index: int, note: str | None = None) -> dict[str, Any]:
        """One image for the page: its address, `None` where it can't be read, and what to write below it."""
        image = self.images[index]
        name = shorten(os.path.basename(image.file) or f"image {index}")
        shown = {"uri": None, "name": name, "note": note or _percent(image.confidence), "label": image.label}
        try:
            picture = to_rgb(self._read(index)).copy()
        except UNREADABLE:
            self.missing.add(index)
            return shown
        picture.thumbnail((SIDE, SIDE))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=QUALITY)
        uri = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        self.room -= len(uri)
        return {**shown, "uri": uri, "width": picture.width, "height": picture.height}


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """A name that fits."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _reader(dataset: Any) -> Callable[[int], Image.Image]:
    """Reads a trainer's images."""
    own = dataset.dataset if isinstance(dataset, ViewDataset) else None
    if isinstance(own, datasets.Dataset) and isinstance(own.features.get("image"), datasets.Image):
        own = own.cast_column("image", datasets.Image(decode=False))

    def read(index: int) -> Image.Image:
        if own is None:
            raise ValueError("these are views, or a stream")
        stored = own[index]["image"]
        image = decode(stored, lazy=True)
        return _drafted(image) if isinstance(stored, dict) else image

    return read


def _open(record: RunRecord, index: int) -> Image.Image:
    """An image from its file."""
    root, file = record.facts.get("root"), record.images[index].file
    if root is None or not file:
        raise FileNotFoundError(file)
    return _drafted(Image.open(os.path.join(root, file)))


def _drafted(image: Image.Image) -> Image.Image:
    """A file just opened; a JPEG of many megapixels will be decoded at a fraction of them."""
    image.draft("RGB", (2 * SIDE, 2 * SIDE))
    return image


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{100 * share:.0f} %"


def _overview(record: RunRecord) -> list[tuple[str, str]]:
    """What there is to know at a glance."""
    labelled = [image for image in record.images if image.label]
    last = {name: value for entry in record.log_history for name, value in entry.items()}
    rows = [("Images", f"{len(record.images) or record.facts.get('num_images') or 'unknown'}")]
    if record.images:
        rows.append(("Images without a label", f"{len(record.images) - len(labelled)}"))
    rows.append(("Classes", f"{len(record.class_names)}"))
    if labelled:
        rows.append(("Classes without an image", f"{len(set(record.class_names) - {own.label for own in labelled})}"))
    rows.append(("Epochs", f"{last.get('epoch', 0):g}"))
    for name, title, form in (
        ("pseudo_label_confidence", "Mean confidence at the end", _percent),
        ("label_changes", "Labels that still change", _percent),
        ("effective_classes", "Effective classes at the end", "{:.1f}".format),
    ):
        if name in last:
            rows.append((title, form(last[name])))
    return rows


def _is_known(record: RunRecord, curve: Sequence[Any]) -> bool:
    return any(name in entry for entry in record.log_history for name in curve[2])


def _curve(
    folder: Path, record: RunRecord, key: str, title: str, names: Sequence[str], label: str, advice: str
) -> dict[str, Any]:
    """A curve in both colour schemes, and what it shows in words."""
    limits = {"limit": len(record.class_names) if key == "balance" else None, "from_zero": key != "loss"}
    parts = []
    for name in names:
        values = [entry[name] for entry in record.log_history if name in entry]
        if values:
            parts.append(f"{name.replace('_', ' ')} goes from {values[0]:.3g} to {values[-1]:.3g}")
    draw = partial(plot_curves, log_history=record.log_history, names=names, label=label, **limits)
    return {
        "title": title,
        "advice": advice,
        "alt": f"Curve over epochs: {', '.join(parts)}.",
        **_both(folder, key, draw),
    }


def _both(folder: Path, key: str, draw: Callable[..., None]) -> dict[str, str]:
    """A picture for light and for dark pages: PNGs in the folder, and data URIs."""
    uris = {}
    for scheme in ("light", "dark"):
        content = io.BytesIO()
        draw(content, dark=scheme == "dark")
        write_whole(folder / f"{key}_{scheme}.png", content.getvalue())
        uris[scheme] = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return uris


def _class_sizes(folder: Path, record: RunRecord) -> dict[str, Any] | None:
    """How many images each class has; the largest classes, the smallest, and those without any."""
    counts = Counter({name: 0 for name in record.class_names})
    counts.update(image.label for image in record.images if image.label)
    if not counts.total():
        return None
    ordered = counts.most_common()
    used = [(name, count) for name, count in ordered if count]
    unused = [name for name, count in ordered if not count]
    largest, smallest = used[:5], used[5:][-5:]
    return {
        "largest": largest,
        "smallest": smallest,
        "unused": unused[:NUM_NAMES],
        "num_more_unused": max(0, len(unused) - NUM_NAMES),
        "alt": f"Images of each class, from {ordered[0][1]} in the largest to {ordered[-1][1]} in the smallest; "
        f"{counts.total() / len(counts):.1f} on average.",
        **_both(folder, "class_sizes", partial(plot_class_sizes, sizes=list(counts.values()))),
    }


def _changed(images: Sequence[ImageLabel], thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The images whose label changed most often, the least confident first."""
    moved = [index for index, image in enumerate(images) if image.changes]
    if not moved:
        return None
    moved.sort(key=lambda index: (-images[index].changes, images[index].confidence, index))
    shown = [
        thumbnails.show(index, f"{images[index].changes} changes, now {_percent(images[index].confidence)}")
        for index in moved[:NUM_CHANGED]
    ]
    return {"shown": shown, "num": len(moved), "num_left_out": max(0, len(moved) - NUM_CHANGED)}


def _swaps(record: RunRecord, thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The pairs of classes that most images went to and fro between, with the surest image of each."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for old, new, count in record.swaps:
        counts[(old, new)] += count
    pairs = {tuple(sorted(pair)) for pair in counts}
    rows = [(one, other, counts.get((one, other), 0), counts.get((other, one), 0)) for one, other in pairs]
    if not rows:
        return None
    rows.sort(key=lambda row: (-row[2] - row[3], row))
    surest: dict[str, int] = {}
    for index, image in enumerate(record.images):
        best = surest.get(image.label)
        if image.label and (best is None or image.confidence > record.images[best].confidence):
            surest[image.label] = index
    shown = [
        {
            "pair": row,
            "images": [thumbnails.show(surest[name]) if name in surest else None for name in row[:2]]
            if position < NUM_SHOWN_PAIRS
            else [],
        }
        for position, row in enumerate(rows[:NUM_PAIRS])
    ]
    return {"rows": shown, "num_left_out": max(0, len(rows) - NUM_PAIRS)}


def _classes(record: RunRecord, thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The most and the least confident images of each class, the least sure classes first."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, image in enumerate(record.images):
        if image.label and not math.isnan(image.confidence):
            members[image.label].append(index)
    if not members:
        return None
    confidences = {name: np.mean([record.images[i].confidence for i in own]) for name, own in members.items()}
    shown = []
    for name in sorted(members, key=lambda name: (confidences[name], name)):
        if len(shown) == NUM_CLASSES or thumbnails.room <= 0:
            break
        own = sorted(members[name], key=lambda index: (-record.images[index].confidence, index))
        most, least = own[:NUM_EACH], own[NUM_EACH:][: -NUM_EACH - 1 : -1]
        shown.append(
            {
                "name": name,
                "count": len(own),
                "confidence": float(confidences[name]),
                "most": [thumbnails.show(index) for index in most],
                "least": [thumbnails.show(index) for index in least],
            }
        )
    return {"shown": shown, "num_left_out": len(members) - len(shown)}


def _measured(folder: Path, kind: str, images: Sequence[ImageLabel], class_names: Sequence[str]) -> dict[str, Any]:
    """How labels compare with true ones: of all images, of each class, and which classes are taken for which."""
    position = {name: index for index, name in enumerate(class_names)}
    pairs = [(position[own.truth], position[own.label]) for own in images if own.truth and own.label]
    truths, labels = np.array(pairs).T
    confused = confused_pairs(truths, labels)
    mistakes = {}
    for true, other, count in confused:
        mistakes.setdefault(true, (class_names[other], count))
    numbers = np.bincount(truths, minlength=len(class_names))
    right = np.bincount(truths[truths == labels], minlength=len(class_names))
    present = np.flatnonzero(numbers)
    rows = [
        (class_names[i], int(numbers[i]), right[i] / numbers[i], mistakes.get(i))
        for i in sorted(present.tolist(), key=lambda i: (right[i] / numbers[i], class_names[i]))
    ]
    shown = shown_classes(truths, labels)
    content = io.BytesIO()
    plot_confusion(content, truths, labels, shown, [shorten(name, 30) for name in class_names])
    width, height = Image.open(content).size
    write_whole(folder / f"confusion_{kind.replace(' ', '_')}.png", content.getvalue())
    return {
        "kind": kind,
        "num": len(pairs),
        "accuracy": float((truths == labels).mean()),
        "rows": rows[:NUM_ROWS],
        "num_rows_left_out": max(0, len(rows) - NUM_ROWS),
        "pairs": [(class_names[true], class_names[other], count) for true, other, count in confused[:NUM_PAIRS]],
        "picture": f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}",
        "width": width,
        "height": height,
        "num_confusion_left_out": max(0, len(present) - len(shown)),
    }
