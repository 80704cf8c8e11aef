"""Small copies of a run's images for its page, read from the trainer's data set or from their files."""

import base64
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from PIL import Image

from ..images import UNREADABLE, decode, to_rgb
from .record import ImageLabel, RunRecord, images_of


# The longer side in pixels, JPEG's quality, and bytes of all of them, in base64.
SIDE = 128
QUALITY = 72
MAX_BYTES = 3_000_000
NAME_LENGTH = 80  # in characters


class Thumbnails:
    """Small JPEGs of images, as data URIs.

    Args:
        images (`Sequence[ImageLabel]`): all of a run.
        read: gives the PIL image of an index, or raises one of `UNREADABLE`.

    Attributes:
        room (`int`): how many bytes are left of `MAX_BYTES`.
        missing (`set[int]`): images that couldn't be read.
    """

    def __init__(self, images: Sequence[ImageLabel], read: Callable[[int], Image.Image]) -> None:
        self.images = images
        self.room = MAX_BYTES
        self.missing: set[int] = set()
        self._read = read

    def show(self, index: int, note: str | None = None) -> dict[str, Any]:
        """One image for the page: its address, `None` where it can't be read, and what to write below it."""
        image = self.images[index]
        name = truncate(os.path.basename(image.file) or f"image {index}")
        entry = {"uri": None, "name": name, "note": note or percent(image.confidence), "label": image.label}
        try:
            picture = to_rgb(self._read(index)).copy()
        except UNREADABLE:
            self.missing.add(index)
            return entry
        picture.thumbnail((SIDE, SIDE))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=QUALITY)
        uri = data_uri(content.getvalue(), "jpeg")
        self.room -= len(uri)
        return {**entry, "uri": uri, "width": picture.width, "height": picture.height}


def image_reader(record: RunRecord, train_dataset: Any = None) -> Callable[[int], Image.Image]:
    """Gives the image of an index, from a trainer's data set if there is one, else from its file."""
    if train_dataset is None:
        return lambda index: _open_file(record, index)
    dataset = images_of(train_dataset)
    if isinstance(dataset, datasets.Dataset) and isinstance(dataset.features.get("image"), datasets.Image):
        # Undecoded, so that large JPEGs are decoded at a fraction of their size.
        dataset = dataset.cast_column("image", datasets.Image(decode=False))

    def read(index: int) -> Image.Image:
        if dataset is None:
            raise ValueError("these are views, or a stream")
        stored = dataset[index]["image"]
        image = decode(stored, lazy=True)
        return _draft(image) if isinstance(stored, dict) else image

    return read


def _open_file(record: RunRecord, index: int) -> Image.Image:
    root = record.facts.get("root")
    file = record.images[index].file
    if root is None or not file:
        raise FileNotFoundError(file)
    return _draft(Image.open(os.path.join(root, file)))


def _draft(image: Image.Image) -> Image.Image:
    """A file just opened; a JPEG of many megapixels will be decoded at a fraction of them."""
    image.draft("RGB", (2 * SIDE, 2 * SIDE))
    return image


def data_uri(content: bytes, kind: str) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def percent(share: float) -> str:
    """A share as the page writes it."""
    return "unknown" if math.isnan(share) else f"{100 * share:.0f} %"


def truncate(text: str, length: int = NAME_LENGTH) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
