"""Why a model said what it said of a picture, as numbers and as pictures."""

from .explanation import Explanation, explain, overlay
from .figure import plot
from .patch_grid import PatchGrid


__all__ = ["Explanation", "PatchGrid", "explain", "overlay", "plot"]
