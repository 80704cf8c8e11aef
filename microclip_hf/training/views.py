"""The views of an image that self-training compares (arXiv:2510.02270, sections 3.3 and 4), as uint8 arrays.

Weak view: shorter side to the input size, random square crop. Crops: K squares of the original image. Strong view:
random resized crop, flip, RandAugment. Every random choice comes from the generator that is handed in, so that a view
depends on (seed, epoch, image index) and not on the process that makes it. S is the input size in pixels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_utils import OPENAI_CLIP_MEAN

from .. import images
from ..images import ORIENTATION, Box, channels_first, crop_box, cut_square, cut_squares, place_box, to_rgb


STRONG_SCALE = (0.3, 1.0)
STRONG_RATIO = (3 / 4, 4 / 3)
# RandAugment as timm's `rand-m9-mstd0.5-inc1`: two operations an image, each with probability 0.5, magnitude
# N(9, 0.5).
NUM_OPERATIONS = 2
OPERATION_PROBABILITY = 0.5
MAGNITUDE_MEAN = 9.0
MAGNITUDE_STD = 0.5
MAX_MAGNITUDE = 10.0
FILL_COLOR = tuple(round(255 * mean) for mean in OPENAI_CLIP_MEAN)


def draft(image: Image.Image, size: int, crop_ratio: Sequence[float]) -> int:
    """Have an opened JPEG decoded at 1/2, 1/4 or 1/8 of its size where every view is still made by down-sampling.

    The scale is 8, 4, 2, or 1 where the image is decoded whole, as all that isn't an upright grey or RGB JPEG.
    """
    if isinstance(image, JpegImageFile) and image.getexif().get(ORIENTATION, 1) != 1:
        return 1
    width, height = image.size
    strong_side = math.sqrt(STRONG_SCALE[0] * STRONG_RATIO[0] * width * height)
    return images.draft(image, math.floor(min(crop_ratio[0] * min(width, height), strong_side)), size)


def weak_box(width: int, height: int, size: int, rng: np.random.Generator) -> Box:
    """A random square, `size` at a side once the shorter side is resized to `size`, in pixels of the original."""
    short = min(width, height)
    resized_width = int(size * width / short)
    resized_height = int(size * height / short)
    left, top, right, bottom = place_box(size, size, resized_width, resized_height, rng)
    x_scale = width / resized_width
    y_scale = height / resized_height
    # Rounding must not lead out of the picture.
    return left * x_scale, top * y_scale, min(right * x_scale, width), min(bottom * y_scale, height)


def strong_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random box, `STRONG_SCALE` of the area, `STRONG_RATIO` wide to high; after ten misfits a central one."""
    for _ in range(10):
        area = width * height * rng.uniform(*STRONG_SCALE)
        ratio = math.exp(rng.uniform(*map(math.log, STRONG_RATIO)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return place_box(crop_width, crop_height, width, height, rng)
    crop_width = max(1, min(width, round(height * STRONG_RATIO[1])))
    crop_height = max(1, min(height, round(width / STRONG_RATIO[0])))
    left = (width - crop_width) // 2
    top = (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL_COLOR)


def _solarize_add(image: Image.Image, addend: int) -> Image.Image:
    return image.point([min(255, value + addend) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: type) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


# The 15 operations: (image, level = magnitude / 10, sign = -1 or 1 at random) -> image, stronger with the level.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL_COLOR
    ),
    # One bit at least: none would be a black image, and PIL refuses it.
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign: _solarize_add(image, min(128, int(110 * level))),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)),
    "translate_y": lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)),
}


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Operations drawn with replacement, each applied with a probability, magnitude and sign of its own."""
    operations = list(OPERATIONS.values())
    for index in rng.integers(len(operations), size=NUM_OPERATIONS):
        if rng.random() < OPERATION_PROBABILITY:
            magnitude = min(max(rng.normal(MAGNITUDE_MEAN, MAGNITUDE_STD), 0.0), MAX_MAGNITUDE)
            sign = 1 if rng.random() < 0.5 else -1
            image = operations[index](image, magnitude / MAX_MAGNITUDE, sign)
    return image


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Horizontal flip with probability 0.5, RandAugment."""
    return rand_augment(ImageOps.mirror(image) if rng.random() < 0.5 else image, rng)


def make_views(
    image: Image.Image,
    size: int,
    num_crops: int,
    crop_ratio: Sequence[float],
    rng: np.random.Generator,
    may_draft: bool = False,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> dict[str, np.ndarray]:
    """All views of an image of any mode and size, uint8: `weak` and `strong` (3, S, S), `crops` (K, 3, S, S).

    Here `size` is S, `num_crops` is K, 0 or more, and `crop_ratio` the least and greatest side of a crop, as shares of
    the shorter side. Only a file opened for this call alone may be decoded smaller: `may_draft`.
    """
    full_size = image.size
    scale = draft(image, size, crop_ratio) if may_draft else 1
    image = to_rgb(image)
    # Boxes are drawn in pixels of the file; what isn't drafted may have been turned upright.
    width, height = image.size if scale == 1 else full_size

    def view(box: Box) -> Image.Image:
        return cut_square(image, box, size, scale, resample)

    weak = view(weak_box(width, height, size, rng))
    strong = augment(view(strong_box(width, height, rng)), rng)
    # Last, so that the other views don't depend on how many there are.
    boxes = [crop_box(width, height, crop_ratio, rng) for _ in range(num_crops)]
    crops = cut_squares(image, boxes, size, scale, resample)
    return {"weak": channels_first(weak), "strong": channels_first(strong), "crops": crops}
