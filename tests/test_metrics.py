"""Metrics against hand-computed cases, torch, scipy and plain loops; as an `evaluate.Metric`, and in the evaluator."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from datasets import ClassLabel, Dataset, Features, Image
from decisions import ClearDecisions
from evaluate import evaluator
from scipy.stats import hmean
from tiny_inputs import draw_shape
from transformers import AutoImageProcessor, EvalPrediction

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.metrics import MicroCLIPMetric, classification_metrics, compute_metrics


BY_CLASS = {"accuracy", "mean_class_accuracy", "harmonic_mean"}


def random_case(seed=0, num_images=200, num_classes=11, hidden=0.2):
    """Logits that are right about half of the time, some labels hidden, the last class absent."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(1, num_classes - 1), num_images)
    scores = rng.normal(size=(num_images, num_classes)).astype(np.float32)
    scores[np.arange(num_images), labels] += 1.5
    labels[rng.random(num_images) < hidden] = -1
    labels[0] = 0
    return scores, labels


def calibration_error_by_loop(scores, labels):
    """Guo et al., section 2: image by image, bin by bin, in torch."""
    bins = [[] for _ in range(15)]
    for row, label in zip(scores, labels, strict=True):
        if label == -1:
            continue
        probabilities = torch.tensor(row, dtype=torch.float64).softmax(0)
        confidence = probabilities.max().item()
        (place,) = [m for m in range(15) if m / 15 < confidence <= (m + 1) / 15]
        bins[place].append((confidence, probabilities.argmax().item() == label))
    total = sum(map(len, bins))
    error = 0.0
    for content in filter(None, bins):
        confidence = math.fsum(c for c, _ in content) / len(content)
        accuracy = sum(right for _, right in content) / len(content)
        error += len(content) / total * abs(accuracy - confidence)
    return error


def test_a_case_by_hand():
    """Classes 0, 1, 2 occur, with 2 of 3, 1 of 1 and 1 of 2 right; class 3 doesn't, and one image is hidden."""
    predicted = [0, 0, 3, 1, 2, 0, 1]
    labels = [0, 0, 0, 1, 2, 2, -1]
    metrics = classification_metrics(predicted, labels)
    assert metrics == pytest.approx(
        {"accuracy": 4 / 6, "mean_class_accuracy": (2 / 3 + 1 + 1 / 2) / 3, "harmonic_mean": 3 / (3 / 2 + 1 + 2)}
    )
    logits = np.log([0.7, 0.1, 0.1, 0.1])[[[(c - p) % 4 for c in range(4)] for p in predicted]]
    expected = {**metrics, "top5_accuracy": 1, "expected_calibration_error": 0.7 - 4 / 6}
    assert classification_metrics(logits, labels) == pytest.approx(expected)
    assert all(type(value) is float for value in classification_metrics(logits, labels).values())


@pytest.mark.parametrize("num_classes", [1, 2, 5, 6, 11, 40])
@pytest.mark.numerical
def test_against_torch_and_scipy(num_classes):
    scores, labels = random_case(num_classes, num_classes=num_classes)
    metrics = classification_metrics(scores, labels)
    known = torch.tensor(labels) >= 0
    logits, targets = torch.tensor(scores)[known], torch.tensor(labels)[known]
    top5 = logits.topk(min(5, num_classes)).indices
    by_class = [(logits[targets == c].argmax(1) == c).double().mean().item() for c in targets.unique()]
    assert metrics == pytest.approx(
        {
            "accuracy": (logits.argmax(1) == targets).double().mean().item(),
            "mean_class_accuracy": sum(by_class) / len(by_class),
            "harmonic_mean": hmean(by_class),
            "top5_accuracy": sum(t in row for t, row in zip(targets, top5, strict=True)) / len(targets),
            "expected_calibration_error": calibration_error_by_loop(scores, labels),
        },
        rel=1e-12,
    )
    assert {name: metrics[name] for name in BY_CLASS} == classification_metrics(scores.argmax(1), labels)


