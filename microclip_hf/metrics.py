"""How well images are classified: a numpy function, the same for the Trainer, and the same as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from transformers import EvalPrediction


NUM_BINS = 15  # of confidence, as in arXiv:1706.04599
PREDICTIONS = {"scores": datasets.Sequence(datasets.Value("float64")), "labels": datasets.Value("int64")}


def classification_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Measure predictions by labels, as fractions from 0 to 1; of equal scores the class with the lowest index wins.

    Args:
        scores (array-like of shape `(num_images, num_classes)`): logits. Or predicted class indices, integers of
            shape `(num_images,)`, which give the first three metrics.
        labels (integers of shape `(num_images,)`): class indices; images with -1 (unknown) are left out.

    Returns:
        - `accuracy`: top-1.
        - `mean_class_accuracy`, `harmonic_mean`: means of the accuracies of the classes that occur in `labels`. A
          class at 0 makes the harmonic mean 0; the published code leaves such classes out.
        - `top5_accuracy`: 1 for up to 5 classes.
        - `expected_calibration_error`: gap between accuracy and mean confidence (largest softmax) in each of 15 bins
          (m / 15, (m + 1) / 15], weighted by their images.

    Raises:
        ValueError: if shapes or types don't fit, an index is no class, no image has a label, or logits are NaN.

    Example:
    ```python
    >>> from microclip_hf.metrics import classification_metrics

    >>> classification_metrics([0, 1, 1, 1], labels=[0, 1, 1, 0])
    {'accuracy': 0.75, 'mean_class_accuracy': 0.75, 'harmonic_mean': 0.6666666666666666}
    ```
    """
    scores, labels = _labelled(scores, labels)
    if scores.ndim == 1:
        return _class_accuracies(scores == labels, labels)
    true_scores = scores[np.arange(len(labels)), labels, None]
    is_before = np.arange(scores.shape[1]) < labels[:, None]
    # How many classes come before the true one.
    rank = ((scores > true_scores) | ((scores == true_scores) & is_before)).sum(1)
    return {
        **_class_accuracies(rank == 0, labels),
        "top5_accuracy": float(np.mean(rank < 5)),
        "expected_calibration_error": _calibration_error(scores, rank == 0),
    }


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """[`classification_metrics`] for the Trainer's `compute_metrics`; no metrics where no label is known.

    Args:
        prediction ([`~transformers.EvalPrediction`]): `predictions`, logits `(num_images, num_classes)` or a tuple
            that starts with them, and `label_ids` `(num_images,)`; negative ones are unknown.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.maximum(prediction.label_ids, -1)
    return {} if np.all(labels == -1) else classification_metrics(logits, labels)


class MicroCLIPMetric(evaluate.Metric):
    """[`classification_metrics`] as a metric of `evaluate`, without any download.

    Args:
        config_name (`str`, *optional*): what the predictions are: `"scores"`, the default, for logits
            `(num_images, num_classes)`; `"labels"` for class indices `(num_images,)`, as the evaluator of
            "image-classification" passes them. Another is an error.
        kwargs: as in [`~evaluate.EvaluationModule`], for example `cache_dir`.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(config_name or "scores", **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in PREDICTIONS:
            raise ValueError(f"config_name is {self.config_name!r}; pass {' or '.join(map(repr, PREDICTIONS))}.")
        features = {"predictions": PREDICTIONS[self.config_name], "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Accuracy, also by class, and calibration of image classification.",
            citation="",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return classification_metrics(predictions, references)


def _labelled(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, checked, of the images that have a label."""
    scores, labels = _as_arrays(scores, labels)
    labelled = np.flatnonzero(labels != -1)
    if len(labelled) == 0:
        raise ValueError(f"None of {len(labels)} images has a label (other than -1); pass images with labels.")
    if scores.ndim == 1:
        _check_indices("labels", labels, None, -1)
        _check_indices("scores", scores, None, 0)
        return scores[labelled], labels[labelled].astype(np.int64)
    _check_indices("labels", labels, scores.shape[1], -1)
    # The largest alone: classes that were ruled out may well have -inf.
    bad = labelled[~np.isfinite(scores[labelled].max(1))]
    if len(bad):
        raise ValueError(
            f"The largest score is NaN or infinite in {len(bad)} of {len(labelled)} images with labels, first in "
            f"scores[{bad[0]}]; expected finite logits. Look for what made the model overflow."
        )
    return scores[labelled], labels[labelled].astype(np.int64)


def _as_arrays(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    try:
        scores = np.asarray(scores)
        labels = np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"scores or labels are no array ({error}); pass rows of one length.") from error
    if labels.ndim != 1 or scores.ndim not in (1, 2) or len(scores) != len(labels):
        raise ValueError(
            f"scores have shape {scores.shape} and labels {labels.shape}; pass logits (num_images, num_classes) or "
            "class indices (num_images,), and labels (num_images,)."
        )
    if len(labels) and (labels.dtype.kind not in "iu" or scores.dtype.kind not in ("iu", "iuf")[scores.ndim - 1]):
        raise ValueError(
            f"scores of shape {scores.shape} are {scores.dtype}, labels are {labels.dtype}; pass numbers as logits, "
            "and integers as class indices and labels."
        )
    return scores, labels


def _check_indices(name: str, values: np.ndarray, num_classes: int | None, lowest: int) -> None:
    is_bad = values < lowest
    if num_classes is not None:
        is_bad |= values >= num_classes
    if is_bad.any():
        index = is_bad.argmax()
        highest = "" if num_classes is None else f" to {num_classes - 1}"
        unknown = ", or -1 for unknown" if lowest == -1 else ""
        raise ValueError(
            f"{name}[{index}] is {values[index]}; expected class indices from 0{highest}{unknown}. Number the labels "
            "as the model does (config.label2id)."
        )


def _class_accuracies(correct: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    accuracies = np.bincount(classes, weights=correct) / counts
    return {
        "accuracy": float(np.mean(correct)),
        "mean_class_accuracy": float(np.mean(accuracies)),
        "harmonic_mean": float(1 / np.mean(1 / accuracies)) if accuracies.all() else 0.0,
    }


def _calibration_error(logits: np.ndarray, correct: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    # The largest of softmax's probabilities, whose numerator is exp(0).
    confidence = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    bins = np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, confidence)
    return float(np.abs(np.bincount(bins, weights=correct - confidence)).sum() / len(logits))
