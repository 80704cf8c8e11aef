"""Which photos to label, so that few labels tell two models apart: strata, and one random order of all photos.

Where both models say the same, the difference between them is 0 whatever the photo shows. So most labels go to photos
on which they differ, in strata by how much surer one model is than the other, and some to the rest, which the accuracy
of each model needs. Within a stratum every photo is as likely as any other: n of its N photos are labelled, each with
probability n / N (stratified sampling without replacement; Cochran, Sampling Techniques, 3rd ed. 1977, chapter 5).
"""

from dataclasses import dataclass

import numpy as np


NUM_DIFFER = 5  # strata of photos on which the models differ, at most
NUM_AGREE = 2
MIN_LABELS = 6  # of a stratum, on average, when it is made
DIFFER_SHARE = 0.75  # of the labels


@dataclass(frozen=True)
class Draw:
    """The order in which photos are labelled, of which any beginning is a stratified random sample.

    Args:
        order (`np.ndarray` of shape `(num_photos,)`): indices of photos.
        strata (`np.ndarray` of shape `(num_photos,)`): the stratum of each photo, numbers from 0.
        differs (`np.ndarray` of shape `(num_strata,)`): whether the models differ on the photos of a stratum.
    """

    order: np.ndarray
    strata: np.ndarray
    differs: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Photos of each stratum, `(num_strata,)`."""
        return np.bincount(self.strata, minlength=len(self.differs))


def draw_photos(differs: np.ndarray, scores: np.ndarray, num_labels: int, seed: int = 0) -> Draw:
    """Put photos into strata, and into a random order.

    The next label always goes to the stratum h with the largest `w_h / (2 a_h + 1)`, where `a_h` photos of it were
    drawn already (Sainte-Lague's rule): `w_h` is its share of the photos of its kind, times the labels' share of that
    kind. So more labels only go on where fewer ended. What a stratum has too few photos for goes to the others.

    Args:
        differs (`np.ndarray` of shape `(num_photos,)`): whether the two models give a photo different classes.
        scores (`np.ndarray` of shape `(num_photos, 2)`): each model's probability of its class. Only their order
            counts: of the difference where models differ, of the sum where they agree.
        num_labels (`int`): how many labels are planned at first; the number of strata follows from it.
        seed (`int`): of the random order.
    """
    differs = np.asarray(differs, dtype=bool)
    planned = {True: DIFFER_SHARE * num_labels, False: (1 - DIFFER_SHARE) * num_labels}
    strata = np.empty(len(differs), dtype=int)
    kinds = []
    for kind, most, signs in ((True, NUM_DIFFER, (1, -1)), (False, NUM_AGREE, (1, 1))):
        members = np.flatnonzero(differs == kind)
        if len(members):
            count = int(np.clip(min(planned[kind], len(members)) // MIN_LABELS, 1, most))
            strata[members] = len(kinds) + _equal_groups(scores[members] @ signs, count)
            kinds += [kind] * count
    kinds = np.array(kinds, dtype=bool)
    return Draw(_order(strata, kinds, np.random.default_rng(seed)), strata, kinds)


def _equal_groups(values: np.ndarray, count: int) -> np.ndarray:
    """Groups of equal size by rising value, numbers from 0."""
    groups = np.empty(len(values), dtype=int)
    groups[np.argsort(values, kind="stable")] = np.arange(len(values)) * count // len(values)
    return groups


def _order(strata: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All photos, those of a stratum in random order, strata by Sainte-Lague's rule."""
    shuffled = rng.permutation(len(strata))
    sizes = np.bincount(strata, minlength=len(kinds))
    totals = np.where(kinds, sizes[kinds].sum(), sizes[~kinds].sum())
    weights = np.where(kinds, DIFFER_SHARE, 1 - DIFFER_SHARE) * sizes / totals
    # A photo's rank in its stratum, from 0, and so how the rule values it.
    ranks = np.empty(len(strata), dtype=int)
    for stratum in range(len(kinds)):
        members = shuffled[strata[shuffled] == stratum]
        ranks[members] = np.arange(len(members))
    values = weights[strata] / (2 * ranks + 1)
    return np.lexsort((strata, -values))
