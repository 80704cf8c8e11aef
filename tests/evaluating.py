"""`microclip evaluate` with small blocks, slowly, so that there is time to kill it; a program with its options."""

import sys
import time

from microclip_hf.commands.evaluate import main
from microclip_hf.evaluation.predictions import WayClassifier
from microclip_hf.passes import photo_batches


SECONDS = 0.1  # of a batch


def classify_slowly(self, batch, classify=WayClassifier.__call__):
    time.sleep(SECONDS)
    return classify(self, batch)


if __name__ == "__main__":
    photo_batches.BLOCK = 8
    WayClassifier.__call__ = classify_slowly
    main([*sys.argv[1:], "--batch_size", "4"])
