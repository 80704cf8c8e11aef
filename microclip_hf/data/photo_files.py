"""Which files below a folder are photos, and what else lies there that a user should know of."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..images import photo_endings
from ..text_heads import abbreviate
from .folders import FolderContents, describe_models, ending_of


# Pictures that Pillow doesn't open, or not every one, raw ones of cameras, drawings, and films: they are told of.
PICTURE_ENDINGS = "avif avifs dcm exr fit fits hdr heic heif hif j2k jp2 jpx jxl jxr webp xcf"
RAW_ENDINGS = """3fr ari arw bay braw cap cr2 cr3 crw dcr dcs dng drf eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef
    nrw orf ori pef ptx pxn r3d raf raw rw2 rwl rwz sr2 srf srw x3f"""
DRAWING_ENDINGS = "ai emf eps ps svg svgz wmf"
FILM_ENDINGS = """3g2 3gp asf avi divx flc fli flv insv lrv m2t m2ts m2v m4v mkv mov mp4 mpe mpeg mpg mts mxf ogv rm
    rmvb vob webm wmv"""
TOLD_ENDINGS = {
    f".{name}" for names in (PICTURE_ENDINGS, RAW_ENDINGS, DRAWING_ENDINGS, FILM_ENDINGS) for name in names.split()
}


def photo_files(folder: str | os.PathLike) -> list[Path]:
    """The photos below a folder, at any depth: paths relative to it, sorted; an error if there are none.

    Links are followed, save to the folder that the search started from or one above, and each photo counts once,
    however many links lead to it; a file that lies outside counts once in each folder that links to it. Hidden files,
    folders of a system (recycle bins, thumbnails) and of adapted models are passed over. One warning tells of models,
    and of pictures and films that can't be opened.
    """
    contents = _list_photos(folder)
    told = _describe_passed_over(contents)
    if not contents.files:
        raise ValueError(
            f"{folder} holds no image files that can be opened here; pass the folder that holds the photos (JPEG, "
            f"PNG, ...).{told}"
        )
    if told:
        warnings.warn(f"Of what lies in {folder}, some is passed over.{told}", stacklevel=3)
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
    sentences = ""
    endings = sorted(TOLD_ENDINGS & contents.endings.keys())
    if endings:
        counts = ", ".join(f"{contents.endings[ending]} {ending}" for ending in endings)
        sentences += f" Pictures or films that can't be opened here: {counts}; save pictures as JPEG or PNG."
    if contents.broken:
        sentences += f" Links that lead nowhere: {abbreviate([path.as_posix() for path in contents.broken])}."
    return sentences + describe_models(contents)
