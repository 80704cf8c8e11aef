"""Why a model said what it said of a picture, as numbers and as pictures."""

from typing import TYPE_CHECKING, Any

from .explanation import Explanation, explain, overlay
from .patch_grid import PatchGrid


if TYPE_CHECKING:
    from .figure import plot

__all__ = ["Explanation", "PatchGrid", "explain", "overlay", "plot"]


def __getattr__(name: str) -> Any:
    """`plot` needs matplotlib, of the extra `train`; explaining, as a Space does, shouldn't import it."""
    if name == "plot":
        from .figure import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
