"""`make_report`, by the name of the module that it was in."""

from .evaluation import make_report as make_report
