"""Which photos are drawn, and what their labels say, against arithmetic, scipy, and photos that are known whole."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from microclip_hf.check import compare, draw_photos, stratified_estimate
from microclip_hf.check.estimates import t_quantile


ROOT = Path(__file__).parents[1]
DIFFERENCE = np.array([1, -1, 0])
RIGHT = np.array([1, 0])
# Halving an angle 60 times leaves 2^-60 of it; sums of a few float64 numbers are good to 1e-12.
EXACT = 1e-9


def make_draw(num=400, differ=150, num_labels=60, seed=0):
    rng = np.random.default_rng(1)
    differs = rng.permutation(num) < differ
    return differs, draw_photos(differs, rng.random((num, 2)), num_labels, seed)


# The draw


def test_more_labels_go_on_where_fewer_ended():
    """Any beginning holds each stratum's share, to one photo, and nothing is drawn twice."""
    differs, draw = make_draw()
    assert sorted(draw.order) == list(range(len(differs)))
    shares = np.where(draw.differs, 0.75, 0.25) * draw.sizes
    for kind in (True, False):
        shares[draw.differs == kind] /= draw.sizes[draw.differs == kind].sum()
    for num in (10, 30, 60, 100, 140):
        drawn = np.bincount(draw.strata[draw.order[:num]], minlength=len(draw.sizes))
        assert np.abs(drawn - num * shares).max() <= 1


def test_strata_hold_what_they_say():
    differs, draw = make_draw()
    for stratum, kind in enumerate(draw.differs):
        assert set(differs[draw.strata == stratum]) == {kind}
    assert np.ptp(draw.sizes[draw.differs]) <= 1 and np.ptp(draw.sizes[~draw.differs]) <= 1


def test_strata_are_ordered_by_how_much_surer_one_model_is():
    scores = np.random.default_rng(0).random((300, 2))
    draw = draw_photos(np.ones(300, dtype=bool), scores, 60)
    gaps = scores[:, 0] - scores[:, 1]
    for stratum in range(len(draw.sizes) - 1):
        assert gaps[draw.strata == stratum].max() <= gaps[draw.strata == stratum + 1].min()


def test_each_photo_of_a_stratum_is_as_likely():
    """Counts over seeds, against the binomial's range (5 standard deviations)."""
    num_seeds = 400
    counts = np.zeros(60)
    for seed in range(num_seeds):
        _, draw = make_draw(60, 30, 20, seed)
        counts[draw.order[:20]] += 1
    drawn = np.bincount(draw.strata[draw.order[:20]], minlength=len(draw.sizes))
    expected = (drawn / draw.sizes)[draw.strata]
    spread = np.sqrt(num_seeds * expected * (1 - expected))
    assert (np.abs(counts - num_seeds * expected) <= 5 * spread).all()


@pytest.mark.parametrize(("differ", "expected"), [(0, 0), (20, 20), (400, 60)])
def test_few_that_differ_are_all_drawn(differ, expected):
    differs, draw = make_draw(differ=differ)
    assert differs[draw.order[:60]].sum() == expected


def test_a_seed_draws_the_same_and_another_differently():
    first, again, other = (make_draw(seed=seed)[1].order for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


# Intervals


@pytest.mark.parametrize("degrees", [3, 5, 10, 55, 1000])
def test_quantiles_are_students(degrees):
    """Of the expansion the first term left out is below 0.1 % of the quantile from 3 degrees on."""
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-3 if degrees == 3 else 1e-3)


@pytest.mark.parametrize(("right", "drawn"), [(0, 10), (3, 10), (32, 40), (40, 40)])
def test_one_share_has_wilsons_interval(right, drawn):
    """By scipy, at the level at which the normal quantile is what t is for 95 %."""
    level = 2 * stats.norm.cdf(t_quantile(drawn - 1)) - 1
    wilson = stats.binomtest(right, drawn).proportion_ci(level, method="wilson")
    found = stratified_estimate([[right, drawn - right]], RIGHT, [1e12], 10**12)
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert found.value == pytest.approx(right / drawn)


@pytest.mark.parametrize("counts", [(9, 3, 8), (20, 0, 5), (0, 0, 12), (1, 1, 46)])
def test_a_difference_has_the_score_interval_of_the_likeliest_outcomes(counts):
    """At both ends, where scipy's optimiser finds the likeliest shares that have this difference."""
    size = 200
    drawn = sum(counts)
    found = stratified_estimate([counts], DIFFERENCE, [size], size)
    shared = np.add(counts, 0.5)
    weights = np.add(counts, shared / shared.sum())  # with one photo of the shared outcomes
    for end in (found.low, found.high):
        shares = likeliest_shares(weights, end)
        variance = (shares @ DIFFERENCE**2 - end**2) * (1 - drawn / size) / drawn
        assert abs(found.value - end) == pytest.approx(t_quantile(drawn - 1) * variance**0.5, rel=1e-3)


def likeliest_shares(weights, difference):
    """By the shares of one outcome, which leave the others no choice."""

    def shares_of(second):
        return np.array([second + difference, second, 1 - 2 * second - difference])

    low, high = max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    best = optimize.minimize_scalar(
        lambda second: -(weights @ np.log(shares_of(second))), bounds=(low, high), options={"xatol": 1e-12}
    )
    return shares_of(best.x)


