"""What classes look like, in sentences: files of descriptions, and a language model that is asked for them."""

from .files import load_descriptions, read_descriptions, save_descriptions


__all__ = ["load_descriptions", "read_descriptions", "save_descriptions"]
