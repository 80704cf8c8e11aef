"""What lies below a folder: links followed, each thing once, no folder passed over because it can't be listed."""

import errno
import fnmatch
import itertools
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass
class FolderContents:
    """What lies below a folder, in paths relative to it.

    Args:
        files (`list[Path]`): what was asked for, in order.
        endings (`Counter`): of how many other files, in lower case.
        models (`list[Path]`): folders of adapted models, which are left out.
        broken (`list[Path]`): other links that lead nowhere.
    """

    files: list[Path] = field(default_factory=list)
    endings: Counter = field(default_factory=Counter)
    models: list[Path] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)


class FolderWalk:
    """Finds what lies below a folder, each file and each folder once, and by its own name rather than by a link's.

    Args:
        folder (`str` or `os.PathLike`): where to start, whatever it is called.
        takes, enters: whether a file, or a folder, is wanted; of the parts of its path, relative to `folder`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        takes: Callable[[Parts], bool],
        enters: Callable[[Parts], bool] = lambda parts: True,
    ) -> None:
        self.folder = folder
        self.takes = takes
        self.enters = enters
        self.root = Path(os.path.realpath(folder))
        self.contents = FolderContents()
        self.folders = [Path()]
        self.folder_links = deque()
        self.file_links = []
        # Real paths.
        self.entered = set()
        self.taken = set()

    def run(self) -> FolderContents:
        """Real folders come first, links after them."""
        while self.folders or self.folder_links:
            self._enter(self.folders.pop() if self.folders else self.folder_links.popleft())
        for path in self.file_links:
            real = self._real(path)
            # In the Hub's cache a file outside stands for all photos of the same content: in each folder it counts.
            is_inside = self.root in Path(real).parents
            place = real if is_inside else (real, path.parent)
            if self.taken.isdisjoint((real, place)):
                self.taken.add(place)
                self.contents.files.append(path)
        self.contents.files.sort()
        return self.contents

    def _enter(self, path: Path) -> None:
        real = self._real(path)
        # A link to the start, or to a folder above it, would only lead here again, by longer names.
        holds_root = path.parts and self.root.is_relative_to(real)
        if real in self.entered or holds_root:
            return
        self.entered.add(real)
        entries = _list(os.path.join(self.folder, path))
        if path.parts and _is_model(entries):
            self.contents.models.append(path)
            return
        for entry in entries:
            self._add(path / entry.name, entry, real)

    def _add(self, path: Path, entry: os.DirEntry, real_folder: str) -> None:
        kind = _kind(entry)
        if kind == "folder":
            is_system = any(fnmatch.fnmatchcase(entry.name.lower(), pattern) for pattern in SYSTEM_FOLDERS)
            if not is_system and self.enters(path.parts):
                (self.folder_links if entry.is_symlink() else self.folders).append(path)
        elif self.takes(path.parts):
            if entry.is_symlink():
                self.file_links.append(path)
            else:
                self.taken.add(os.path.join(real_folder, entry.name))
                self.contents.files.append(path)
        elif kind == "file":
            self.contents.endings[ending_of(entry.name)] += 1
        else:
            self.contents.broken.append(path)

    def _real(self, path: Path) -> str:
        return os.path.realpath(os.path.join(self.folder, path))


def match_files(pattern: str) -> list[str]:
    """The files that a pattern stands for, sorted: `*`, `?` and `[...]` as in a shell, `**` for folders at any depth.

    A file that exists is no pattern, nor is a folder that the pattern begins with: "photos [v2]/*.png" are the files
    in the folder of that name, if there is one. Links, hidden files, and folders of systems and models count as in
    [`FolderWalk`], except those that the pattern names before its first special character.

    Raises:
        ValueError: if a folder can't be listed.
    """
    if os.path.exists(pattern) and not os.path.isdir(pattern):
        return [pattern]
    head = pattern
    while head and not os.path.isdir(head):
        parent = os.path.dirname(head)
        head = parent if parent != head else ""
    wanted = Path(pattern).parts[len(Path(head).parts) :]
    walk = FolderWalk(head or ".", lambda parts: _fits(parts, wanted), lambda parts: _leads_to(parts, wanted))
    contents = walk.run()
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
