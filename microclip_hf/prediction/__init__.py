"""What unlabelled photos show: the best classes of each, from one process to many; a photo in memory no longer."""

from ..data.photo_sources import find_photos, open_hub_photos, open_photos
from .predictions import Classifier, Prediction, predict_photos


__all__ = ["Classifier", "Prediction", "find_photos", "open_hub_photos", "open_photos", "predict_photos"]