@pytest.mark.numerical
def test_confidence_at_the_edges_of_bins():
    """k equal logits among 15, the others impossible: confidence 1 / k, an edge for k = 1, 3, 5 and 15."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        ties = rng.integers(1, 16, 60)
        scores = np.where(np.arange(15) < ties[:, None], 0, -np.inf)
        labels = np.where(rng.random(60) < 0.5, 0, 1)
        metrics = classification_metrics(scores, labels)
        assert metrics["expected_calibration_error"] == pytest.approx(calibration_error_by_loop(scores, labels))
    # 1/3 belongs to the bin below it: one image is overrated, one underrated, and they don't make up for each other.
    scores = np.array([[0, 0, 0, -np.inf], [0.65, 0, 0, 0]])
    confidence = math.exp(0.65) / (math.exp(0.65) + 3)
    assert 1 / 3 < confidence < 6 / 15
    expected = (1 / 3 + 1 - confidence) / 2
    assert classification_metrics(scores, [1, 0])["expected_calibration_error"] == pytest.approx(expected)


def test_extreme_logits_and_other_types():
    assert classification_metrics([[2e4, -2e4], [0, 3e4]], [0, 0])["expected_calibration_error"] == 0.5
    scores, labels = random_case()
    expected = classification_metrics(scores, labels)
    assert classification_metrics(scores.tolist(), labels.astype(np.int8).tolist()) == expected
    assert classification_metrics(torch.tensor(scores), torch.tensor(labels)) == expected
    half = classification_metrics(scores.astype(np.float16), labels)
    assert half == classification_metrics(scores.astype(np.float16).astype(np.float64), labels)
    known = labels >= 0
    assert classification_metrics(scores[known], labels[known].astype(np.uint8)) == expected


def test_ties_go_to_the_lowest_index():
    """A model that says the same of everything knows nothing: of 10 classes the first 5 are its top 5."""
    metrics = classification_metrics(np.zeros((10, 10)), np.arange(10))
    expected = {"accuracy": 0.1, "top5_accuracy": 0.5, "mean_class_accuracy": 0.1, "harmonic_mean": 0}
    assert metrics == pytest.approx({**expected, "expected_calibration_error": 0})
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 3, (300, 9)), rng.integers(0, 9, 300)
    ranked = [sorted(range(9), key=lambda c: (-row[c], c)) for row in scores.tolist()]
    metrics = classification_metrics(scores, labels)
    assert metrics["accuracy"] == np.mean(scores.argmax(1) == labels)
    assert metrics["top5_accuracy"] == np.mean([y in row[:5] for y, row in zip(labels, ranked, strict=True)])


def test_harmonic_mean_with_a_class_at_zero():
    with np.errstate(divide="raise"):
        metrics = classification_metrics([0, 0, 0, 0], [0, 0, 0, 1])
    assert metrics == {"accuracy": 0.75, "mean_class_accuracy": 0.5, "harmonic_mean": 0.0}


def test_hidden_labels_never_matter():
    """What the model says of an image without a label may be anything, NaN included."""
    scores, labels = random_case()
    expected = classification_metrics(scores[labels >= 0], labels[labels >= 0])
    scores[labels == -1] = np.nan
    assert classification_metrics(scores, labels) == expected
    assert compute_metrics(EvalPrediction(scores, labels)) == expected
    assert compute_metrics(EvalPrediction((scores, np.zeros((len(scores), 2, 2))), labels)) == expected


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((3, 2)), [0, 1], r"\(3, 2\) and labels \(2,\); pass logits \(num_images, num_classes\)"),
        (np.zeros((2, 2)), [[1, 0], [0, 1]], r"labels \(2, 2\); pass"),
        (np.zeros((2, 2, 2)), [0, 1], r"\(2, 2, 2\)"),
        (1, [0], r"scores have shape \(\)"),
        ([[0, 1], [2]], [0, 1], "rows of one length"),
        ([0.2, 0.7], [0, 1], "float64.*integers as class indices"),
        ([0, 1], [0.0, 1.0], "labels are float64"),
        (["a", "b"], [0, 1], "scores of shape .* are <U1"),
        ([0, 1], [0, None], "labels are object"),
        (np.zeros((3, 2)), [0, -1, 2], r"labels\[2\] is 2; expected class indices from 0 to 1, or -1 .*label2id"),
        (np.zeros((2, 2)), [0, -100], r"labels\[1\] is -100"),
        ([0, 1], [0, -2], r"labels\[1\] is -2; expected class indices from 0, or -1"),
        ([0, -1], [0, 1], r"scores\[1\] is -1; expected class indices from 0\."),
        (np.zeros((2, 2)), [-1, -1], "None of 2 images has a label"),
        ([], [], "None of 0 images has a label"),
        ([[0, 1], [0, math.nan], [math.nan, 0]], [-1, 1, 0], r"NaN or infinite in 2 of 2 images.*scores\[1\]"),
        ([[0, math.inf]], [0], "NaN or infinite"),
        ([[-math.inf, -math.inf]], [0], "NaN or infinite"),
    ],
)
def test_errors(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(scores, labels)


@pytest.mark.parametrize("config_name", ["scores", "labels"])
def test_as_a_metric_of_evaluate(tmp_path, config_name):
    """At once, in pieces, one by one, and again after a run or an error."""
    scores, labels = random_case()
    predictions = scores if config_name == "scores" else scores.argmax(1)
    expected = classification_metrics(predictions, labels)
    metric = MicroCLIPMetric(config_name, cache_dir=tmp_path)
    for _ in range(2):
        assert metric.compute(predictions=predictions, references=labels) == expected
        for start, end in ((0, 70), (70, 71), (71, 200)):
            metric.add_batch(predictions=predictions[start:end], references=torch.tensor(labels[start:end]))
        assert metric.compute() == expected
    for prediction, label in zip(predictions, labels, strict=True):
        metric.add(prediction=prediction, reference=label)
    assert metric.compute() == expected
    with pytest.raises(ValueError, match="None of 200"):
        metric.compute(predictions=predictions, references=np.full(200, -1))
    assert metric.compute(predictions=predictions, references=labels) == expected


def test_config_names_of_the_metric(tmp_path):
    metric = MicroCLIPMetric(cache_dir=tmp_path)
    assert metric.config_name == "scores"
    assert metric.compute(predictions=[[1, 1 + 1e-12]], references=[1])["accuracy"] == 1  # nothing is rounded
    with pytest.raises(ValueError, match="'logits'; pass 'scores' or 'labels'"):
        MicroCLIPMetric("logits", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="match the expected format"):
        metric.compute(predictions=[0, 1], references=[0, 1])


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.numerical
def test_in_the_evaluator(clip_folder, tmp_path, by_name):
    """By path or as a model, its accuracy is the one computed by hand, whatever the order of the data's labels."""
    made = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    made.save_pretrained(tmp_path / "saved")
    rng = np.random.default_rng(0)
    images = [draw_shape(CLASS_NAMES[i % 3], rng) for i in range(12)]
    model = MicroCLIPForImageClassification.from_pretrained(tmp_path / "saved")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    with torch.no_grad(), ClearDecisions():
        predicted = model(**processor(images, return_tensors="pt")).logits.argmax(1).tolist()
    # Labels of which the model gets 7 right, whatever it says.
    labels = [(guess + (i >= 7)) % 3 for i, guess in enumerate(predicted)]
    names = sorted(CLASS_NAMES)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"image": images, "label": [CLASS_NAMES[i] for i in labels]}, features=features)
    results = evaluator("image-classification").compute(
        model_or_pipeline=str(tmp_path / "saved") if by_name else model,
        feature_extractor=None if by_name else processor,
        data=data,
        metric=MicroCLIPMetric("labels", cache_dir=tmp_path),
        label_mapping={name: i for i, name in enumerate(names)},
    )
    assert results["accuracy"] == pytest.approx(7 / 12)
    assert results.items() >= classification_metrics(predicted, labels).items()


def test_the_package_imports_without_evaluate():
    code = "import sys; sys.modules['evaluate'] = sys.modules['datasets'] = None; import microclip_hf"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
