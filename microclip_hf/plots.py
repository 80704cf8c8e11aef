"""Pictures of adaptation runs and evaluations, for people who would rather look."""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from .data.labels import is_known
from .fonts import readable
from .modeling_microclip import MicroCLIPForImageClassification
from .preparation import Preparation
from .training.view_datasets import ViewCollator


CURVES = {
    "cross_entropy": "cross-entropy",
    "fairness": "fairness",
    "student_agreement": "student agrees with pseudo-label",
    "head_agreement": "both heads agree",
    "label_changes": "pseudo-label changed",
    "pseudo_label_accuracy": "pseudo-label is right",
    "pseudo_label_confidence": "pseudo-label's probability",
    "effective_classes": "classes in use",
}
PANELS = (
    (("cross_entropy", "fairness"), "loss"),
    (("student_agreement", "head_agreement", "label_changes", "pseudo_label_accuracy"), "share of images"),
)
BARS = {"zero_shot_accuracy": "names", "cupl_accuracy": "descriptions", "adapted_accuracy": "adapted"}


# Text and lines of single pictures, which have no background of their own.
INK = {False: "#22252a", True: "#e4e6ea"}
HUES = {False: ("#0b62b8", "#b8500b", "#2b7a37", "#8a3fa0"), True: ("#6cb2ff", "#ffa95e", "#7fd18b", "#d79bea")}


@dataclass(frozen=True)
class Snapshot:
    """What a model says of a few images.

    Args:
        images (`torch.Tensor` of shape `(num_images, height, width, 3)`): as the model sees them, in [0, 1].
        saliency (`torch.Tensor` of shape `(num_images, height, width)`): True where a patch is salient.
        labels (`list[str]`): the predicted class names.
        truths (`list[str | None]`): the true ones, where known.
        class_names (`list[str]`): of all classes.
    """

    images: torch.Tensor
    saliency: torch.Tensor
    labels: list[str]
    truths: list[str | None]
    class_names: list[str]


@torch.no_grad()
def snapshot(model: MicroCLIPForImageClassification, examples: Iterable[dict[str, Any]]) -> Snapshot:
    """Predict a few images.

    Args:
        model ([`MicroCLIPForImageClassification`]): with its image processor.
        examples: dictionaries with a PIL `image` and perhaps a `label`, an index, -1 or `None`.
    """
    examples, training = list(examples), model.training
    labels = [example.get("label") for example in examples]
    processor, names = model.image_processor, model.config.id2label
    pixel_values = ViewCollator(processor)(examples)["pixel_values"]
    output = model.eval()(pixel_values.to(model.device), output_patch_embeds=True)
    model.train(training)
    side = model.config.clip_config.vision_config.patch_size
    rows = pixel_values.shape[2] // side
    mask = output.saliency_mask.cpu().unflatten(1, (rows, -1))
    preparation = Preparation.of(processor, model.config.clip_config.vision_config.image_size)
    return Snapshot(
        images=preparation.denormalize(pixel_values).clamp(0, 1).permute(0, 2, 3, 1),
        saliency=mask.repeat_interleave(side, 1).repeat_interleave(side, 2),
        labels=[names[index] for index in output.logits.argmax(-1).tolist()],
        truths=[names[label] if is_known(label) else None for label in labels],
        class_names=[names[index] for index in range(model.config.num_labels)],
    )


def plot_adaptation(
    path: str | os.PathLike,
    log_history: Sequence[dict[str, float]],
    accuracies: dict[str, float],
    before: Snapshot | None = None,
    after: Snapshot | None = None,
) -> None:
    """Draw the curves of a run, its accuracies, and a few images before and after; what isn't salient is dimmed.

    Args:
        path (`str` or `os.PathLike`): the PNG to write.
        log_history: the Trainer's.
        accuracies (`dict[str, float]`): fractions by name, perhaps none.
        before, after ([`Snapshot`], *optional*): the same images, predicted by the model before and after.
    """
    columns = len(before.labels) if before and after else 0
    figure = Figure(figsize=(max(12, 1.7 * columns), 7 if columns else 3), layout="constrained")
    above = figure.subfigures(2, 1, height_ratios=(2, 3))[0] if columns else figure
    panels = [
        functools.partial(_plot_curves, log_history=log_history, names=names, label=label)
        for names, label in PANELS
        if any(name in entry for entry in log_history for name in names)
    ]
    if heights := {BARS[name]: 100 * accuracies[name] for name in BARS if name in accuracies}:
        panels.append(functools.partial(_plot_accuracies, heights=heights))
    for axes, draw in zip(above.subplots(1, max(1, len(panels)), squeeze=False).flat, panels, strict=False):
        draw(axes)
    if columns:
        _plot_images(figure.subfigs[1], before, after)
    figure.savefig(path, dpi=100)


