"""What lies below a folder: links followed, each thing once, no folder passed over because it can't be listed."""

import errno
import fnmatch
import itertools
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..configuration_microclip import MicroCLIPConfig
from ..text_heads import abbreviate


# Folders, in lower case, of deleted files, former states and thumbnails; on a NAS (Synology, QNAP, NetApp, Netgear,
# Buffalo, Nextcloud), of Windows, Linux and macOS, and of Lightroom and Picasa. Hidden ones, such as .Trash-1000, are
# passed over as all hidden ones.
SYSTEM_FOLDERS = (
    *("@eadir", "#recycle", "#snapshot", "@sharesnap", "@tmp", "@synoresource", "@__thumb", "@recycle"),
    *("@recycle bin", "@recently-snapshot", "~snapshot", "network trash folder", "temporary items", "trashbox"),
    *("files_trashbin", "$recycle.bin", "recycler", "recycled", "system volume information", "found.[0-9][0-9][0-9]"),
    *("lost+found", "__macosx", "*.lrdata", "*.lrcat-data", "picasa2temp", "ipod photo cache"),
)

Parts = tuple[str, ...]


class FolderContents:
    """What lies below a folder, each file and each folder once, by its own name rather than by a link's.

    `takes` and `enters` say by the parts of its path whether a file, or a folder, is wanted. Paths are relative to the
    folder: `files` are what is wanted, in order; `endings` counts those of other files, in lower case; `models` are
    folders of adapted models, left out, and `broken` other links to nowhere. An error if a folder can't be listed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        takes: Callable[[Parts], bool],
        enters: Callable[[Parts], bool] = lambda parts: True,
    ) -> None:
        self.files: list[Path] = []
        self.endings: Counter[str] = Counter()
        self.models: list[Path] = []
        self.broken: list[Path] = []
        self._folder = folder
        self._takes = takes
        self._enters = enters
        self._root = Path(os.path.realpath(folder))
        # Still to be entered, or to be taken if nothing else leads there.
        self._folders = [Path()]
        self._folder_links: deque[Path] = deque()
        self._file_links: list[Path] = []
        # Real paths.
        self._entered: set[str] = set()
        self._taken: set[str | tuple[str, Path]] = set()
        self._walk()
        self.files.sort()

    def _walk(self) -> None:
        """Real folders come first, links after them."""
        while self._folders or self._folder_links:
            self._enter(self._folders.pop() if self._folders else self._folder_links.popleft())
        for path in self._file_links:
            real = self._real(path)
            # In the Hub's cache a file outside stands for all photos of the same content: in each folder it counts.
            is_inside = self._root in Path(real).parents
            place = real if is_inside else (real, path.parent)
            if self._taken.isdisjoint((real, place)):
                self._taken.add(place)
                self.files.append(path)

    def _enter(self, path: Path) -> None:
        real = self._real(path)
        # A link to the start, or to a folder above it, would only lead here again, by longer names.
        holds_root = path.parts and self._root.is_relative_to(real)
        if real in self._entered or holds_root:
            return
        self._entered.add(real)
        entries = _list(os.path.join(self._folder, path))
        if path.parts and _is_model(entries):
            self.models.append(path)
            return
        for entry in entries:
            self._add(path / entry.name, entry, real)

    def _add(self, path: Path, entry: os.DirEntry, real_folder: str) -> None:
        kind = _kind(entry)
        if kind == "folder":
            is_system = any(fnmatch.fnmatchcase(entry.name.lower(), pattern) for pattern in SYSTEM_FOLDERS)
            if not is_system and self._enters(path.parts):
                (self._folder_links if entry.is_symlink() else self._folders).append(path)
        elif self._takes(path.parts):
            if entry.is_symlink():
                self._file_links.append(path)
            else:
                self._taken.add(os.path.join(real_folder, entry.name))
                self.files.append(path)
        elif kind == "file":
            self.endings[ending_of(entry.name)] += 1
        else:
            self.broken.append(path)

    def _real(self, path: Path) -> str:
        return os.path.realpath(os.path.join(self._folder, path))


def match_files(pattern: str) -> list[str]:
    """The files that a pattern stands for, sorted: `*`, `?` and `[...]` as in a shell, `**` for folders at any depth.

    A file that exists is no pattern, nor is a folder that it begins with, such as "photos [v2]" in "photos
    [v2]/*.png". Links, hidden files, and folders of systems and models count as in [`FolderContents`], except those
    that the pattern names before its first special character.
    """
    if os.path.exists(pattern) and not os.path.isdir(pattern):
        return [pattern]
    head = pattern
    while head and not os.path.isdir(head):
        parent = os.path.dirname(head)
        head = parent if parent != head else ""
    wanted = Path(pattern).parts[len(Path(head).parts) :]
    contents = FolderContents(head or ".", lambda parts: _fits(parts, wanted), lambda parts: _leads_to(parts, wanted))
    if contents.models:
        warnings.warn(f"Some of what matches {pattern} is passed over.{describe_models(contents)}", stacklevel=3)
    return sorted(os.path.join(head, file) for file in contents.files)


def _fits(parts: Parts, wanted: Parts) -> bool:
    """Whether a path is one that a pattern stands for."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[start:], wanted[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _leads_to(parts: Parts, wanted: Parts) -> bool:
    """Whether below a folder there may be paths that a pattern stands for."""
    # Up to the first `**` each part of the pattern is one of the path.
    fixed = tuple(itertools.takewhile(lambda part: part != "**", wanted))
    is_deep_enough = len(parts) >= len(wanted) and fixed == wanted
    return not is_deep_enough and all(map(fnmatch.fnmatch, parts, fixed))


def _list(folder: str) -> list[os.DirEntry]:
    """What lies in a folder, by name, hidden things aside."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(_describe_failure(folder, error)) from error


def _kind(entry: os.DirEntry) -> str:
    """What a thing is: "folder", "file" (a pipe or a device too), or "link to nowhere"."""
    try:
        if entry.is_symlink():
            os.stat(entry.path)
        return "folder" if entry.is_dir() else "file"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return "link to nowhere"
        raise ValueError(_describe_failure(entry.path, error)) from error


def _describe_failure(path: str, error: OSError) -> str:
    return (
        f"{path} can't be looked into: {error.strerror or error}. See to it that you may read it and that its drive "
        "is there, or move it away."
    )


def _is_model(entries: Sequence[os.DirEntry]) -> bool:
    """Whether a folder holds an adapted model, with whose report and pictures we filled it."""
    path = next((entry.path for entry in entries if entry.name == CONFIG_NAME), None)
    if path is None:
        return False
    try:
        config = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MicroCLIPConfig.model_type


def describe_models(contents: FolderContents) -> str:
    """A sentence with a space before it; none where there are no models."""
    names = abbreviate([path.as_posix() for path in contents.models])
    return f" Folders of adapted models, whose pictures are no photos: {names}." if contents.models else ""


def ending_of(name: str) -> str:
    """A file's ending, as in `.jpg`, in lower case."""
    return os.path.splitext(name)[1].lower()
