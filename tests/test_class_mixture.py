"""The mixture of classes against its formulas in float64, with drawn photos whose classes are known, and at edges."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.special import log_softmax, softmax
from scipy.stats import multivariate_normal, ortho_group

from microclip_hf.class_mixture import (
    NUM_ROUNDS,
    balance_text,
    fit_class_mixture,
    log_mean_probability,
)
from microclip_hf.saliency import NonFiniteError


pytestmark = pytest.mark.numerical
FREQUENCIES = (0.5, 0.3, 0.15, 0.05)
# Half the distance between neighbouring float32 numbers, relative.
HALF_ULP = 2.0**-24
# The fit's own defaults, for the formulas here.
TEXT_WEIGHT, TEXT_PHOTOS, TEXT_SCALE, SHRINKAGE = 3.0, 4.0, 3.0, 0.5


@dataclass
class Photos:
    """What is fitted, in float64, and the truth behind it."""

    features: np.ndarray  # (N, E)
    text: np.ndarray  # (N, C)
    head: np.ndarray  # (C, E)
    labels: np.ndarray  # (N,)

    def fit(self, dtype=torch.float32, sizes=None, rounds=NUM_ROUNDS, **options):
        features, text, head = (torch.tensor(value, dtype=dtype) for value in (self.features, self.text, self.head))
        sizes = sizes or [len(features)]
        return fit_class_mixture(
            lambda: zip(features.split(sizes), text.split(sizes), strict=True),
            head,
            num_rounds=rounds,
            **options,
        )

    def probabilities(self, mixture):
        dtype = mixture.weight.dtype
        return mixture.probabilities(torch.tensor(self.features, dtype=dtype), torch.tensor(self.text, dtype=dtype))

    def scores(self, mixture):
        return mixture.scores(torch.tensor(self.features, dtype=mixture.weight.dtype)).double().numpy()

    @property
    def rounding(self):
        """How far apart posteriors and frequencies of two float32 fits may be.

        Roundings of a sum of N terms go either way, and add up to the root of N half ulps. The solve multiplies them
        by the covariance's condition number, at most E + 1: its eigenvalues lie between half the photos' variance v
        and (v + E v) / 2. Posteriors change by half as much as scores, whose magnitude here is 10.
        """
        num_photos, width = self.features.shape
        return num_photos**0.5 * HALF_ULP * (width + 1) * 10 / 2


def draw(num_photos=600, frequencies=FREQUENCIES, width=6, distance=4.0, seed=0):
    """Photos of one Gaussian a class, its mean at a corner of a simplex, and a text classifier that is of some use."""
    generator = np.random.default_rng(seed)
    num_classes = len(frequencies)
    means = np.zeros((num_classes, width))
    means[np.arange(num_classes), np.arange(num_classes) % width] = distance * (-1.0) ** (
        np.arange(num_classes) // width
    )
    labels = generator.choice(num_classes, num_photos, p=frequencies)
    root = np.eye(width) + 0.3 * np.random.default_rng(1).standard_normal((width, width)) / width**0.5
    features = 2 + means[labels] + generator.standard_normal((num_photos, width)) @ root.T
    head = means @ np.linalg.inv(root @ root.T) / TEXT_SCALE
    return Photos(features, log_softmax((features - 2) @ head.T, -1), head, labels)


def fit64(photos, rounds=NUM_ROUNDS, frequencies=None):
    """The module's formulas, and after the last round the E-step's counts, variances and posteriors.

    Returns `pi`, `mu`, `Sigma`, `counts`, `variances`.
    """
    num_photos, width = photos.features.shape
    num_classes = len(photos.head)
    center = photos.features.mean(0)
    centered = photos.features - center
    total = centered.T @ centered / num_photos
    ball = np.trace(total) / width * np.eye(width)
    head = TEXT_SCALE * (photos.head - photos.head.mean(0))
    pi = np.full(num_classes, 1 / num_classes) if frequencies is None else np.array(frequencies)
    z = softmax(photos.text, -1)
    for _ in range(rounds):
        counts = z.sum(0)
        shrunken = z.T @ centered / (counts + 1)[:, None]
        between = sum(count * np.outer(mean, mean) for count, mean in zip(counts, shrunken, strict=True)) / num_photos
        sigma = (1 - SHRINKAGE) * (total - between) + SHRINKAGE * ball
        mu = np.stack(
            [
                (z[:, c] @ centered + TEXT_PHOTOS * sigma @ head[c]) / (counts[c] + TEXT_PHOTOS)
                for c in range(num_classes)
            ]
        )
        z = softmax(np.log(pi) + TEXT_WEIGHT * photos.text + log_normals(centered, mu, sigma), -1)
        if frequencies is None:
            pi = (z.sum(0) + 1) / (num_photos + num_classes)
    return pi, mu + center, sigma, z.sum(0), (z * (1 - z)).sum(0)


def log_normals(features, means, covariance):
    densities = [multivariate_normal(mean, covariance).logpdf(features).reshape(-1) for mean in means]
    return np.stack(densities, -1)


def fit_plain64(features, means, rounds):
    """Plain maximum likelihood of the frequencies, means and one covariance, without texts; returns the posteriors."""
    covariance = np.eye(features.shape[1])
    pi = np.full(len(means), 1 / len(means))
    for _ in range(rounds):
        z = softmax(np.log(pi) + log_normals(features, means, covariance), -1)
        pi = z.mean(0)
        means = z.T @ features / z.sum(0)[:, None]
        rests = [features - mean for mean in means]
        covariance = sum((z[:, c, None] * rest).T @ rest for c, rest in enumerate(rests)) / len(features)
    return z


def fit_in_processes(parts, **options):
    """Of each process what it fitted, or the error it got; `parts` are their photos."""
    barrier = threading.Barrier(len(parts), timeout=60)
    slots = [None] * len(parts)

    def run(rank):
        def reduce(values):
            slots[rank] = values
            barrier.wait()
            total = sum(slots[1:], slots[0])
            barrier.wait()
            return total

        return parts[rank].fit(reduce=reduce, **options)

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(run, rank) for rank in range(len(parts))]
    return [future.exception() or future.result() for future in futures]


def take(photos, index):
    return Photos(photos.features[index], photos.text[index], photos.head, photos.labels[index])


def assert_same_fit(found, expected, photos):
    """But for rounding, of which `Photos.rounding` has the bound."""
    bound = photos.rounding
    assert_allclose(photos.probabilities(found), photos.probabilities(expected), rtol=0, atol=bound)
    assert_allclose(found.frequencies, expected.frequencies, rtol=0, atol=bound)
    scale = np.abs(photos.scores(expected)).max()
    assert_allclose(photos.scores(found), photos.scores(expected), rtol=0, atol=bound * scale)


def test_frequencies_are_found_within_sampling_error():
    frequencies = np.array([0.6, 0.25, 0.1, 0.05, 0])
    photos = draw(5000, frequencies, distance=8.0)
    found = photos.fit()
    errors = np.sqrt(frequencies * (1 - frequencies) / 5000)
    pull = 5 / 5005  # by the one photo more that each class is given
    assert (np.abs(found.frequencies.numpy() - frequencies) <= 4 * errors + pull).all()
    assert_allclose(found.counts, np.bincount(photos.labels, minlength=5), atol=2)
    assert found.is_absent.tolist() == [False, False, False, False, True]


def test_without_texts_it_is_a_mixture_of_gaussians_of_one_covariance():
    """Classes that overlap: the posteriors of plain maximum likelihood, from the true means on."""
    photos = draw(4000, distance=4.0)
    found = photos.fit(text_weight=0.0, text_photos=1e-3, shrinkage=1e-3)
    means = np.stack([photos.features[photos.labels == c].mean(0) for c in range(4)])
    expected = fit_plain64(photos.features, means, 100)
    errors = np.sqrt(expected.mean(0) * (1 - expected.mean(0)) / 4000)
    assert (np.abs(found.frequencies.numpy() - expected.mean(0)) < errors / 2).all()
    assert np.abs(photos.probabilities(found).numpy() - expected).mean() < 0.005


@pytest.mark.parametrize("frequencies", [None, (0.1, 0.2, 0.3, 0.4)], ids=["fitted", "given"])
@pytest.mark.parametrize("rounds", [1, 2, NUM_ROUNDS])
@pytest.mark.parametrize("size", [(600, 6), (9, 32)], ids=["many", "fewer_photos_than_dimensions"])
def test_fit_equals_its_formulas_in_float64(size, rounds, frequencies):
    photos = draw(size[0], width=size[1], distance=2.0)
    pi, mu, sigma, counts, variances = fit64(photos, rounds, frequencies)
    given = None if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
    found = photos.fit(torch.float64, rounds=rounds, frequencies=given)
    assert_allclose(found.frequencies, pi, rtol=1e-9)
    assert_allclose(found.counts, counts, rtol=1e-9)
    assert_allclose(found.standard_errors**2, variances + counts * (1 - counts / size[0]), rtol=1e-8)
    assert_allclose(found.weight.numpy() @ sigma, mu - photos.features.mean(0), rtol=0, atol=1e-9)
    joint = np.log(pi) + TEXT_WEIGHT * photos.text + log_normals(photos.features, mu, sigma)
    assert_allclose(photos.probabilities(found), softmax(joint, -1), rtol=0, atol=1e-9)
    single = photos.fit(rounds=rounds, frequencies=None if given is None else given.float())
    assert_allclose(photos.probabilities(single), softmax(joint, -1), rtol=0, atol=photos.rounding)


def test_scores_are_log_posteriors_without_texts_but_for_what_classes_share():
    photos = draw(distance=2.0)
    pi, mu, sigma, *_ = fit64(photos)
    shared = photos.scores(photos.fit(torch.float64)) - np.log(pi) - log_normals(photos.features, mu, sigma)
    assert np.ptp(shared, axis=1).max() < 1e-9
    assert np.ptp(shared, axis=0).max() > 1


@pytest.mark.parametrize("sizes", [[1] * 600, [1, 7, 300, 0, 292], [599, 1]], ids=["single", "uneven", "last_of_one"])
def test_batches_change_nothing_but_rounding(sizes):
    photos = draw(distance=2.0)
    whole = photos.fit()
    assert_same_fit(photos.fit(sizes=sizes), whole, photos)
    # A single photo left out is more than that.
    fewer = take(photos, slice(1, None)).fit()
    assert (fewer.frequencies - whole.frequencies).abs().max() > photos.rounding


@pytest.mark.parametrize("first", [300, 1, 0])
def test_processes_fit_their_photos_together(first):
    photos = draw(distance=2.0)
    parts = [take(photos, slice(first)), take(photos, slice(first, None))]
    one, two = fit_in_processes(parts)
    assert all(torch.equal(*pair) for pair in zip(fields(one), fields(two), strict=True))
    assert_same_fit(one, photos.fit(), photos)


def fields(mixture):
    return [value for value in astuple(mixture) if isinstance(value, torch.Tensor)]


def test_the_same_photos_give_the_same_bits():
    photos = draw()
    runs = [fields(photos.fit(sizes=[100] * 6)) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_the_order_of_classes_and_photos_plays_no_part():
    photos = draw(distance=2.0)
    order = [2, 0, 3, 1]
    permuted = Photos(photos.features, photos.text[:, order], photos.head[order], photos.labels)
    whole, found = photos.fit(), permuted.fit()
    assert_allclose(found.frequencies, whole.frequencies[order], rtol=0, atol=photos.rounding)
    expected = photos.probabilities(whole)[:, order]
    assert_allclose(permuted.probabilities(found), expected, rtol=0, atol=photos.rounding)
    shuffled = take(photos, np.random.default_rng(0).permutation(600)).fit()
    assert_same_fit(shuffled, whole, photos)


def test_a_rotation_of_features_leaves_the_scores():
    photos = draw(distance=2.0)
    rotation = ortho_group(6, seed=0).rvs()
    rotated = Photos(photos.features @ rotation, photos.text, photos.head @ rotation, photos.labels)
    expected = photos.scores(photos.fit())
    bound = photos.rounding * np.abs(expected).max()
    assert_allclose(rotated.scores(rotated.fit()), expected, rtol=0, atol=bound)


def test_given_frequencies_are_kept():
    photos = draw(distance=2.0)
    given = torch.tensor([0.05, 0.15, 0.8, 0.0])
    found = photos.fit(frequencies=given)
    assert_allclose(found.frequencies, given, rtol=1e-6)
    assert found.counts[3] == 0
    assert photos.probabilities(found).isfinite().all()


def test_frequency_errors_are_the_spread_over_draws():
    """Of 200 draws, of which the standard deviation itself is uncertain by 5 %."""
    fits = [draw(400, distance=8.0, seed=seed).fit() for seed in range(200)]
    spread = torch.stack([fit.frequencies for fit in fits]).std(0)
    assert_allclose(torch.stack([fit.frequency_errors for fit in fits]).mean(0), spread, rtol=0.25)


def test_an_absent_class_wins_no_photos_by_its_absence():
    photos = draw(400, (0.5, 0.3, 0, 0.2), distance=8.0)
    found = photos.fit()
    assert_allclose(found.frequencies[2], 1 / 404, rtol=1e-5)
    assert found.is_absent.tolist() == [False, False, True, False]
    assert (photos.scores(found).argmax(-1) == photos.labels).all()


SMALL = {
    "one_photo": (1, 4, 6),
    "fewer_photos_than_classes": (3, 8, 6),
    "fewer_photos_than_dimensions": (5, 4, 512),
    "one_dimension": (50, 2, 1),
    "one_class": (20, 1, 4),
    "all_of_one": (1, 1, 1),
}


@pytest.mark.parametrize("size", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("scale", [1, 1e-4, 1e4])
def test_small_inputs_have_finite_results(size, scale):
    num_photos, num_classes, width = size
    photos = draw(num_photos, [1 / num_classes] * num_classes, width)
    photos.features *= scale
    found = photos.fit()
    assert all(value.isfinite().all() for value in (*fields(found), found.frequency_errors))
    assert_allclose(found.frequencies.sum(), 1, rtol=1e-5)
    assert_allclose(found.counts.sum(), num_photos, rtol=1e-5)
    assert_allclose(photos.probabilities(found).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("num_photos", [1, 40])
def test_of_photos_all_alike_the_text_says_all(num_photos):
    """No spread, so that the weights are the text's, in the share of its photos among a class's."""
    photos = draw(num_photos)
    photos.features[:] = 0.5
    found = photos.fit()
    shares = TEXT_PHOTOS / (found.counts + TEXT_PHOTOS)
    # The counts before and after the last round differ by less than the bound.
    expected = shares.numpy()[:, None] * TEXT_SCALE * (photos.head - photos.head.mean(0))
    assert_allclose(found.weight, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert all(value.isfinite().all() for value in fields(found))


def test_a_million_photos_add_up():
    """Each of the sums of 3907 batches is wrong by less than a half ulp a batch."""
    photos = draw(1_000_000, (0.7, 0.29, 0.01), width=3, distance=2.0)
    pi, *_, counts, variances = fit64(photos, rounds=1)
    found = photos.fit(sizes=[256] * 3906 + [64], rounds=1)
    bound = 4 * 3907 * HALF_ULP
    assert_allclose(found.counts, counts, rtol=bound)
    assert_allclose(found.frequencies, pi, rtol=bound)
    assert_allclose(found.standard_errors**2, variances + counts * (1 - counts / 1e6), rtol=bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "message"),
    [("features", "features.*Check the images"), ("text", "texts.*Check the log"), ("head", "head.*Check the text")],
)
def test_values_that_are_not_finite_are_refused(name, message, value):
    photos = draw(20)
    getattr(photos, name)[3, 2] = value
    with pytest.raises(NonFiniteError, match=message):
        photos.fit()


def test_all_processes_refuse_what_is_not_finite_in_one():
    photos = draw(20)
    photos.features[3] = float("nan")
    errors = fit_in_processes([take(photos, slice(10)), take(photos, slice(10, None))])
    assert [type(error) for error in errors] == [NonFiniteError] * 2


def test_no_photos():
    with pytest.raises(ValueError, match=r"no photos.*pass one or more"):
        fit_class_mixture(lambda: iter([]), torch.eye(3))
    with pytest.raises(ValueError, match=r"no photos.*pass one or more"):
        take(draw(), slice(0)).fit()
    with pytest.raises(ValueError, match=r"no logits.*one photo or more"):
        log_mean_probability(lambda: iter([torch.empty(0, 3)]))


def test_balanced_texts_equal_their_definition_in_float64():
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 5 + [3, 0, 0, -2]
    single = torch.tensor(logits, dtype=torch.float32)
    probabilities = softmax(logits, -1)
    mean = (probabilities.sum(0) + 1) / (50 + 4)
    found = log_mean_probability(lambda: iter(single.split([1, 30, 19])))
    assert_allclose(found, np.log(mean), rtol=0, atol=1e-5)
    # As if there were two processes with the same photos.
    doubled = log_mean_probability(lambda: iter([single]), lambda values: 2 * values)
    assert_allclose(doubled, np.log((2 * probabilities.sum(0) + 1) / (100 + 4)), rtol=0, atol=1e-5)
    expected = np.log(probabilities / mean / (probabilities / mean).sum(-1, keepdims=True))
    assert_allclose(balance_text(single, found), expected, rtol=0, atol=1e-4)


def test_a_class_that_underflows_stays_finite():
    logits = np.random.default_rng(0).normal(size=(50, 3)) - [0, 0, 500]
    single = torch.tensor(logits, dtype=torch.float32)
    log_mean = log_mean_probability(lambda: iter([single]))
    sums = softmax(logits, -1).sum(0)
    assert_allclose(log_mean, np.log((sums + 1) / (50 + 3)), rtol=0, atol=1e-5)
    expected = log_softmax(logits - log_mean.double().numpy(), -1)
    assert_allclose(balance_text(single, log_mean), expected, rtol=0, atol=2e-4)