def plot_curves(
    path: str | os.PathLike,
    log_history: Sequence[dict[str, float]],
    names: Sequence[str],
    label: str,
    dark: bool = False,
    limit: float | None = None,
    from_zero: bool = False,
) -> None:
    """Draw one panel of curves, large enough for a phone, on a transparent ground.

    Args:
        path (`str` or `os.PathLike`): the PNG to write, whatever its ending.
        log_history: the Trainer's.
        names (`Sequence[str]`): of `CURVES`.
        label (`str`): of the vertical axis.
        dark (`bool`): whether the page is dark.
        limit (`float`, *optional*): where to draw a dashed line, the most that is possible.
        from_zero (`bool`): whether the vertical axis begins at 0.
    """
    with _single_picture(path, dark) as axes:
        _plot_curves(axes, log_history, names, label)
        if limit is not None:
            axes.axhline(limit, color=INK[dark], linestyle="--", linewidth=1)
        if from_zero:
            axes.set_ylim(bottom=0)


def plot_class_sizes(path: str | os.PathLike, sizes: Sequence[int], dark: bool = False) -> None:
    """Draw how many images each class has, the largest first; a dashed line is where all would have equally many.

    Args:
        path (`str` or `os.PathLike`): the PNG to write, whatever its ending.
        sizes (`Sequence[int]`): images of each class.
        dark (`bool`): whether the page is dark.
    """
    with _single_picture(path, dark) as axes:
        axes.fill_between(np.arange(len(sizes) + 1) + 0.5, [*sorted(sizes, reverse=True), 0], step="post", linewidth=0)
        axes.axhline(sum(sizes) / len(sizes), color=INK[dark], linestyle="--", linewidth=1)
        axes.set(xlabel="classes, the largest first", ylabel="images", xlim=(0.5, len(sizes) + 0.5), ylim=(0, None))


@contextlib.contextmanager
def _single_picture(path: str | os.PathLike, dark: bool) -> Iterator[Axes]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[dark])
    settings = {
        **ink,
        "axes.prop_cycle": cycler(color=HUES[dark]),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        yield figure.subplots()
        figure.savefig(path, format="png", dpi=200, transparent=True)


def plot_confusion(
    path: str | os.PathLike, labels: np.ndarray, predicted: np.ndarray, classes: Sequence[int], names: Sequence[str]
) -> None:
    """Draw which classes are taken for which: rows are the true classes, numbers count images.

    Args:
        path (`str` or `os.PathLike`): the PNG to write, whatever its ending.
        labels, predicted (`np.ndarray` of shape `(num_images,)`): class indices.
        classes (`Sequence[int]`): the classes to show; images that are taken for another are counted in a last column.
        names (`Sequence[str]`): of all classes.
    """
    columns = [*(predicted == shown for shown in classes), ~np.isin(predicted, classes)]
    counts = np.array([[np.sum((labels == row) & column) for column in columns] for row in classes])
    texts, style = readable(names)
    shown = [*(texts[index] for index in classes), "others"]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.45 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), shown, rotation=90, fontsize=8, **style)
    axes.set_yticks(range(len(classes)), shown[:-1], fontsize=8, **style)
    axes.set(xlabel="predicted", ylabel="true")
    for row, column in zip(*counts.nonzero(), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(picture, label="images of the true class (%)", shrink=0.6)
    figure.savefig(path, format="png", dpi=100)


def _plot_images(figure: SubFigure, before: Snapshot, after: Snapshot) -> None:
    rows = figure.subplots(2, len(before.labels), squeeze=False)
    texts, style = readable(before.class_names)
    shown = dict(zip(before.class_names, texts, strict=True))
    for row, title, shot in zip(rows, ("before", "after"), (before, after), strict=True):
        row[0].set_ylabel(title)
        for axes, image, salient, label, truth in zip(
            row, shot.images, shot.saliency, shot.labels, shot.truths, strict=True
        ):
            axes.imshow((image * (0.4 + 0.6 * salient.unsqueeze(-1))).numpy())
            axes.set(xticks=[], yticks=[])
            color = "black" if truth is None else "tab:green" if truth == label else "tab:red"
            axes.set_title(shown[label], fontsize=8, color=color, **style)


def _plot_curves(axes: Axes, log_history: Sequence[dict[str, float]], names: Sequence[str], label: str) -> None:
    for name in names:
        points = [(entry["epoch"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=CURVES[name])
    axes.set(xlabel="epoch", ylabel=label)
    axes.legend(frameon=False, fontsize=8)


def _plot_accuracies(axes: Axes, heights: dict[str, float]) -> None:
    bars = axes.bar(list(heights), list(heights.values()))
    axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
