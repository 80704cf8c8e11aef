"""`to_rgb`, by the name of the module that it was in."""

from .images import to_rgb as to_rgb
