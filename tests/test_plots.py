"""Pictures of runs: what hides nothing, what any eye tells apart, and what is said where there is nothing to draw."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from microclip_hf import plots
from microclip_hf.explain.explanation import explain
from microclip_hf.run_names import accuracy_line


NAMES = ("student_agreement", "head_agreement", "label_changes", "pseudo_label_accuracy")
HISTORY = [{"epoch": epoch, **dict.fromkeys(NAMES, 0.5), "cross_entropy": 3.0} for epoch in (1, 2, 3)]
# How eyes without one kind of cone see linear RGB (Machado, Oliveira and Fernandes 2009).
BLINDNESS = {
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


@pytest.fixture
def figures(monkeypatch):
    """All figures that are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def test_no_legend_hides_a_curve(figures, tmp_path):
    plots.plot_adaptation(tmp_path / "a.png", HISTORY, {"adapted_accuracy": 0.5})
    plots.plot_curves(tmp_path / "b.png", HISTORY, NAMES[:2], "share of images")
    for figure in figures:
        figure.draw_without_rendering()
    legends = [(axes, axes.get_legend()) for figure in figures for axes in figure.axes if axes.get_legend()]
    assert len(legends) == 3
    for axes, legend in legends:
        box = legend.get_window_extent()
        assert box.y0 >= axes.get_window_extent().y1 - 1 and box.x1 <= axes.figure.bbox.x1


@pytest.mark.parametrize("history", [[], HISTORY[:1]])
def test_too_few_points_are_told(figures, tmp_path, history):
    plots.plot_adaptation(tmp_path / "a.png", history, {})
    plots.plot_curves(tmp_path / "b.png", history, NAMES[:2], "share of images", limit=3, from_zero=True)
    panels = [axes for figure in figures for axes in figure.axes]
    assert panels and not any(axes.lines or axes.axison for axes in panels)
    assert all("Fewer than 2 values were logged" in axes.texts[0].get_text() for axes in panels)


def test_no_curves_where_nothing_was_trained(figures, model, tmp_path):
    """Accuracies and images, as far as there are any, and no file where there is neither."""
    explanations = explain(model, [Image.new("RGB", (32, 32))] * 2)
    accuracies = {"adapted_accuracy": 0.5}
    for measured, shown, labels in ((accuracies, (), 1), (accuracies, explanations, 1), ({}, explanations, 0)):
        plots.plot_adaptation(tmp_path / "a.png", None, measured, shown, shown)
        panels = figures.pop().axes
        assert [axes.get_ylabel() for axes in panels].count("test accuracy (%)") == labels
        assert len(panels) == labels + 2 * len(shown) and not any(axes.texts and not labels for axes in panels)
    plots.plot_adaptation(tmp_path / "b.png", None, {})
    assert not (tmp_path / "b.png").exists()


def count_pixels(path, color):
    wanted = np.round(np.array(to_rgb(color)) * 255)
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


def test_right_and_wrong_have_signs(figures, model, tmp_path):
    """A disc for each known label, with lines on it, whatever the fonts; nothing for an unknown one."""
    explanations = explain(model, [Image.new("RGB", (40, 40), color) for color in ("gray", "silver", "white")])
    right = int(explanations[0].scores.argmax())
    labels = [right, (int(explanations[1].scores.argmax()) + 1) % 3, -1]
    plots.plot_adaptation(tmp_path / "a.png", HISTORY, {}, explanations, explanations, labels)
    signs = [len(axes.lines) for axes in figures[0].axes if axes.images]
    assert signs == [2, 3, 0] * 2
    assert all(count_pixels(tmp_path / "a.png", color) > 100 for color, _ in plots.SIGNS.values())


@pytest.mark.parametrize("matrix", BLINDNESS.values(), ids=BLINDNESS)
def test_any_eye_tells_right_from_wrong(matrix):
    linear = [np.array(to_rgb(color)) ** 2.2 for color, _ in plots.SIGNS.values()]
    seen = [np.clip(np.array(matrix) @ color, 0, 1) ** (1 / 2.2) for color in linear]
    assert np.linalg.norm(seen[0] - seen[1]) > 0.5


def test_accuracies_in_one_line():
    results = {"adapted_accuracy": 0.765, "zero_shot_accuracy": 0.1049, "adapted_top5_accuracy": 1.0}
    assert accuracy_line(results) == "names 10.5 % -> adapted 76.5 %"
    assert (
        accuracy_line({**results, "cupl_accuracy": 0.4867}) == "names 10.5 % -> descriptions 48.7 % -> adapted 76.5 %"
    )
    assert accuracy_line({"adapted_top5_accuracy": 1.0}) == ""
