"""Text files as people save them, and files that are written as a whole or not at all."""

import codecs
import contextlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any


SIGNATURES = {
    b"PK\x03\x04": "a ZIP archive, as .docx, .xlsx and .odt documents are",
    b"%PDF": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an Office document (.doc, .xls)",
    b"\x1f\x8b": "packed with gzip",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PAR1": "a Parquet file",
}
UNFINISHED = "_incomplete_"  # what names of files begin with while they are written
UTF8 = "utf-8-sig"  # with a byte-order mark or without
BYTE_ORDER_MARKS = {  # UTF-32's first, since UTF-16's is its beginning
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: UTF8,
}
WIDE_ENCODINGS = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
# Older encodings, by their names in Python, with what the bytes of their common letters look like.
LEGACY_ENCODINGS = {
    "cp932": ("Shift-JIS", rb"(?:[\x82\x83\x88-\x97][\x40-\xfc])"),
    "euc_kr": ("EUC-KR", rb"(?:[\xb0-\xc8][\xa1-\xfe])"),
    "gb18030": ("GBK", rb"(?:[\xb0-\xd7][\xa1-\xfe])"),
    "big5": ("Big5", rb"(?:[\xa4-\xc6][\x40-\x7e\xa1-\xfe])"),
    "cp1251": ("Windows-1251", rb"[\xc0-\xff]{2,}"),
    "cp1252": ("Windows-1252", rb"[\xc0-\xff]"),
}
CONTROL_BYTES = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f")


def read_text(path: str | os.PathLike) -> str:
    r"""The text of a file in UTF-8, UTF-16 or UTF-32, lines ending with `\n`; an error if it is anything else."""
    data = Path(path).read_bytes()
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            raise ValueError(f"{path} is {kind}, not plain text. Export its text as a plain file in UTF-8.")
    text = _decode(path, data)
    if re.match(r"\s*(<!doctype html|<html)", text, re.IGNORECASE):
        raise ValueError(
            f"{path} is a page of HTML, not plain text. Save the file itself, not the page that shows it."
        )
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def parse_json(path: str | os.PathLike, text: str, form: str = "") -> Any:
    """What a text holds as JSON, no key twice; for errors, `path` is where it is from, and `form` what is expected."""
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (RecursionError, ValueError) as error:
        # As of what a chat answers, with words and marks around it.
        begins_well = text.lstrip()[:1] in ("{", "[", '"')
        advice = "" if begins_well else ". Remove what stands before the first bracket and after the last"
        raise ValueError(f"{path} isn't a JSON file {form}".rstrip() + f": {error}{advice}") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, keep: bool = False) -> Iterator[Path]:
    """Where to write a file that has its name, or replaces an older one, once it is complete.

    Until then it lies beside that, as `_incomplete_{name}`; after an error, or Ctrl-C, it stays there with `keep`.
    """
    path = Path(path)
    incomplete = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        yield incomplete
        incomplete.replace(path)
    except BaseException:
        if not keep:
            incomplete.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_files(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """As [`whole_file`], for files that belong together: a folder from which they move to `folder`, `last` last."""
    incomplete = Path(folder, f"{UNFINISHED}{last}")
    shutil.rmtree(incomplete, ignore_errors=True)  # of a run that was killed
    incomplete.mkdir(parents=True)
    try:
        yield incomplete
        for file in sorted(incomplete.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(Path(folder, file.name))
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file as a whole or not at all, text in UTF-8, halves of characters (surrogates) as JSON's escapes."""
    with whole_file(path) as incomplete:
        incomplete.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


def _decode(path: str | os.PathLike, data: bytes) -> str:
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\x00" in data:
        return _decode_wide(path, data)
    try:
        return data.decode(encoding or UTF8)
    except UnicodeDecodeError as error:
        if encoding in (None, UTF8):
            raise _other_encoding(path, data, error) from error
        raise ValueError(
            f"{path} begins like text in {encoding.upper()} but isn't ({error.reason} at byte {error.start}). Save it "
            "anew, in UTF-8."
        ) from error


def _decode_wide(path: str | os.PathLike, data: bytes) -> str:
    """Text in UTF-16 or UTF-32 without a byte-order mark: of the readings without strange characters the plainest."""
    readings = []
    for encoding in WIDE_ENCODINGS if _may_be_wide(data) else ():
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            kinds = {unicodedata.category(character) for character in set(text) - set("\t\n\r\f")}
            # Control characters, unassigned and private ones: such is no text.
            if not kinds & {"Cc", "Cn", "Co"}:
                readings.append(text)
    if not readings:
        line = data[: data.index(b"\x00")].count(b"\n") + 1
        raise ValueError(f"{path} has NUL bytes, the first in line {line}, so it isn't text. Save it as UTF-8.")
    return max(readings, key=lambda text: sum(character < "\x80" for character in text) / len(text))


def _may_be_wide(data: bytes) -> bool:
    """False for text in UTF-8 with a stray NUL byte, of which UTF-16 would make Chinese."""
    num_control = len(data) - len(data.translate(None, CONTROL_BYTES))
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return 5 * num_control >= len(data)


def _other_encoding(path: str | os.PathLike, data: bytes, error: UnicodeDecodeError) -> ValueError:
    lines = data.split(b"\n")
    number = data[: error.start].count(b"\n") + 1
    line = lines[number - 1].strip()
    encoding = _likely_encoding(b"\n".join(line for line in lines if not line.isascii()))
    if encoding is None:
        return ValueError(f"{path} isn't text in UTF-8: line {number} is {line[:80]!r}. Save the file in UTF-8.")
    name, _ = LEGACY_ENCODINGS[encoding]
    return ValueError(
        f"{path} isn't text in UTF-8, but probably in {name}, in which line {number} is "
        f"{line.decode(encoding, 'replace')[:80]!r}. Save the file in UTF-8, with an editor or `iconv -f {name} -t "
        "UTF-8`."
    )


def _likely_encoding(lines: bytes) -> str | None:
    """The older encoding that lines with bytes above 127 look most like; `None` where they look like none."""
    num_high = len(re.findall(rb"[\x80-\xff]", lines))
    is_mostly_ascii = num_high < 0.3 * len(b"".join(lines.split()))
    shares = {}
    for encoding in ["cp1252"] if is_mostly_ascii else LEGACY_ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            lines.decode(encoding)
            common = b"".join(re.findall(LEGACY_ENCODINGS[encoding][1], lines))
            shares[encoding] = len(common) / len(re.sub(rb"[\x00-\x40]", b"", lines))
    return max(shares, key=shares.__getitem__, default=None)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of equal keys, and what the others hold would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {max(keys, key=keys.count)!r} twice; merge them into one.")
    return content


def check_new_file(path: str, option: str) -> None:
    """Refuse a file that exists or that can't be written, before long work; `option` says what it was named with."""
    if not path:
        raise ValueError(f"{option} is empty; pass the name of a file.")
    if os.path.lexists(path):
        raise ValueError(f"{option} {path} exists already; choose another name.")
    folder = Path(path).parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}; make it.")
    check_writable(folder, f"{option}: the folder")


def check_writable(folder: str | os.PathLike, argument: str = "output_dir") -> None:
    """Refuse a folder, or the nearest one that exists, that files can't be written to; `argument` says whose it is."""
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument} {os.fspath(folder)} can't be written: {error.strerror or error}. Choose another folder, or "
            "change its permissions."
        ) from error


def nearest_folder(folder: str | os.PathLike) -> Path:
    """The folder, or what exists of its parents."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
