"""What is logged without labels: means over images, classes in use, labels that move; and where it is logged."""

import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from adaptation import adapt, draw_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerances import LOSS

from microclip_hf.training.diagnostics import METRICS, Diagnostics


pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_means_are_over_images(accelerator):
    diagnostics = Diagnostics(3)
    diagnostics.record(cross_entropy=torch.tensor([1.0, 2.0, 3.0]), head_agreement=torch.tensor([True, False, True]))
    diagnostics.record(cross_entropy=torch.tensor([10.0]), head_agreement=torch.tensor([False]))
    metrics = diagnostics.summarize(accelerator)
    assert metrics["cross_entropy"] == 4 and metrics["head_agreement"] == 0.5
    assert "label_changes" not in metrics and metrics["images_per_second"] > 0
    assert "cross_entropy" not in diagnostics.summarize(accelerator)


def test_label_changes_and_classes_in_use(accelerator):
    """By the latest label of each image; entropy of shares 1/2, 1/4, 1/4."""
    diagnostics = Diagnostics(4)
    diagnostics.record_labels(torch.tensor([0, 0, 1]), torch.tensor([3, 0, 1]))
    metrics = diagnostics.summarize(accelerator)
    assert "label_changes" not in metrics
    assert metrics["effective_classes"] == pytest.approx(
        math.exp(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)), rel=LOSS
    )
    diagnostics.record_labels(torch.tensor([2, 0]), torch.tensor([3, 0]))
    diagnostics.record_labels(torch.tensor([1, 0]), torch.tensor([1, 2]))
    metrics = diagnostics.summarize(accelerator)
    assert metrics["label_changes"] == pytest.approx(1 / 3)
    assert diagnostics.pseudo_labels.tolist() == [0, 1, 0, 2]
    assert metrics["effective_classes"] == pytest.approx(2**1.5, rel=LOSS)


def test_images_without_index(accelerator):
    diagnostics = Diagnostics(2)
    diagnostics.record_labels(torch.tensor([0, 1, 1, 0]), None)
    metrics = diagnostics.summarize(accelerator)
    assert metrics["effective_classes"] == pytest.approx(2, rel=LOSS) and "label_changes" not in metrics


def test_of_images_without_index_the_latest_labels_count(accelerator):
    """So many a class that chance doesn't look like a collapse, however few a period has."""
    diagnostics = Diagnostics(50)
    for start in range(0, 2000, 10):
        diagnostics.record_labels(torch.arange(start, start + 10) % 50, None)
        metrics = diagnostics.summarize(accelerator)
    assert metrics["effective_classes"] == pytest.approx(50, rel=LOSS)
    assert diagnostics.class_counts == [20] * 50


def test_collapse_is_warned_about_once(accelerator):
    diagnostics, index = Diagnostics(20), torch.arange(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnostics.record_labels(index % 20, index)
        diagnostics.summarize(accelerator)
        stream = Diagnostics(20)
        stream.record_labels(torch.zeros(10).long(), None)  # too few images to tell
        stream.summarize(accelerator)
    diagnostics.record_labels(index % 2, index)
    with pytest.warns(UserWarning, match=r"use few classes: effectively 2.0 of 20"):
        diagnostics.summarize(accelerator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnostics.record_labels(index % 2, index)
        diagnostics.summarize(accelerator)


def test_everything_is_in_tensorboard(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = adapt(clip_folder, tmp_path, draw_images(), report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    expected = {}
    for entry in trainer.state.log_history:
        if "loss" in entry:
            for name, value in entry.items():
                expected.setdefault(name, []).append(value)
    for name in (*METRICS, "loss", "grad_norm", "images_per_second", "effective_classes"):
        found = [event.value for event in events.Scalars(f"train/{name}")]
        assert found == pytest.approx(expected[name], rel=LOSS), name
    assert len(expected["loss"]) == 6 and len(expected["label_changes"]) == 3


@pytest.mark.parametrize(
    ("settings", "steps"),
    # 3 steps an epoch; one that reaches a step of `logging_steps` is logged there.
    [
        ({"logging_steps": 10}, [3, 6]),
        ({"logging_steps": 2}, [2, 4, 6]),
        ({"logging_steps": 2, "max_steps": 5}, [2, 4, 5]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_the_ends_of_runs_and_of_short_epochs_are_logged(clip_folder, tmp_path, settings, steps):
    trainer = adapt(clip_folder, tmp_path, **settings)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == steps
