"""Which files below a folder are photos, and what else lies there that a user should know of."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..images import photo_endings
from ..text_heads import abbreviate
from .folders import FolderContents, describe_models, ending_of


@dataclass(frozen=True)
class OtherKind:
    """Files that are told of where Pillow doesn't open them, or not every one: how they are called, and what to do."""

    name: str  # in the singular
    endings: str
    advice: str | None


OTHER_KINDS = (
    OtherKind("HEIC photo", "heic heics heif heifs hif", 'pip install "microclip_hf[heic]" reads them'),
    OtherKind(
        "raw file",
        """3fr ari arw bay braw cap cr2 cr3 crw dcr dcs dng drf eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef
        nrw orf ori pef ptx pxn r3d raf raw rw2 rwl rwz sr2 srf srw x3f""",
        "export them as JPEG",
    ),
    OtherKind("picture", "avif avifs dcm exr fit fits hdr j2k jp2 jpx jxl jxr webp xcf", "save them as JPEG or PNG"),
    OtherKind("drawing", "ai emf eps ps svg svgz wmf", "save them as PNG"),
    OtherKind(
        "film",
        """3g2 3gp asf avi divx flc fli flv insv lrv m2t m2ts m2v m4v mkv mov mp4 mpe mpeg mpg mts mxf ogv rm
        rmvb vob webm wmv""",
        None,
    ),
)


def photo_files(folder: str | os.PathLike) -> list[Path]:
    """The photos below a folder, at any depth: paths relative to it, sorted; an error if there are none.

    Links are followed, save to the folder that the search started from or one above, and each photo counts once,
    however many links lead to it; a file that lies outside counts once in each folder that links to it. Hidden files,
    folders of a system (recycle bins, thumbnails) and of adapted models are passed over. One warning tells of models,
    and counts the pictures and films that can't be opened, by kind.
    """
    contents = _list_photos(folder)
    told = _describe_passed_over(contents)
    if not contents.files:
        raise ValueError(
            f"{folder} holds no image files that can be opened here; pass the folder that holds the photos (JPEG, "
            f"PNG, ...).{told}"
        )
    if told:
        warnings.warn(f"Not all that lies in {folder} counts.{told}", stacklevel=3)
    return contents.files


def holds_photos(folder: str | os.PathLike) -> bool:
    """Whether [`photo_files`] finds any; an error likewise where a folder can't be listed."""
    return bool(_list_photos(folder).files)


def _list_photos(folder: str | os.PathLike) -> FolderContents:
    endings = photo_endings()
    return FolderContents(folder, lambda parts: ending_of(parts[-1]) in endings)


def refuse_undecodable(paths: Sequence[str]) -> None:
    """Refuse files whose names aren't Unicode, as of old archives: no table can hold them."""
    wrong = [path for path in paths if path.encode(errors="replace").decode() != path]
    if wrong:
        raise ValueError(
            f"The names of {len(wrong)} of {len(paths)} images aren't valid Unicode: {abbreviate(wrong)}. Rename "
            "them, for example by 'convmv -r -f latin1 -t utf8 --notest FOLDER' where they come from an old Windows."
        )


def _describe_passed_over(contents: FolderContents) -> str:
    """Sentences, each with a space before it; none where there is nothing to tell."""
    kinds = list(filter(None, (_describe_kind(kind, contents.endings) for kind in OTHER_KINDS)))
    sentences = f" Passed over: {', '.join(kinds)}." if kinds else ""
    if contents.broken:
        sentences += f" Links that lead nowhere: {abbreviate([path.as_posix() for path in contents.broken])}."
    return sentences + describe_models(contents)


def _describe_kind(kind: OtherKind, counts: Mapping[str, int]) -> str | None:
    """How many files there are of a kind, their endings, and what to do; `None` where there are none."""
    endings = [f".{name}" for name in kind.endings.split() if counts.get(f".{name}")]
    if not endings:
        return None
    number = sum(counts[ending] for ending in endings)
    named = ", ".join(endings)
    notes = f"{named}; {kind.advice}" if kind.advice else named
    return f"{number} {kind.name}{'' if number == 1 else 's'} ({notes})"
