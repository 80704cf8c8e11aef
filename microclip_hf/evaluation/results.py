"""What an evaluation found, in numbers: accuracies with their intervals, classes, confused pairs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from .. import __version__
from ..metrics import classification_metrics
from .predictions import ANSWER, BASELINE, WAYS, Predictions


RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
MAX_CLASSES = 20  # in a picture
# How the accuracy of a way compared with that of another is called, by that other.
COMPARISONS = {ANSWER: "difference", BASELINE: "gain"}


@dataclass(frozen=True)
class EvaluationFacts:
    """What was measured, for the report.

    Args:
        model, dataset (`str`): the model's Hub id or folder, and what the images are called.
        titles (`Mapping[str, str]`): ways that are called otherwise than in `WAYS`.
        left_out (`Mapping[str, str]`): ways that weren't computed, and why.
        num_unlabelled (`int`): images without a label, which were left out.
        settings (`Mapping[str, Any]`): whatever else the numbers depend on.
    """

    model: str
    dataset: str
    class_names: Sequence[str]
    titles: Mapping[str, str]
    left_out: Mapping[str, str]
    num_unlabelled: int
    settings: Mapping[str, Any]


def bootstrap_accuracies(correct: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Accuracies `(resamples, num_ways)` of images drawn with replacement, the same images for every way.

    They depend only on how often each pattern of right and wrong, a row of `correct` `(num_images, num_ways)`, is
    drawn, so that a draw of images is a multinomial draw of patterns.
    """
    # With W ways there are 2 ** W patterns at most, and often far fewer than images.
    patterns, counts = np.unique(correct, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(correct), counts / len(correct), resamples)
    return draws @ patterns / len(correct)


def confused_pairs(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """`(true class, predicted class, images)` of all wrong predictions, class indices, the most frequent first."""
    wrong = labels != predicted
    # Sorted, so that of equally frequent pairs the order is that of the classes.
    pairs = sorted(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return [(*pair, count) for pair, count in Counter(pairs).most_common()]


def classes_to_draw(labels: np.ndarray, predicted: np.ndarray) -> list[int]:
    """The classes of the most confused pairs, then others that have images, `MAX_CLASSES` at most."""
    confused = [index for true, other, _ in confused_pairs(labels, predicted) for index in (true, other)]
    return list(dict.fromkeys([*confused, *np.unique(labels).tolist()]))[:MAX_CLASSES]


def make_report(predictions: Predictions, facts: EvaluationFacts, seed: int = 0) -> dict[str, Any]:
    """All numbers, ready for JSON; accuracies are fractions, intervals hold 95 %.

    Args:
        predictions ([`Predictions`]): of every way, the model's answer among them.
        seed (`int`): of the bootstrap.
    """
    labels = predictions.labels
    names = facts.class_names
    predicted = {way: scores.argmax(1) for way, scores in predictions.logits.items()}
    num_images = np.bincount(labels, minlength=len(names)).tolist()
    return {
        "model": facts.model,
        "dataset": facts.dataset,
        "num_images": len(labels),
        "num_unreadable": predictions.num_unreadable,
        "num_unlabelled": facts.num_unlabelled,
        "class_names": list(names),
        "ways": _measure_ways(predictions, predicted, facts.titles, seed),
        "left_out": dict(facts.left_out),
        "classes": [
            {"name": names[index], "images": num_images[index], "accuracy": _class_accuracy(labels, predicted, index)}
            for index in np.unique(labels)
        ],
        "confused_pairs": [
            {"label": names[true], "predicted": names[other], "images": count, "share": count / num_images[true]}
            for true, other, count in confused_pairs(labels, predicted[ANSWER])
        ],
        "settings": {**facts.settings, "seed": seed, "resamples": RESAMPLES},
        "versions": {
            "microclip_hf": __version__,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        },
    }


def _measure_ways(
    predictions: Predictions, predicted: Mapping[str, np.ndarray], titles: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """The metrics of each way, and how much its accuracy differs from that of the ways in `COMPARISONS`."""
    correct = np.stack([classes == predictions.labels for classes in predicted.values()], 1)
    drawn = bootstrap_accuracies(correct, seed=seed)
    columns = {way: column for column, way in enumerate(predicted)}
    ways = {}
    for way, scores in predictions.logits.items():
        column = columns[way]
        ways[way] = {
            "title": titles.get(way, WAYS[way]),
            **classification_metrics(scores, predictions.labels),
            "accuracy_interval": _interval(drawn[:, column]),
        }
        for reference, name in COMPARISONS.items():
            if way != reference and reference in columns:
                other = columns[reference]
                ways[way][name] = float(correct[:, column].mean() - correct[:, other].mean())
                ways[way][f"{name}_interval"] = _interval(drawn[:, column] - drawn[:, other])
    return ways


def _class_accuracy(labels: np.ndarray, predicted: Mapping[str, np.ndarray], index: int) -> dict[str, float]:
    return {way: float((classes[labels == index] == index).mean()) for way, classes in predicted.items()}


def _interval(values: np.ndarray) -> list[float]:
    return np.percentile(values, PERCENTILES).tolist()
