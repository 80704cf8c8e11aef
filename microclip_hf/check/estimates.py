"""What labels of a stratified sample say of all photos: means, and intervals that hold with few labels.

A population of N photos lies in strata of `N_h` photos, `W_h = N_h / N`. Of `n_h` drawn ones a value x is known: 1, 0
or -1 for a difference between two models, 1 or 0 for being right. The mean over all N is estimated by the stratified
mean `sum_h W_h mean_h(x)`, which is the Horvitz-Thompson estimator for inclusion probabilities `n_h / N_h` (Horvitz
and Thompson, JASA 1952; Cochran, Sampling Techniques, 1977, section 5.3). Its variance is

    V = sum_h W_h^2 (1 - n_h / N_h) v_h / n_h,    v_h the variance of x in stratum h.

The interval inverts the score test, as those of Wilson (JASA 1927) for one share, of Miettinen and Nurminen
(Statistics in Medicine 1985) and of Tango (Statistics in Medicine 1998) for differences do: it holds every mean m with
`|estimate - m| <= t sqrt(V(m))`, where V(m) is the variance that x would have if m were the mean. Under m the outcomes
k of stratum h have the probabilities

    p_hk ~ b_hk / (1 - theta_h y_k),    theta_h = u_h / (1 + |u_h|),    u_h ~ u N_h / n_h,

y being x scaled to [-1, 1], with u such that the mean is m. Of one stratum these are the most likely ones that have
this mean; of several, those of which a label stands for more photos give way further. `b_hk` are the observed shares
after each stratum got one more photo, of the outcomes that all strata have (each counting half a photo more), so that
strata in which all labels are alike aren't taken for certain. Of one stratum and two outcomes this is Wilson's
interval, with the finite population's correction and `t` of n - H degrees of freedom.

No interval reaches beyond what the photos without a label allow; where all have one it has no width, and where one
photo is left without a label it reaches from the least that this allows to the most.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


CONFIDENCE = 0.95
ADDED = 1.0  # photos that each stratum gets, of the outcomes of all strata
ADDED_EACH = 0.5  # photos of each outcome that all strata together get
MIN_DEGREES = 3  # of freedom, below which the quantile's expansion is wrong
STEPS = 40  # halvings of the angle that u is the tangent of
LARGEST_ANGLE = math.pi / 2 - 1e-9  # beyond, theta is rounded to 1


@dataclass(frozen=True)
class Estimate:
    """A mean over all photos, from -1 to 1, and its 95 % interval."""

    value: float
    low: float
    high: float


def stratified_estimate(counts: np.ndarray, values: np.ndarray, sizes: np.ndarray, population: int) -> Estimate:
    """The mean of a value over all photos, with an interval (see the head of this module).

    Args:
        counts (`np.ndarray` of shape `(num_strata, num_outcomes)`): labelled photos, at least one in each stratum.
        values (`np.ndarray` of shape `(num_outcomes,)`): the value of each outcome, from -1 to 1.
        sizes (`np.ndarray` of shape `(num_strata,)`): photos of each stratum.
        population (`int`): all photos, those of no stratum here too, whose value is 0.

    Raises:
        ValueError: if a stratum has no labelled photo, or more than it has photos.
    """
    counts, values, sizes = (np.asarray(each, dtype=float) for each in (counts, values, sizes))
    drawn = counts.sum(1)
    if not len(counts):
        return Estimate(0.0, 0.0, 0.0)
    if (drawn < 1).any() or (drawn > sizes).any():
        raise ValueError(f"Strata of {sizes.tolist()} photos have {drawn.tolist()} labels; expected 1 to all in each.")
    rest = (sizes - drawn).sum()
    known = float((counts @ values).sum())
    if not rest:
        return Estimate(known / population, known / population, known / population)
    value = float(sizes @ (counts @ values / drawn)) / population
    # What the photos without a label can add, at the least and at the most.
    lowest, highest = ((known + rest * extreme) / population for extreme in (values.min(), values.max()))
    if rest == 1:  # no variance of a sample says what one photo is
        return Estimate(value, min(lowest, value), max(highest, value))
    shift = _Shift(counts, values, sizes, population)
    low, high = (shift.find(value, sign) for sign in (1, -1))
    return Estimate(value, float(np.clip(low, lowest, value)), float(np.clip(high, value, highest)))


class _Shift:
    """Outcomes of all strata as they would be with another mean, by one number u from -inf to inf."""

    def __init__(self, counts: np.ndarray, values: np.ndarray, sizes: np.ndarray, population: int) -> None:
        drawn = counts.sum(1)
        shared = counts.sum(0) + ADDED_EACH
        self.base = (counts + ADDED * shared / shared.sum()) / (drawn + ADDED)[:, None]
        self.values = values
        self.scaled = 2 * (values - values.min()) / np.ptp(values) - 1
        self.weights = sizes / population
        self.per_label = sizes / drawn * (drawn.sum() / sizes.sum())
        self.factors = self.weights**2 * (1 - drawn / sizes) / drawn
        self.quantile = t_quantile(max(drawn.sum() - len(counts), MIN_DEGREES))

    def moments(self, u: float) -> tuple[float, float]:
        """The mean over all photos, and the variance of its estimate."""
        u = u * self.per_label
        theta = u / (1 + np.abs(u))
        shares = self.base / (1 - theta[:, None] * self.scaled)
        shares /= shares.sum(1, keepdims=True)
        means = shares @ self.values
        variances = np.maximum(shares @ self.values**2 - means**2, 0)
        return float(self.weights @ means), float(self.factors @ variances)

    def find(self, value: float, sign: int) -> float:
        """The mean that a value is just `quantile` standard deviations above (`sign` 1) or below (-1)."""
        low, high = -LARGEST_ANGLE, LARGEST_ANGLE
        for _ in range(STEPS):
            middle = (low + high) / 2
            mean, variance = self.moments(math.tan(middle))
            if value - mean > sign * self.quantile * math.sqrt(variance):
                low = middle
            else:
                high = middle
        return mean


def t_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t for 3 degrees of freedom or more (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class Comparison:
    """What labels say of two models on the same photos; accuracies are `None` where no label is of photos on which
    they agree, though there are such.
    """

    difference: Estimate  # the second's accuracy less the first's
    accuracies: tuple[Estimate | None, Estimate | None]


def compare(right: np.ndarray, strata: np.ndarray, differs: np.ndarray, sizes: np.ndarray) -> Comparison:
    """Compare two models by the labels of some photos.

    Args:
        right (`np.ndarray` of shape `(num_labelled, 2)`): whether each model is right on each labelled photo.
        strata (`np.ndarray` of shape `(num_labelled,)`): the stratum of each.
        differs, sizes: `(num_strata,)`, as in [`~sampling.Draw`]. A stratum without a label is put together with the
            next of its kind (collapsed strata; Cochran 1977, section 5A.12).

    Raises:
        ValueError: if no label is of photos on which the models differ, though there are such.
    """
    right = np.asarray(right, dtype=int)
    merged = _collapse(np.bincount(strata, minlength=len(sizes)), differs)
    strata, num_strata = merged[strata], merged.max() + 1
    totals = np.bincount(merged, weights=sizes, minlength=num_strata)
    # Outcomes of a photo: both wrong, the second right alone, the first right alone, both right.
    outcomes = np.zeros((num_strata, 4), dtype=int)
    np.add.at(outcomes, (strata, right[:, 1] + 2 * right[:, 0]), 1)
    kinds = np.array([differs[merged == stratum][0] for stratum in range(num_strata)])
    if not outcomes[kinds].sum(1).all():
        raise ValueError("No photo on which the models differ has a label; label some of these.")
    population = int(totals.sum())
    differences = np.stack([outcomes[:, 1], outcomes[:, 2], outcomes[:, 0] + outcomes[:, 3]], 1)[kinds]
    difference = stratified_estimate(differences, np.array([1, -1, 0]), totals[kinds], population)
    if not outcomes.sum(1).all():
        return Comparison(difference, (None, None))
    first, second = (outcomes[:, columns].sum(1) for columns in ([2, 3], [1, 3]))
    pairs = (np.stack([own, outcomes.sum(1) - own], 1) for own in (first, second))
    accuracies = tuple(stratified_estimate(pair, np.array([1, 0]), totals, population) for pair in pairs)
    return Comparison(difference, accuracies)


def _collapse(labelled: np.ndarray, differs: np.ndarray) -> np.ndarray:
    """For each stratum the number, from 0, of the one that it belongs to once those without a label are put to the
    one before of their kind, or after, where there is one.
    """
    merged = np.arange(len(labelled))
    for kind in (True, False):
        members = np.flatnonzero(differs == kind)
        known = members[labelled[members] > 0]
        for stratum in members:
            if len(known):
                before = known[known <= stratum]
                merged[stratum] = before[-1] if len(before) else known[0]
            else:
                merged[stratum] = members[0]
    return np.unique(merged, return_inverse=True)[1]
