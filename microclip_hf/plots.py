"""Pictures of adaptation runs and evaluations, for people who would rather look."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.path import Path

from .data.labels import is_known
from .explain.explanation import Explanation
from .files import whole_file
from .fonts import readable
from .run_names import SHORT_ACCURACIES


LINE_TITLES = {
    "cross_entropy": "cross-entropy",
    "fairness": "fairness",
    "student_agreement": "student agrees with pseudo-label",
    "head_agreement": "both heads agree",
    "label_changes": "pseudo-label changed",
    "pseudo_label_accuracy": "pseudo-label is right",
    "pseudo_label_confidence": "pseudo-label's probability",
    "effective_classes": "classes in use",
}
SUMMARY_PANELS = (
    (("cross_entropy", "fairness"), "loss"),
    (("student_agreement", "head_agreement", "label_changes", "pseudo_label_accuracy"), "share of images"),
)
TOO_FEW_POINTS = "Fewer than 2 values were logged.\nLower logging_steps for a curve."
# Of images: the side of a patch in pixels, and how light it is if it isn't salient.
PATCH_SIDE = 32
DIMMED = 0.4
# Of a prediction: its colour, told apart by any eye, and its sign's lines on a disc of that colour, from -1 to 1.
SIGNS = {
    True: ("#0b62b8", ([(-0.9, 0), (-0.3, -0.6), (0.9, 0.6)],)),
    False: ("#c2410c", ([(-0.7, -0.7), (0.7, 0.7)], [(-0.7, 0.7), (0.7, -0.7)])),
}
# Text and lines of single pictures, which have no background of their own.
INK = {False: "#22252a", True: "#e4e6ea"}
HUES = {False: ("#0b62b8", "#b8500b", "#2b7a37", "#8a3fa0"), True: ("#6cb2ff", "#ffa95e", "#7fd18b", "#d79bea")}


def plot_adaptation(
    path: str | os.PathLike,
    log_history: Sequence[dict[str, float]] | None,
    accuracies: dict[str, float],
    before: Sequence[Explanation] = (),
    after: Sequence[Explanation] = (),
    labels: Sequence[int | None] = (),
) -> None:
    """Draw a PNG of the curves of a run, its accuracies (fractions by the names in `ACCURACIES`), and a few images.

    Of the images it shows what [`explain`] says by the model before and after: what isn't salient is dimmed, and the
    predicted class has a tick on blue or a cross on orange, right or wrong, where `labels` holds the true class index
    (not -1 or `None`). Where nothing was trained, `log_history` is `None`, and there are no curves; where then nothing
    else is to be shown, there is no file.
    """
    panels = [] if log_history is None else _choose_panels(log_history)
    heights = {title: 100 * accuracies[name] for name, title in SHORT_ACCURACIES.items() if name in accuracies}
    num_panels = len(panels) + bool(heights)
    parts = [2.8] * bool(num_panels) + [4.2] * bool(before)  # inches
    if not parts:
        return
    figure = Figure(figsize=(max(12, 1.7 * len(before)), sum(parts)), layout="constrained")
    subfigures = figure.subfigures(len(parts), 1, height_ratios=parts, squeeze=False)[:, 0]
    axes = subfigures[0].subplots(1, num_panels, squeeze=False)[0] if num_panels else []
    for position, (names, label) in enumerate(panels):
        _plot_curves(axes[position], log_history, names, label)
    if heights:
        axes[-1].bar_label(axes[-1].bar(list(heights), list(heights.values())), fmt="%.1f")
        axes[-1].set(ylabel="test accuracy (%)", ylim=(0, 100))
    if before:
        _plot_images(subfigures[-1], before, after, labels or [None] * len(before))
    with whole_file(path) as incomplete:
        figure.savefig(incomplete, format="png", dpi=100)


def _choose_panels(log_history: Sequence[dict[str, float]]) -> Sequence[tuple[tuple[str, ...], str]]:
    """Those of which anything was logged, or else the first, which says that nothing was."""
    logged = set().union(*log_history)
    return [panel for panel in SUMMARY_PANELS if not logged.isdisjoint(panel[0])] or SUMMARY_PANELS[:1]


def plot_curves(
    path: str | os.PathLike,
    log_history: Sequence[dict[str, float]],
    names: Sequence[str],
    label: str,
    dark: bool = False,
    limit: float | None = None,
    from_zero: bool = False,
) -> None:
    """Draw one panel of curves, `names` of `LINE_TITLES`, as a PNG, large enough for a phone, on a transparent ground.

    The vertical axis is called `label` and begins at 0 where `from_zero`; a dashed line is at `limit`, the most that
    is possible. `dark` says whether the page is.
    """
    with _single_picture(path, dark) as axes:
        if not _plot_curves(axes, log_history, names, label):
            return
        if limit is not None:
            axes.axhline(limit, color=INK[dark], linestyle="--", linewidth=1)
        if from_zero:
            axes.set_ylim(bottom=0)


def plot_class_sizes(path: str | os.PathLike, sizes: Sequence[int], dark: bool = False) -> None:
    """Draw how many images each class has, the largest first; a dashed line is where all would have equally many."""
    with _single_picture(path, dark) as axes:
        axes.fill_between(np.arange(len(sizes) + 1) + 0.5, [*sorted(sizes, reverse=True), 0], step="post", linewidth=0)
        axes.axhline(sum(sizes) / len(sizes), color=INK[dark], linestyle="--", linewidth=1)
        axes.set(xlabel="classes, the largest first", ylabel="images", xlim=(0.5, len(sizes) + 0.5), ylim=(0, None))


@contextlib.contextmanager
def _single_picture(path: str | os.PathLike, dark: bool) -> Iterator[Axes]:
    settings = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[dark]
    )
    settings |= {"axes.prop_cycle": cycler(color=HUES[dark])}
    settings |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        yield figure.subplots()
        figure.savefig(path, format="png", dpi=200, transparent=True)


def plot_confusion(
    path: str | os.PathLike, labels: np.ndarray, predicted: np.ndarray, classes: Sequence[int], names: Sequence[str]
) -> None:
    """Draw which classes are taken for which: rows are the true classes, numbers count images.

    Of the class indices `labels` and `predicted`, both `(num_images,)`, those in `classes` are shown; images that are
    taken for another are counted in a last column. `names` are of all classes.
    """
    columns = [*(predicted == index for index in classes), ~np.isin(predicted, classes)]
    counts = np.array([[np.sum((labels == row) & column) for column in columns] for row in classes])
    texts, style = readable(names)
    titles = [*(texts[index] for index in classes), "others"]
    # A class that others are taken for may have no images itself.
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.45 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), titles, rotation=90, fontsize=8, **style)
    axes.set_yticks(range(len(classes)), titles[:-1], fontsize=8, **style)
    axes.set(xlabel="predicted", ylabel="true")
    for row, column in zip(*counts.nonzero(), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(picture, label="images of the true class (%)", shrink=0.6)
    figure.savefig(path, format="png", dpi=100)


def plot_check(
    path: str | os.PathLike,
    accuracies: Mapping[str, Mapping[str, float] | None],
    difference: Mapping[str, float],
) -> None:
    """Draw a PNG of accuracies by their titles, and of their difference, each with its interval.

    Each is a fraction, as `value`, `low` and `high`; an accuracy that isn't known is left out.
    """
    known = {title: estimate for title, estimate in accuracies.items() if estimate is not None}
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, estimate in enumerate(known.values()):
        _plot_interval(left, row, estimate, HUES[False][row])
    texts = [f"{title}\n{_describe_interval(estimate, '.1f')}" for title, estimate in known.items()]
    left.set_yticks(range(len(known)), texts)
    left.set(xlabel="right (%)", xlim=(0, 100), ylim=(len(known) - 0.5, -0.5))
    _plot_interval(right, 0, difference, HUES[False][2])
    right.axvline(0, color=INK[False], linestyle="--", linewidth=1)
    right.set_yticks([])
    right.set_title(f"adapted less CLIP: {_describe_interval(difference, '+.1f')}", fontsize=10)
    right.set(xlabel="points; above 0, adapting helped", ylim=(-1, 1))
    with whole_file(path) as incomplete:
        figure.savefig(incomplete, format="png", dpi=100)


def _plot_interval(axes: Axes, row: int, estimate: Mapping[str, float], color: str) -> None:
    axes.plot([100 * estimate["low"], 100 * estimate["high"]], [row, row], color=color, linewidth=2)
    axes.plot([100 * estimate["value"]], [row], "o", color=color, markersize=8)


def _describe_interval(estimate: Mapping[str, float], form: str) -> str:
    value, low, high = (format(100 * estimate[name], form) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _plot_images(
    figure: SubFigure, before: Sequence[Explanation], after: Sequence[Explanation], labels: Sequence[int | None]
) -> None:
    texts, style = readable(before[0].class_names)
    rows = figure.subplots(2, len(labels), squeeze=False)
    for row, title, explanations in zip(rows, ("before", "after"), (before, after), strict=True):
        row[0].set_ylabel(title)
        for axes, explanation, label in zip(row, explanations, labels, strict=True):
            predicted = int(explanation.scores.argmax())
            axes.imshow(_draw_salient(explanation))
            axes.set(xticks=[], yticks=[])
            axes.set_title(texts[predicted], fontsize=8, **style)
            if is_known(label):
                _mark(axes, predicted == label)


def _mark(axes: Axes, is_right: bool) -> None:
    """A tick or a cross in the corner, of lines, since not every font has such letters."""
    color, lines = SIGNS[is_right]
    axes.title.set_color(color)
    place = ([0.91], [0.91])
    settings = {"linestyle": "none", "transform": axes.transAxes, "markeredgecolor": "white"}
    axes.plot(*place, marker="o", markersize=15, markerfacecolor=color, **settings)
    for line in lines:
        axes.plot(*place, marker=Path(line), markersize=8, markeredgewidth=2, fillstyle="none", **settings)


def _draw_salient(explanation: Explanation) -> np.ndarray:
    """What the model saw of the picture, in a size fit for print; patches that aren't salient are dimmed."""
    rows, columns = explanation.grid.shape
    left, top, right, bottom = explanation.grid.box
    # Small before it is dimmed: a photo may have many megapixels.
    seen = explanation.image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    seen = seen.resize((columns * PATCH_SIDE, rows * PATCH_SIDE))
    light = np.where(explanation.saliency_mask, 1, DIMMED).repeat(PATCH_SIDE, 0).repeat(PATCH_SIDE, 1)
    return (np.asarray(seen) * light[..., None]).astype(np.uint8)


def _plot_curves(axes: Axes, log_history: Sequence[dict[str, float]], names: Sequence[str], label: str) -> bool:
    """Whether there was anything to draw; if not, the panel says why it is empty."""
    curves = {name: [(entry["epoch"], entry[name]) for entry in log_history if name in entry] for name in names}
    if max(map(len, curves.values())) < 2:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"{label}:\n{TOO_FEW_POINTS}", ha="center", va="center", transform=axes.transAxes)
        return False
    for name, points in curves.items():
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), label=LINE_TITLES[name])
    axes.set(xlabel="epoch", ylabel=label)
    # Above the curves, which it would hide.
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    axes.legend(frameon=False, fontsize=8, ncols=2, handlelength=1.2, columnspacing=1, **place)
    return True
