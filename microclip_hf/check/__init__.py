"""Did adaptation help? A few labels, of photos drawn so that they tell most, and what they say of all photos."""

from .estimates import Comparison, Estimate, compare, stratified_estimate
from .run import CheckInputs, extend_check, finish_check, start_check
from .sampling import Draw, draw_photos


__all__ = [
    "CheckInputs",
    "Comparison",
    "Draw",
    "Estimate",
    "compare",
    "draw_photos",
    "extend_check",
    "finish_check",
    "start_check",
    "stratified_estimate",
]
