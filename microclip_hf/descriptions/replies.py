"""Replies on disk while they come in: a line of JSON each, so that nothing that was answered is asked again."""

import json
import os
from array import array
from typing import Any

from .chat import Reply


FIRST_LINE = b'{"settings"'  # how it begins


class AnswerFile:
    """A file of replies by the number of their question, as a context manager. Replies that it holds already are kept.

    The first line holds the settings, each other one a reply. In memory there are only the places of the lines. A
    file without replies isn't left behind.

    Args:
        path (`str` or `os.PathLike`): the file.
        settings (`dict[str, Any]`): what the replies depend on, of JSON's types.
        num_questions (`int`): questions are numbered from 0.

    Raises:
        ValueError: if it was written with other settings, or holds what isn't a reply.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], num_questions: int) -> None:
        self.path, self._settings = path, settings
        self._places = array("q", [-1]) * num_questions
        self.num_answered = 0

    def __enter__(self) -> "AnswerFile":
        self._file = open(self.path, "ab+")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self.num_answered == 0:
            os.remove(self.path)

    def __contains__(self, number: int) -> bool:
        return self._places[number] >= 0

    def __getitem__(self, number: int) -> Reply:
        self._file.seek(self._places[number])
        line = json.loads(self._file.readline())
        return Reply(line["reply"], line["cut_off"])

    def add(self, number: int, reply: Reply) -> None:
        """Append a reply; it is out of this process's hands when this returns."""
        place = self._append({"question": number, "reply": reply.text, "cut_off": reply.cut_off})
        self._note(number, place)

    def _append(self, content: dict[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        return place

    def _note(self, number: int, place: int) -> None:
        self.num_answered += number not in self
        self._places[number] = place

    def _read(self) -> None:
        """Note where each reply is; a last line that was cut off by the end of a run is removed."""
        place = self._file.seek(0)
        for line_number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n") and (line_number > 1 or line.startswith(FIRST_LINE)):
                break
            content = _parse(line)
            if line_number == 1:
                self._check_first(content.get("settings") if line.startswith(FIRST_LINE) else None)
            elif _is_reply(content) and content["question"] in range(len(self._places)):
                self._note(content["question"], place)
            else:
                raise ValueError(
                    f"{self.path}, line {line_number}, isn't a reply of this command. Remove the line, or the file to "
                    "ask everything anew."
                )
            place += len(line)
        self._file.truncate(place)
        if place == 0:
            self._append({"settings": self._settings})

    def _check_first(self, earlier: Any) -> None:
        settings = self._settings
        if not isinstance(earlier, dict):
            raise ValueError(
                f"{self.path} doesn't begin with the settings of replies, so it isn't a file of this command. Choose "
                "another --output, or move the file away."
            )
        different = [
            f"{name} was {earlier.get(name)!r} and is now {settings.get(name)!r}"
            for name in {**earlier, **settings}
            if earlier.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds the replies of a run with other settings: "
                f"{'; '.join(different)}. Use those settings to go on, choose another --output, or remove the file."
            )


def _parse(line: bytes) -> dict[str, Any]:
    """A line's content, empty where it isn't a JSON object."""
    try:
        content = json.loads(line)
    except (RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_reply(content: dict[str, Any]) -> bool:
    types = {"question": int, "reply": str, "cut_off": bool}
    return all(isinstance(content.get(name), kind) for name, kind in types.items())
