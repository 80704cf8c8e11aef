"""What a photo is, in training and evaluation alike: its file, its pixels as 8-bit RGB, and boxes cut out of it."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile


with contextlib.suppress(ImportError):  # of the extra `heic`; here, since each process that reads photos comes by
    from pillow_heif import register_heif_opener

    register_heif_opener()

# What Pillow raises for a file that is truncated, corrupt, missing, far too large, or no image at all; on the second
# line for damaged AVIF, TIFF and JPEG 2000 files.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError),
    *(RuntimeError, TypeError, KeyError, MemoryError),
)
ORIENTATION = 0x0112  # of EXIF

# Formats that Pillow lists among its images: films, documents, drawings and data.
NO_PHOTOS = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# JPEGs by other names, of stereo cameras and browsers.
JPEG_ENDINGS = {".mpo", ".jif", ".pjp", ".pjpeg"}
# The greatest length of what is resized by its shorter side, in widths.
MAX_RATIO = 50
# The bits that cameras and scanners give to grey.
DEPTHS = (8, 10, 12, 14, 16)
# Floating-point pictures whose highest value is below are taken to range from 0 to 1: of 8 bits they'd be black.
MAX_UNIT = 16
# Above these shares of pixels below black, or above white, values aren't brightness.
MAX_BELOW = 0.25
MAX_ABOVE = 0.5
# Of 255, in pictures of 16 bits a colour, of which Pillow reads the upper 8: less is as good as black.
NEARLY_BLACK = 16
# Filters that torch has with antialiasing, which PIL always applies.
TORCH_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
# K, and the least and greatest side of a crop as shares of the shorter side.
NUM_CROPS = 8
CROP_RATIO = (0.5, 0.9)
# Left, top, right, bottom.
Box = tuple[float, float, float, float]


def photo_endings() -> set[str]:
    """The endings, `.jpg` and so on, of what the installed Pillow opens, its plug-ins and pillow-heif's included."""
    endings = Image.registered_extensions()  # AVIF's and WebP's are among them where they are supported
    lacking = set() if features.check("jpg_2000") else {"JPEG2000"}
    opened = Image.OPEN.keys() - NO_PHOTOS - lacking
    return JPEG_ENDINGS | {ending for ending, name in endings.items() if name in opened}


def decode(image: Any, lazy: bool = False) -> Image.Image:
    """A PIL image of `{"path": ..., "bytes": ...}`, or itself; with `lazy` opened, not decoded or turned upright."""
    if image is None:
        raise ValueError("there is no image")
    if not isinstance(image, dict):
        return image
    if lazy and image["bytes"] is not None:
        return Image.open(io.BytesIO(image["bytes"]))
    if lazy and os.path.isfile(image["path"] or ""):
        return Image.open(image["path"])
    return datasets.Image().decode_example(image)