def test_the_estimate_is_unbiased():
    """Over every sample of two from each of two strata, its mean is the truth."""
    strata = [[1, 1, 0, -1], [0, 0, -1]]
    samples = itertools.product(*(itertools.combinations(values, 2) for values in strata))
    values = []
    for chosen in samples:
        counts = [[own.count(value) for value in DIFFERENCE] for own in chosen]
        values.append(stratified_estimate(counts, DIFFERENCE, [4, 3], 10).value)
    assert np.mean(values) == pytest.approx((1 - 1) / 10, abs=EXACT)


def test_where_all_have_a_label_nothing_is_uncertain():
    found = stratified_estimate([[4, 1, 2], [0, 3, 3]], DIFFERENCE, [7, 6], 30)
    assert (found.low, found.value, found.high) == (0, 0, 0)


def test_where_one_is_left_its_label_decides():
    """By arithmetic: of 30 photos the known sum is 2, and the last adds -1, 0 or 1."""
    found = stratified_estimate([[4, 1, 2], [0, 1, 5]], DIFFERENCE, [7, 7], 30)
    assert (found.low, found.high) == pytest.approx((1 / 30, 3 / 30))
    assert found.value == pytest.approx((3 - 7 / 6) / 30)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 12)] * 3, st.integers(0, 40)).filter(lambda own: sum(own[:3])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 50),
)
def test_intervals_hold_the_estimate_and_nothing_impossible(strata, others):
    """Swapped models have the mirrored interval; no end needs more wins or losses than photos are left."""
    counts = np.array([own[:3] for own in strata])
    sizes = counts.sum(1) + [own[3] for own in strata]
    population = int(sizes.sum()) + others
    found = stratified_estimate(counts, DIFFERENCE, sizes, population)
    assert found.low <= found.value <= found.high
    known, rest = counts[:, 0].sum() - counts[:, 1].sum(), sizes.sum() - counts.sum()
    assert (known - rest) / population - EXACT <= found.low and found.high <= (known + rest) / population + EXACT
    swapped = stratified_estimate(counts[:, [1, 0, 2]], DIFFERENCE, sizes, population)
    assert (-swapped.high, -swapped.low) == pytest.approx((found.low, found.high), abs=EXACT)


@pytest.mark.parametrize(("counts", "sizes"), [([[0, 0, 0]], [5]), ([[2, 2, 2]], [5])])
def test_impossible_counts_are_refused(counts, sizes):
    with pytest.raises(ValueError, match="expected 1 to all in each"):
        stratified_estimate(counts, DIFFERENCE, sizes, 10)


# Comparisons


def test_the_difference_is_that_of_the_accuracies():
    differs, draw = make_draw()
    right = np.random.default_rng(2).random((400, 2)) < (0.4, 0.7)
    right[~differs, 1] = right[~differs, 0]
    chosen = draw.order[:60]
    found = compare(right[chosen], draw.strata[chosen], draw.differs, draw.sizes)
    clip, adapted = found.accuracies
    assert adapted.value - clip.value == pytest.approx(found.difference.value, abs=EXACT)
    whole = compare(right[draw.order], draw.strata[draw.order], draw.differs, draw.sizes)
    assert [each.value for each in whole.accuracies] == pytest.approx(right.mean(0).tolist())
    assert whole.difference.low == whole.difference.high


def test_a_stratum_without_a_label_joins_its_neighbour():
    """As if both had been one from the beginning."""
    right = np.array([[0, 1], [1, 0], [0, 1], [1, 1]])
    differs = np.array([True, True, True, False])
    sizes = np.array([5, 6, 7, 10])
    found = compare(right, np.array([0, 0, 2, 3]), differs, sizes)
    joined = compare(right, np.array([0, 0, 1, 2]), differs[1:], np.array([11, 7, 10]))
    assert found == joined


def test_labels_of_one_kind_alone():
    right, differs, sizes = np.array([[0, 1], [1, 0]]), np.array([True, False]), np.array([5, 6])
    assert compare(right, np.array([0, 0]), differs, sizes).accuracies == (None, None)
    with pytest.raises(ValueError, match="on which the models differ"):
        compare(right, np.array([1, 1]), differs, sizes)


def test_models_that_never_differ_are_equal():
    found = compare(np.array([[1, 1], [0, 0]]), np.array([0, 0]), np.array([False]), np.array([9]))
    assert (found.difference.low, found.difference.high) == (0, 0)
    assert found.accuracies[0].low < 0.5 < found.accuracies[0].high


# Simulated, in short; `examples/check_simulation.py` makes the table of the docs.


@pytest.fixture(scope="module")
def simulation():
    return runpy.run_path(str(ROOT / "examples" / "check_simulation.py"))


@pytest.mark.parametrize("case", ["`garden`", "`steppe`", "equal models", "2 % of 5000 differ"])
def test_intervals_hold_the_truth_and_are_narrow(simulation, case):
    """Of 150 draws 95 % hold it, to 3 standard deviations (1.8 %); the width is that of the page's table."""
    found = simulation["simulate"](simulation["list_populations"]()[case], 150)
    assert found["covers"][0] >= 0.95 - 3 * 0.018
    assert found["ratio"] <= 0.6


def test_the_page_has_the_table_of_the_results(simulation):
    results = json.loads((ROOT / "docs" / "results" / "check.json").read_text())
    assert simulation["as_markdown"](results) == (ROOT / "docs" / "results" / "check.md").read_text()
    assert simulation["as_markdown"](results) in (ROOT / "docs" / "check.md").read_text()
