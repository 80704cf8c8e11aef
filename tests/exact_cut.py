"""The normalised cut in float64, and the masks that don't hang on float32's rounding."""

import numpy as np
import scipy.linalg

from microclip_hf.saliency import EPSILON, TIE_TOLERANCE


# How far float32 is from the matrix whose eigenvectors it computes, in the spectral norm: 16 times its rounding. An
# eigenvector, and so each of its entries, is then at most this over the eigengap away (Davis and Kahan).
MATRIX_ERROR = 1e-6
# How far affinities may be apart, relative to an image's largest: twice the error of a patch token.
AFFINITY_ERROR = 2e-6


def laplacian64(graph):
    graph = np.asarray(graph, dtype=np.float64)
    root = np.sqrt(graph.sum(1))
    return np.eye(len(graph)) - graph / np.outer(root, root)


def mask64(fiedler, statistic="std"):
    """The cut, from its definition."""
    fiedler = np.asarray(fiedler, dtype=np.float64)
    magnitude = np.abs(fiedler)
    seed = int(np.argmax(magnitude >= magnitude.max() * (1 - TIE_TOLERANCE)))
    fiedler = fiedler * np.sign(fiedler[seed])
    mask = fiedler > level64(fiedler, statistic)
    if not mask.any():
        mask[seed] = True
    return mask


def level64(fiedler, statistic):
    """What the entries of the salient patches are above."""
    return fiedler.std(ddof=1) if statistic == "std" else fiedler.mean()


def has_one_mask(fiedler, error, statistic):
    """Whether neither the sign nor the mask changes if each entry moves by the error."""
    fiedler = np.asarray(fiedler, dtype=np.float64)
    magnitude = np.abs(fiedler)
    tied = (1 - TIE_TOLERANCE) * magnitude.max()
    signs = np.sign(fiedler[magnitude > tied - 2 * error])
    if (np.abs(magnitude - tied) <= 2 * error).any() and np.ptp(signs) > 0:
        return False
    positive = fiedler * np.sign(fiedler[np.argmax(magnitude >= tied)])
    return np.abs(positive - level64(positive, statistic)).min() > 2 * error


def known_mask(graph, statistic="std", largest_gap=2.0):
    """The mask of a graph whose eigengap is over 1e-3 and which has one mask, otherwise None."""
    values, vectors = scipy.linalg.eigh(laplacian64(graph), subset_by_index=[0, 2])
    gap = values[2] - values[1]
    if 1e-3 < gap < largest_gap and has_one_mask(vectors[:, 1], MATRIX_ERROR / gap, statistic):
        return mask64(vectors[:, 1], statistic)
    return None


def has_no_cut(graph):
    """Whether all patches are alike, or none is like another: then all of them are salient."""
    off_diagonal = graph[~np.eye(len(graph), dtype=bool)]
    is_regular = np.ptp(off_diagonal) == 0 and np.ptp(graph.diagonal()) == 0
    return is_regular and (len(graph) > 2 or graph[0, 1] == 1)


def known_masks(patch_embeds, config):
    """Of each image's patch tokens (B, N, D) the mask, None where it hangs on rounding.

    Affinities that are too close to the threshold may fall on either side of it, if the mask stays.
    """
    masks = []
    for patches in patch_embeds.double().numpy():
        if config.saliency_affinity == "cosine":
            patches /= np.linalg.norm(patches, axis=-1, keepdims=True)
        affinity = patches @ patches.T
        error = AFFINITY_ERROR * np.abs(affinity).max()
        graphs = [np.where(affinity > config.saliency_threshold + move, 1, EPSILON) for move in (-error, error)]
        one, other = (
            np.ones(len(graph), dtype=bool) if has_no_cut(graph) else known_mask(graph, config.saliency_cut)
            for graph in graphs
        )
        is_known = one is not None and other is not None and np.array_equal(one, other)
        masks.append(one if is_known else None)
    return masks