def draft(image: Image.Image, side: int, size: int) -> int:
    """Have an opened JPEG decoded at 1/2, 1/4 or 1/8, the least at which `side` pixels of it are `size` or more.

    The scale is 8, 4, 2, or 1 where the image is decoded whole, as all that isn't a grey or RGB JPEG.
    """
    if not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB"):
        return 1
    scale = next((scale for scale in (8, 4, 2) if side >= scale * size), 1)
    width, height = image.size
    return scale if scale > 1 and image.draft(None, (width // scale, height // scale)) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image from any PIL image; of several frames, the one that it stands at, mostly the first.

    EXIF orientation is applied. Alpha is dropped, unless it alone draws the picture: all of one colour is laid on
    white, or if it is light on black. Colours of palettes, CMYK and others are Pillow's.

    Grey of more than 8 bits, signed or not, is taken to have 8, 10, 12, 14 or 16 bits, the fewest that hold its
    brightest pixel, and its upper 8 are kept: v // 256 of 16. Below 0 is black, above 65535 white. Floating-point grey
    with no pixel of `MAX_UNIT` or more ranges from 0 to 1 (255 v, rounded; above 1 is white); other is rounded and
    scaled as whole numbers are. NaN is black, and infinity white or black by its sign.

    Raises:
        ValueError: where values can't be brightness (none at all, more than `MAX_BELOW` negative or `MAX_ABOVE` above
            white, floats beyond 16 bits), or a TIFF of 16 bits is nearly black by its upper 8, all that Pillow reads.
    """
    image.load()  # metadata may come after the pixels
    is_deep = isinstance(image, TiffImageFile) and max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8
    if is_deep and image.mode in ("RGB", "RGBA"):
        _refuse_nearly_black(image)
    with contextlib.suppress(KeyError, SyntaxError, TypeError):  # of damaged metadata; the pixels are there
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scale_to_bytes(np.asarray(image)))
    return image if image.mode == "RGB" else _drop_alpha(image)


def _refuse_nearly_black(image: Image.Image) -> None:
    highest = max(high for _, high in image.getextrema()[:3])
    if highest < NEARLY_BLACK:
        raise ValueError(
            f"The picture's brightest colour is {highest} of 255, by the upper 8 bits of 16, which are all that "
            "Pillow reads. Scale it and save it with 8"
        )


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey of any numbers as uint8, by the rules of [`to_rgb`]."""
    is_float = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if is_float else values
    if finite.size == 0:
        raise ValueError("The picture has no pixel with a value; all are NaN or infinite")
    highest = float(finite.max())
    is_unit = is_float and highest < MAX_UNIT
    deepest = 2 ** DEPTHS[-1] - 1
    white = 1 if is_unit else deepest
    if (is_float and highest > deepest) or (finite < 0).mean() > MAX_BELOW or (finite > white).mean() > MAX_ABOVE:
        raise ValueError(
            f"The picture's values go from {finite.min():g} to {highest:g}; expected brightness, from 0 to 1 or of 8 "
            "to 16 bits. Scale it and save it with 8"
        )
    if is_float:
        values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    values = values.clip(0, white)
    if is_unit:
        return (255 * values).round().astype(np.uint8)
    # The fewest bits that hold the brightest pixel; of those the upper 8 are kept.
    depth = next(depth for depth in DEPTHS if min(highest, white) < 2**depth)
    return (values.round().astype(np.uint16) >> (depth - 8)).clip(0, 255).astype(np.uint8)


def _drop_alpha(image: Image.Image) -> Image.Image:
    """RGB of a picture of 8 bits in any mode."""
    # Colours of a palette may be transparent too; straight to RGB that would be lost.
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    colors = image.convert("RGB")
    if image.mode not in ("LA", "RGBA"):
        return colors
    *extrema, (least_alpha, most_alpha) = image.getextrema()
    if least_alpha == most_alpha or any(low != high for low, high in extrema):
        return colors
    # All of one colour, so that alpha alone draws: on what contrasts with that colour.
    background = "white" if sum(low for low, _ in extrema) < 128 * len(extrema) else "black"
    ground = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def cut_strip(image: Image.Image) -> Image.Image:
    """The middle, `MAX_RATIO` times as long as wide, of a picture that is longer; any other as it is.

    Image processors, which resize the shorter side, would make gigabytes of a line of 20000 pixels, and keep a square.
    """
    longest = MAX_RATIO * min(image.size)
    # From both sides the same, so that the middle stays where it is.
    left = max(0, image.width - longest) // 2
    top = max(0, image.height - longest) // 2
    if left == top == 0:
        return image
    return image.crop((left, top, image.width - left, image.height - top))


def place_box(box_width: int, box_height: int, width: int, height: int, rng: np.random.Generator) -> Box:
    """A box of this size anywhere in the picture, in whole pixels."""
    left = int(rng.integers(width - box_width + 1))
    top = int(rng.integers(height - box_height + 1))
    return left, top, left + box_width, top + box_height


def crop_box(width: int, height: int, ratio: Sequence[float], rng: np.random.Generator) -> Box:
    """A random square, its side U(ratio) of the shorter side."""
    side = max(1, round(rng.uniform(*ratio) * min(width, height)))
    return place_box(side, side, width, height, rng)


def cut_square(
    image: Image.Image, box: Box, size: int, scale: int = 1, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The box of a file that is decoded at 1 / scale of its size, resized to a square."""
    # Exact: a pixel of a draft is scale x scale pixels of the file, or what is left of them at its end.
    return image.resize((size, size), resample, box=tuple(edge / scale for edge in box))


def cut_squares(
    image: Image.Image,
    boxes: Sequence[Box],
    size: int,
    scale: int = 1,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Each box as by [`cut_square`], channels first, `(len(boxes), 3, size, size)`.

    Boxes of whole pixels are resized by torch where it has the filter: up to two levels off, but three times as fast.
    """
    if not boxes:
        return np.zeros((0, 3, size, size), dtype=np.uint8)
    if scale > 1 or resample not in TORCH_FILTERS:
        return np.stack([channels_first(cut_square(image, box, size, scale, resample)) for box in boxes])
    pixels = as_tensor(image)
    squares = [pixels[:, top:bottom, left:right] for left, top, right, bottom in boxes]
    return torch.stack([resize_pixels(square, (size, size), resample) for square in squares]).numpy()


def as_tensor(image: Image.Image) -> torch.Tensor:
    """Pixels of an RGB picture, uint8 `(3, height, width)`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_pixels(pixels: torch.Tensor, size: tuple[int, int], resample: Image.Resampling) -> torch.Tensor:
    """The same in another `(height, width)`, by one of `TORCH_FILTERS`."""
    options = {"size": size, "mode": TORCH_FILTERS[resample], "antialias": True}
    return torch.nn.functional.interpolate(pixels[None], **options)[0]


def channels_first(image: Image.Image) -> np.ndarray:
    """Pixels as `(3, height, width)`."""
    return np.asarray(image).transpose(2, 0, 1)
