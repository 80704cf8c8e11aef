"""A pass over photos, by one process or many, whose rows are kept as they come: prediction, evaluation, features."""
