"""`microclip predict` with small blocks, slowly, so that there is time to kill it; a program with its options."""

import sys
import time

from microclip_hf.commands.predict import main
from microclip_hf.passes import photo_batches
from microclip_hf.prediction import Classifier


SECONDS = 0.02  # of a batch


def classify_slowly(self, pixel_values, classify=Classifier.__call__):
    time.sleep(SECONDS)
    return classify(self, pixel_values)


if __name__ == "__main__":
    photo_batches.BLOCK = 8
    Classifier.__call__ = classify_slowly
    main([*sys.argv[1:], "--batch_size", "4"])
