"""How far apart numbers may be that differ by rounding alone, on any CPU, and how clear a decision has to be.

Float32 keeps 2^-24 = 6e-8 of a number. In which order a sum is taken depends on the CPU, the library, the number of
threads and the size of the batch. Behind the towers of these tests the entries of unit vectors, and so cosines, then
differ by about 1e-6; a wrong formula changes them by 1e-3 and more. All bounds follow from one between the two.
"""

import numpy as np
import torch


# Absolute, of cosines, of entries of unit vectors, of weights that sum to 1.
COSINE = 1e-5
# Relative, of losses, norms and the like, which follow from logits that are as far apart as their cosines allow.
LOSS = 1e-4
# Relative, of a tensor's gradient (Frobenius norm).
GRADIENT = 1e-4
# Relative to the way that an optimiser went (Frobenius norm), of a tensor's weights. AdamW makes steps of the learning
# rate from any gradient: of an entry whose gradient is zero but for rounding, the direction is rounding's.
WEIGHT = 0.02


def within(scale: float | torch.Tensor = 1.0) -> dict[str, float]:
    """The bound as arguments of `assert_close` and `assert_allclose`.

    Args:
        scale: what cosines were multiplied by: the logit scale for logits, half of it for their softmax (whose slope
            is at most 1/2), the largest magnitude for features and tokens.
    """
    return {"rtol": 0, "atol": COSINE * torch.as_tensor(scale).item()}


def assert_clear(scores: torch.Tensor | np.ndarray, scale: float | None = None) -> None:
    """No row's largest score can change places with another: each may move by the bound.

    Args:
        scores (n, C): cosines times `scale`, or what follows from them, whose argmax is compared.
        scale: see [`within`]; default: the largest magnitude.
    """
    scores = np.asarray(scores, dtype=np.float64)
    scale = np.abs(scores).max() if scale is None else torch.as_tensor(scale).item()
    best = np.sort(scores, axis=-1)[..., -2:]
    gap = np.ptp(best, axis=-1).min()
    assert gap > 2 * COSINE * scale, f"a decision hangs on rounding: the best two are {gap:.1e} apart"


def assert_gradients_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Tensor by tensor, relative."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm()
        assert difference <= GRADIENT * gradient.norm(), f"{name}: {difference / gradient.norm():.1e}"


def assert_weights_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], way: float) -> None:
    """Tensor by tensor, relative to the way that AdamW went.

    Args:
        found, expected: the trained weights by name.
        way: the sum of the learning rates of all steps, about which each entry has moved.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).norm()
        length = way * value.numel() ** 0.5
        assert difference <= WEIGHT * length, f"{name}: {difference:.1e} apart after a way of {length:.1e}"
