"""The views of an image that self-training compares (arXiv:2510.02270, sections 3.3 and 4), as uint8 arrays.

Weak view: shorter side to the input size, random square crop. Crops: K squares of the original image. Strong view:
random resized crop, flip, RandAugment. Every random choice comes from the generator that is handed in, so that a view
depends on (seed, epoch, image index) and not on the process that makes it. S is the input size in pixels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from transformers.image_utils import OPENAI_CLIP_MEAN


STRONG_SCALE = (0.3, 1.0)
STRONG_RATIO = (3 / 4, 4 / 3)
# RandAugment as timm's `rand-m9-mstd0.5-inc1`: two operations an image, each with probability 0.5, magnitude
# N(9, 0.5).
NUM_OPERATIONS, OPERATION_PROBABILITY = 2, 0.5
MAGNITUDE_MEAN, MAGNITUDE_STD, MAX_MAGNITUDE = 9.0, 0.5, 10.0
FILL_COLOR = tuple(round(255 * mean) for mean in OPENAI_CLIP_MEAN)


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image from any PIL image: EXIF orientation applied, 16-bit grey scaled, alpha dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        sixteen_bit = image.mode != "I" or values.max(initial=0) > 255
        image = Image.fromarray((values // 256 if sixteen_bit else values).astype(np.uint8))
    return image.convert("RGB")


def weak_view(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Resize the shorter side to `size` (bicubic) and crop a random square; only pixels that are kept are computed."""
    width, height = image.size
    short = min(width, height)
    resized_width, resized_height = int(size * width / short), int(size * height / short)
    left, top = rng.integers(resized_width - size + 1), rng.integers(resized_height - size + 1)
    x_scale, y_scale = width / resized_width, height / resized_height
    box = (left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def random_crop(image: Image.Image, ratio: Sequence[float], rng: np.random.Generator) -> Image.Image:
    """A random square of the image, its side U(ratio) of the shorter side."""
    width, height = image.size
    side = max(1, round(rng.uniform(*ratio) * min(width, height)))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return image.crop((left, top, left + side, top + side))


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random rectangle, `STRONG_SCALE` of the area, `STRONG_RATIO` width to height, resized to a square (bicubic).

    After ten draws that don't fit, the largest central rectangle of a permitted ratio is taken.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*STRONG_SCALE)
        ratio = math.exp(rng.uniform(*map(math.log, STRONG_RATIO)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
            break
    else:
        crop_width = max(1, min(width, round(height * STRONG_RATIO[1])))
        crop_height = max(1, min(height, round(width / STRONG_RATIO[0])))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    box = (int(left), int(top), int(left) + crop_width, int(top) + crop_height)
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


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
    names = list(OPERATIONS)
    for index in rng.integers(len(names), size=NUM_OPERATIONS):
        if rng.random() < OPERATION_PROBABILITY:
            magnitude = min(max(rng.normal(MAGNITUDE_MEAN, MAGNITUDE_STD), 0.0), MAX_MAGNITUDE)
            sign = 1 if rng.random() < 0.5 else -1
            image = OPERATIONS[names[index]](image, magnitude / MAX_MAGNITUDE, sign)
    return image


def strong_view(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Random resized crop, horizontal flip with probability 0.5, RandAugment."""
    image = random_resized_crop(image, size, rng)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return rand_augment(image, rng)


def make_views(
    image: Image.Image, size: int, num_crops: int, crop_ratio: Sequence[float], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """All views of one image.

    Args:
        image (`PIL.Image.Image`): any mode, any size.
        size (`int`): S, the model's input size in pixels.
        num_crops (`int`): K, 0 or more.
        crop_ratio (`Sequence[float]`): least and greatest side of a crop, as shares of the shorter side.
        rng (`numpy.random.Generator`): the source of every random choice.

    Returns:
        uint8 arrays: `weak` (3, S, S), `strong` (3, S, S), `crops` (K, 3, S, S).
    """
    image = to_rgb(image)
    crops = [weak_view(random_crop(image, crop_ratio, rng), size, rng) for _ in range(num_crops)]
    return {
        "weak": _channels_first(weak_view(image, size, rng)),
        "strong": _channels_first(strong_view(image, size, rng)),
        "crops": np.stack([_channels_first(crop) for crop in crops])
        if crops
        else np.zeros((0, 3, size, size), dtype=np.uint8),
    }


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)
