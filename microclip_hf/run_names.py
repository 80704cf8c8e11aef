"""What a run's files and results are called, for all who write, read or show them."""

# In the output folder: the labels of the images, the page about the run, and what else belongs to that page.
LABELS = "pseudo_labels.csv"
REPORT = "report.html"
REPORT_DIR = "report"
# Accuracies on test images, by their names in a run's results, and of whom they are.
ACCURACIES = {
    "zero_shot_accuracy": "CLIP with the class names",
    "cupl_accuracy": "CLIP with the descriptions",
    "adapted_accuracy": "this model",
}
