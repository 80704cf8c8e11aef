"""`plot`, by the name of the module that it was in."""

from .explain import plot as plot
