"""Small copies of a run's images for its page, and how the page writes numbers, names and pictures."""

import base64
import io
import math
import os
from typing import Any

import datasets
from PIL import Image

from ..images import UNREADABLE, decode, to_rgb
from .record import RunRecord, images_of


# The longer side in pixels, JPEG's quality, and bytes of all of them, in base64.
SIDE = 128
QUALITY = 72
MAX_BYTES = 3_000_000
NAME_LENGTH = 80  # in characters
NUM_PARTS = 2  # of a path, below an image: its folder and its own name


class Thumbnails:
    """Small JPEGs of a run's images, as data URIs, read from `train_dataset` or, without it, from the images' files;
    `room` is what is left of `MAX_BYTES`, `missing` are those that can't be read.
    """

    def __init__(self, record: RunRecord, train_dataset: Any = None) -> None:
        dataset = images_of(train_dataset)
        if isinstance(dataset, datasets.Dataset) and isinstance(dataset.features.get("image"), datasets.Image):
            # Undecoded, so that large JPEGs are decoded at a fraction of their size.
            dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.record = record
        self.dataset = dataset
        self.room = MAX_BYTES
        self.missing: set[int] = set()

    def show(self, index: int, note: str | None = None) -> dict[str, Any]:
        """One image for the page: its address, `None` where it can't be read, and what to write below it."""
        image = self.record.images[index]
        path = image.file or f"image {index}"
        entry = {
            "uri": None,
            "path": truncate_left(path),
            "parts": [truncate_left(part) for part in last_parts(path)],
            "note": note or percent(image.confidence),
            "label": image.label,
        }
        try:
            # A copy, since it is scaled in place and may be the data set's own.
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

    def _read(self, index: int) -> Image.Image:
        if self.dataset is not None:
            stored = self.dataset[index]["image"]
        else:
            root = self.record.facts.get("root")
            file = self.record.images[index].file
            if root is None or not file:
                raise FileNotFoundError(file)
            stored = {"path": os.path.join(root, file), "bytes": None}
        image = decode(stored, lazy=True)
        if isinstance(stored, dict):
            # Just opened: a JPEG of many megapixels will be decoded at a fraction of them.
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
        return image


def data_uri(content: bytes, kind: str) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def percent(share: float) -> str:
    """A share as the page writes it."""
    return "unknown" if math.isnan(share) else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def truncate(text: str, length: int = NAME_LENGTH) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def truncate_left(path: str, length: int = NAME_LENGTH) -> str:
    """A path of at most so many characters, whose end stays: the file's own name, and its folder before it."""
    return path if len(path) <= length else f"…{path[1 - length :]}"


def last_parts(path: str) -> list[str]:
    """A file's folder and own name, after what stands for other folders."""
    parts = path.replace(os.sep, "/").split("/")
    return parts if len(parts) <= NUM_PARTS else ["…", *parts[-NUM_PARTS:]]
