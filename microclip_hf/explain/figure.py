"""An explanation as a figure: needs matplotlib (`pip install "microclip_hf[train]"`)."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..fonts import readable
from .explanation import Explanation, overlay


BAR = 0.27  # of the place between two classes


def plot(explanation: Explanation, alpha: float = 0.6, num_classes: int = 5) -> Figure:
    """Draw the picture with what the model saw of it, its attention, its salient patches, and its answers.

    Args:
        alpha (`float`, *optional*, defaults to 0.6): see [`overlay`].
        num_classes (`int`, *optional*, defaults to 5): how many of the likeliest classes are shown.

    Returns:
        `matplotlib.figure.Figure`; `.savefig("why.png")` writes it.

    Raises:
        ValueError: if `alpha` isn't in [0, 1] or `num_classes` isn't positive.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1.")
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    *pictures, bars = figure.subplots(1, 4)
    salient = explanation.saliency_mask.mean()
    largest = explanation.fg_attention.max()
    images = {
        "what the model sees": explanation.image,
        f"[FG] attention, up to {largest:.1%}; null token {explanation.null_share:.1%}": overlay(explanation, alpha),
        f"salient: {salient:.0%} of the patches": overlay(explanation, alpha, "saliency_mask"),
    }
    for axes, (title, image) in zip(pictures, images.items(), strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    # Pixels' centres are at whole numbers there, their edges half a pixel before.
    left, top, right, bottom = explanation.grid.box
    pictures[0].add_patch(
        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color="tab:orange", linewidth=2)
    )
    _plot_scores(bars, explanation, num_classes)
    return figure


def _plot_scores(axes: Axes, explanation: Explanation, num_classes: int) -> None:
    best = explanation.scores.argsort()[::-1][:num_classes]
    places = np.arange(len(best))
    paths = {"fused": explanation.scores, "[CLS] alone": explanation.cls_scores, "[FG] alone": explanation.fg_scores}
    for number, (name, scores) in enumerate(paths.items()):
        axes.barh(places + (number - 1) * BAR, scores[best], BAR, label=name)
    texts, style = readable(explanation.class_names)
    axes.set_yticks(places, [texts[index] for index in best], **style)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="score")
    axes.legend(frameon=False, fontsize=8)
