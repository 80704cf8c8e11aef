"""A model measured on images with labels, in every way in which it can classify them."""

from .predictions import EvaluationSettings, PlainCLIP, Predictions, predict_all_ways, remove_parts
from .results import EvaluationFacts, make_report


__all__ = [
    "EvaluationFacts",
    "EvaluationSettings",
    "PlainCLIP",
    "Predictions",
    "make_report",
    "predict_all_ways",
    "remove_parts",
]
