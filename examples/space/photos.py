"""What people upload, read with care: a picture and perhaps a note, or an error that says what to do."""

import os
import warnings

from PIL import Image

from microclip_hf.images import MAX_RATIO, UNREADABLE, to_rgb


Image.init()
# Formats of photos, as far as they are read here (HEIF with pillow-heif). Others run foreign programs (EPS) or are
# nothing that a camera or a browser writes.
FORMATS = sorted({"AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
# A photo is decoded whole, at 3 bytes a pixel or more; a phone's largest has 50 million or 108 at most.
MAX_PIXELS = 110_000_000

# `check_photo` refuses what Pillow would warn of.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_photo(path: str | os.PathLike) -> str | None:
    """A note for the person who uploaded the file, if there is something to say; the pixels aren't decoded.

    Raises:
        ValueError: if it isn't a photo that can be read within reasonable memory.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            # A phone's MPO holds a preview beside its photo.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except UNREADABLE as error:
        raise ValueError(_explain(path, error)) from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"The picture has {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million that are read "
            "here. Upload a smaller copy."
        )
    # Of a longer strip the model would see no more than the middle.
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"The picture is {width} x {height} pixels, a strip more than {MAX_RATIO} times as long as wide. Crop it "
            "to what is to be recognised."
        )
    return f"The file holds {frames} frames or pages; only the first one was used." if frames > 1 else None


def read_photo(path: str | os.PathLike) -> tuple[Image.Image, str | None]:
    """The upright RGB picture, the first frame of several, with the note of [`check_photo`].

    Raises:
        ValueError: as in [`check_photo`], or if the pixels are damaged.
    """
    note = check_photo(path)
    try:
        with _open(path) as image:
            return to_rgb(image), note
    except UNREADABLE as error:
        raise ValueError(_explain(path, error)) from error


def _open(path: str | os.PathLike) -> Image.Image:
    return Image.open(path, formats=FORMATS)


def _explain(path: str | os.PathLike, error: Exception) -> str:
    """What is wrong, without the path that the server keeps the file under."""
    if os.path.getsize(path) == 0:
        return "The file is empty. Upload it again, or another one."
    if isinstance(error, Image.UnidentifiedImageError):
        return f"The file is no picture that is read here: {', '.join(FORMATS)}. Save it as JPEG, and upload that."
    if isinstance(error, Image.DecompressionBombError):
        return f"The picture has more than the {MAX_PIXELS // 10**6} million pixels that are read here."
    return f"The picture is damaged ({error}). Upload another copy."
