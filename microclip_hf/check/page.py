"""The page that shows the photos to label: each large, with the classes in question and what tells them apart."""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import write_whole
from ..images import UNREADABLE, to_rgb
from ..report.templates import load_template
from ..report.thumbnails import data_uri
from .folder import PAGE, TO_LABEL, Check
from .labels import NONE_OF_THESE, UNKNOWN, read_rows


TEMPLATE = Path(__file__).with_name("check_template.html")
SIDE = 640  # the longer side of a photo on the page, in pixels
QUALITY = 80  # JPEG's
NUM_SENTENCES = 6  # of a class


def write_page(check: Check) -> int:
    """Write `label.html`, of the photos that have no label yet, in the order of `to_label.csv`.

    Returns:
        `int`: how many photos couldn't be read, and aren't shown.
    """
    drawn = set(check.drawn)
    rows = [row for row in read_rows(check.labels) if not row[1].strip() and row[0] in drawn]
    photos = [_show(check, row[0]) for row in rows]
    page = load_template(TEMPLATE).render(
        photos=photos,
        none_of_these=NONE_OF_THESE,
        unknown=UNKNOWN,
        table=TO_LABEL,
        folder=os.path.basename(check.record.photos),
    )
    write_whole(check.folder / PAGE, page)
    return sum(photo["uri"] is None for photo in photos)


def describe_candidates(check: Check, file: str) -> list[tuple[str, list[str]]]:
    """The classes in question, each with sentences that say what it looks like."""
    described = check.record.descriptions
    return [(name, described.get(name, [])[:NUM_SENTENCES]) for name in check.candidates(file)]


def read_photo(check: Check, file: str, side: int = SIDE) -> Image.Image:
    """A photo, upright, its longer side at most so many pixels; an error of `UNREADABLE` where it can't be read."""
    with Image.open(Path(check.record.photos, file)) as image:
        photo = to_rgb(image).copy()
    photo.thumbnail((side, side))
    return photo


def _show(check: Check, file: str) -> dict[str, Any]:
    entry = {"file": file, "classes": describe_candidates(check, file), "uri": None}
    try:
        photo = read_photo(check, file)
    except UNREADABLE:
        return entry
    content = io.BytesIO()
    photo.save(content, "JPEG", quality=QUALITY)
    return {**entry, "uri": data_uri(content.getvalue(), "jpeg"), "width": photo.width, "height": photo.height}
