"""Files that people upload by mistake or malice: photos of every odd kind, and what are none."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features


# Whether the file holds a picture that can be classified.
OddFiles = dict[str, tuple[bytes, bool]]


def write_odd_files(folder: Path) -> dict[Path, bool]:
    """Write them; tells of each whether a prediction is expected (else a message)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, (content, good) in {**_odd_pictures(), **_odd_shapes(), **_broken(), **_no_pictures()}.items():
        (folder / name).write_bytes(content)
        files[folder / name] = good
    return files


def picture(width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Noise, the same in every call."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and brings one row of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def _odd_pictures() -> OddFiles:
    frames = [picture().rotate(90 * turn) for turn in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 30)
    floats = Image.fromarray(np.random.default_rng(0).random((40, 48), dtype=np.float32))
    pictures = {
        "grey.png": encode(picture(mode="L"), "PNG"),
        "bits.png": encode(picture(mode="1"), "PNG"),
        "palette.png": encode(picture(mode="P"), "PNG"),
        "palette_transparent.png": encode(picture(mode="P"), "PNG", transparency=3),
        "rgba.png": encode(picture(mode="RGBA"), "PNG"),
        "grey_alpha.png": encode(picture(mode="LA"), "PNG"),
        "sixteen_bit.png": encode(sixteen, "PNG"),
        "sixteen_bit.tif": encode(sixteen, "TIFF"),
        "floats.tif": encode(floats, "TIFF"),
        "lab.tif": encode(picture(mode="LAB"), "TIFF"),
        "cmyk.jpg": encode(picture(mode="CMYK"), "JPEG"),
        "cmyk.tif": encode(picture(mode="CMYK"), "TIFF"),
        "grey.jpg": encode(picture(mode="L"), "JPEG"),
        "progressive.jpg": encode(picture(), "JPEG", progressive=True),
        "rotated.jpg": encode(picture(), "JPEG", exif=exif),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "pages.tif": encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "phone.mpo": encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "lossless.webp": encode(picture(), "WEBP", lossless=True),
        "old.bmp": encode(picture(), "BMP"),
        "plain.ppm": encode(picture(), "PPM"),
        "jpeg_named.png": encode(picture(), "JPEG"),
        "png_named.jpg": encode(picture(), "PNG"),
        "no_ending": encode(picture(), "PNG"),
        "UPPER.JPEG": encode(picture(), "JPEG"),
        "name with spaces (1).png": encode(picture(), "PNG"),
        "Vögel-鳥-🐦.png": encode(picture(), "PNG"),
        'quote\'s "and" <b>tag</b>.png': encode(picture(), "PNG"),
        "=1+1,comma;semicolon%20#hash.png": encode(picture(), "PNG"),
        "..leading.dots.png": encode(picture(), "PNG"),
        "junk_behind.png": encode(picture(), "PNG") + b"junk" * 99,
        "x" * 180 + ".png": encode(picture(), "PNG"),
    }
    # "<" and "/" of a name don't survive on every disk; this is what a browser on Linux may send.
    return {name.replace("/", "_"): (content, True) for name, content in pictures.items()}


def _odd_shapes() -> OddFiles:
    return {
        "one_pixel.png": (encode(picture(1, 1), "PNG"), True),
        "two_rows.png": (encode(picture(60, 2), "PNG"), True),
        "wide.png": (encode(picture(2000, 41), "PNG"), True),
        "strip.png": (encode(picture(3000, 1), "PNG"), False),
        "column.png": (encode(picture(1, 3000), "PNG"), False),
        "large.png": (encode(Image.new("RGB", (6000, 4000), "teal"), "PNG"), True),
        "too_large.png": (encode(Image.new("1", (12000, 12000)), "PNG"), False),
        "bomb.png": (png_header(60000, 60000), False),
        "bomb_of_a_row.png": (png_header(2**31 - 1, 1), False),
    }


def _broken() -> OddFiles:
    png, jpeg = encode(picture(), "PNG"), encode(picture(), "JPEG")
    encoders: dict[str, Callable[[], bytes]] = {
        "empty.png": lambda: b"",
        "empty.jpg": lambda: b"",
        "one_byte.png": lambda: b"\x89",
        "truncated.png": lambda: png[: len(png) // 2],
        "truncated.jpg": lambda: jpeg[: len(jpeg) // 2],
        "header_only.png": lambda: png[:33],
        "signature_only.jpg": lambda: jpeg[:4],
        "zeros.png": lambda: bytes(2000),
        "flipped_bytes.png": lambda: png[:60] + bytes(byte ^ 255 for byte in png[60:200]) + png[200:],
        "zero_size.png": lambda: png_header(0, 0),
        "truncated.webp": lambda: encode(picture(), "WEBP")[:60],
        "truncated.gif": lambda: encode(picture(), "GIF")[:40],
    }
    if features.check("avif"):
        avif = encode(picture(), "AVIF")
        encoders["damaged.avif"] = lambda: avif[:268] + bytes(52) + avif[320:]
    return {name: (make(), False) for name, make in encoders.items()}


def _no_pictures() -> OddFiles:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    contents = {
        "notes.txt": b"not a picture",
        "text_named.png": b"not a picture",
        "page.html": b"<html><script>alert(1)</script></html>",
        "page_named.jpg": b"<html><script>alert(1)</script></html>",
        "drawing.svg": svg,
        "drawing_named.png": svg,
        "document.pdf": b"%PDF-1.4\n%%EOF",
        "post.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "packed.gz": gzip.compress(b"not a picture"),
        "program.exe": b"MZ" + bytes(200),
        "movie.mp4": b"\x00\x00\x00\x18ftypmp42" + bytes(200),
        "photo.heic": b"\x00\x00\x00\x18ftypheic" + bytes(200),
        "table.csv": b"file,label\na.png,jay\n",
    }
    return {name: (content, False) for name, content in contents.items()}
