"""What a run's files and results are called, for all who write, read or show them."""

import os
from collections.abc import Mapping


# In the output folder: the labels of the images, the page about the run, and what else belongs to that page.
LABELS = "pseudo_labels.csv"
REPORT = "report.html"
REPORT_DIR = "report"
FACTS = os.path.join(REPORT_DIR, "run.json")
# Accuracies on test images, by their names in a run's results, and of whom they are.
ACCURACIES = {
    "zero_shot_accuracy": "CLIP with the class names",
    "cupl_accuracy": "CLIP with the descriptions",
    "adapted_accuracy": "this model",
}
# The same where there is little room.
SHORT_ACCURACIES = {
    "zero_shot_accuracy": "names",
    "cupl_accuracy": "descriptions",
    "adapted_accuracy": "adapted",
}


def accuracy_line(results: Mapping[str, float]) -> str:
    """A run's accuracies as one line, "names 10.5 % -> adapted 76.5 %"; empty where nothing was measured.

    Args:
        results (`Mapping[str, float]`): fractions by the names in `ACCURACIES`; other names don't count.
    """
    measured = (f"{title} {100 * results[name]:.1f} %" for name, title in SHORT_ACCURACIES.items() if name in results)
    return " -> ".join(measured)
