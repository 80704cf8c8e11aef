"""TransCLIP and StatA against their formulas, image by image in float64."""

import numpy as np
import pytest
import torch
from gaussian_peers import MIN_VARIANCE, Neighbors, fit_stata, fit_transclip
from tolerances import COSINE, assert_clear, within


pytestmark = pytest.mark.numerical
NUM_IMAGES, NUM_CLASSES, WIDTH, SCALE = 40, 4, 6, 12.0


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.fixture(params=[0, 1])
def data(request):
    """Features around three of four texts, in float64."""
    rng = np.random.default_rng(request.param)
    head = unit(rng.normal(size=(NUM_CLASSES, WIDTH)))
    features = unit(head[rng.integers(0, 3, NUM_IMAGES)] + 0.4 * rng.normal(size=(NUM_IMAGES, WIDTH)))
    return features, head


def find_neighbors(features, count):
    """w, a matrix with the cosines of each row's nearest other images; the nearest ones are clear."""
    cosines = features @ features.T
    np.fill_diagonal(cosines, -np.inf)
    w = np.zeros_like(cosines)
    for row, own in enumerate(cosines):
        order = np.argsort(-own)
        assert own[order[count - 1]] - own[order[count]] > 2 * COSINE
        w[row, order[:count]] = own[order[:count]]
    return w


def log_likelihood(f, mean, variance):
    return -0.5 * sum((f[e] - mean[e]) ** 2 / variance[e] + np.log(variance[e]) for e in range(WIDTH))


def assign(features, y0, w, z, means, variances, weight, neighbor_weight):
    """Five inner steps of z (N, C)."""
    likelihoods = [[log_likelihood(f, *own) for own in zip(means, variances, strict=True)] for f in features]
    for _ in range(5):
        votes = (w + w.T) @ z
        z = np.array([softmax(rows) for rows in np.log(y0) + weight * np.array(likelihoods) + neighbor_weight * votes])
    return z


def fit(features, head, *, anchor, num_confident=8, weight=1 / 50, neighbor_weight=1 / 6, num_rounds=10):
    """Means and variances (C, E); without an `anchor` those of TransCLIP."""
    y0 = np.array([softmax(SCALE * head @ f) for f in features])
    w = find_neighbors(features, 3)
    variances = np.full((NUM_CLASSES, WIDTH), 1 / WIDTH)
    means = head
    if anchor is None:
        means = unit(np.array([features[np.argsort(-y0[:, c])[:num_confident]].mean(0) for c in range(NUM_CLASSES)]))
    z = y0
    for _ in range(num_rounds):
        z = assign(features, y0, w, z, means, variances, weight, neighbor_weight)
        assert_clear(z)
        raw = [sum(z[n, c] * f for n, f in enumerate(features)) / z[:, c].sum() for c in range(NUM_CLASSES)]
        counts = [(z.argmax(1) == c).sum() for c in range(NUM_CLASSES)]
        beta = [1 if anchor is None else count / (anchor + count) for count in counts]
        means = unit(np.array([b * m + (1 - b) * t for b, m, t in zip(beta, raw, head, strict=True)]))
        own = []
        for c in range(NUM_CLASSES):
            squares = sum(z[n, c] * (f - means[c]) ** 2 for n, f in enumerate(features))
            own.append(squares / z[:, c].sum())
        if anchor is None:
            variances = np.tile(sum(z[:, c].mean() * own[c] for c in range(NUM_CLASSES)), (NUM_CLASSES, 1))
        else:
            anchored = 1 / WIDTH + (head - means) ** 2
            variances = np.array([b * v + (1 - b) * a for b, v, a in zip(beta, own, anchored, strict=True)])
    return means, variances


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5, "neighbor_weight": 0, "num_rounds": 3, "num_confident": 4}])
def test_transclip_is_what_its_formulas_say(data, settings):
    features, head = data
    means, variances = fit(features, head, anchor=None, **settings)
    gaussians = fit_transclip(*map(torch.tensor, data), SCALE, **settings)
    np.testing.assert_allclose(gaussians.means, means, **within())
    np.testing.assert_allclose(gaussians.variances.expand(NUM_CLASSES, -1), variances, **within())
    expected = [
        [gaussians.weight * log_likelihood(f, *own) for own in zip(means, variances, strict=True)] for f in features
    ]
    np.testing.assert_allclose(gaussians.scores(torch.tensor(features)), expected, **within(np.abs(expected).max()))


@pytest.mark.parametrize("settings", [{}, {"weight": 0.1, "neighbor_weight": 0.5, "num_rounds": 3, "anchor": 0.1}])
def test_stata_is_what_its_formulas_say(data, settings):
    features, head = data
    means, variances = fit(features, head, **{"anchor": 1.0, **settings})
    gaussians = fit_stata(*map(torch.tensor, data), SCALE, **settings)
    np.testing.assert_allclose(gaussians.means, means, **within())
    np.testing.assert_allclose(gaussians.variances, variances, **within())


def test_a_class_without_images_stays_at_its_text(data):
    gaussians = fit_stata(*map(torch.tensor, data), SCALE, anchor=1e9)
    np.testing.assert_allclose(gaussians.means, data[1], rtol=0, atol=NUM_IMAGES / 1e9)


def test_neighbors_dont_depend_on_chunks(data, monkeypatch):
    features = torch.tensor(data[0])
    whole = Neighbors.find(features, 3)
    monkeypatch.setattr("gaussian_peers.CHUNK", 7)
    parts = Neighbors.find(features, 3)
    assert torch.equal(whole.index, parts.index)
    np.testing.assert_allclose(parts.similarity, whole.similarity, **within())


def test_few_images_and_equal_ones_are_no_problem():
    features = torch.tensor(unit(np.ones((2, WIDTH))))
    head = torch.eye(WIDTH, dtype=torch.float64)[:3]
    for gaussians in (fit_transclip(features, head, SCALE), fit_stata(features, head, SCALE)):
        assert gaussians.variances.min() >= MIN_VARIANCE
        assert gaussians.scores(features).isfinite().all()
