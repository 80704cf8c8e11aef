"""
Draw the contact sheet: a row of the source domain, then a row for each target domain.

    cd examples && python -m birdworld.sheet birdworld/sheet.png
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from .domains import DOMAINS, TARGET_SIZE, source_example


COLUMNS, MARGIN = 12, 130


def draw_sheet() -> Image.Image:
    """Twelve pictures of each domain, the first of its training split, with the domain's name."""
    rows = [("source", [source_example(random.Random(f"sheet {index}"))[0] for index in range(COLUMNS)])]
    for domain in DOMAINS.values():
        images = [example["image"] for example in domain.examples("train", COLUMNS)]
        rows.append((f"{domain.name}\n({domain.role})", images))
    sheet = Image.new("RGB", (MARGIN + COLUMNS * TARGET_SIZE, len(rows) * TARGET_SIZE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows):
        draw.multiline_text((8, row * TARGET_SIZE + 32), title, fill="black", font_size=16)
        for column, image in enumerate(images):
            inset = (TARGET_SIZE - image.width) // 2
            sheet.paste(image, (MARGIN + column * TARGET_SIZE + inset, row * TARGET_SIZE + inset))
    return sheet


if __name__ == "__main__":
    draw_sheet().save(Path(sys.argv[1]))
