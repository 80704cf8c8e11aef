"""From files, tables and the Hub to `datasets` objects with an `image` column and, where there are any, labels."""

from .class_names import read_class_names
from .sources import load_image_folder, load_images, open_dataset


__all__ = ["load_image_folder", "load_images", "open_dataset", "read_class_names"]
