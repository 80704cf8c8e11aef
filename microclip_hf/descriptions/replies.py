"""Replies on disk while they come in: a line of JSON each, so that nothing that was answered is asked again."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FIRST_LINE = b'{"settings"'  # how it begins


@dataclass(frozen=True)
class Reply:
    """What a chat model answered."""

    text: str  # empty where it said nothing
    cut_off: bool = False  # whether it ran into its limit of tokens


class ReplyFile(dict[int, Reply]):
    """Replies by the number of their question, from 0, each also a line of a file, as a context manager.

    The first line holds the settings, on which the replies depend. Replies that the file holds already are kept; other
    settings, or a line that isn't a reply, are an error. A file without replies isn't left behind.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], num_questions: int) -> None:
        super().__init__()
        self.path = Path(path)
        self.settings = settings
        self.num_questions = num_questions

    def __enter__(self) -> "ReplyFile":
        content = self.path.read_bytes() if self.path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]  # the end of a run may have cut the last line off
        first_line, *lines = complete.splitlines() or [b""]
        earlier = _parse(first_line).get("settings") if complete else self.settings
        if content and not (content.startswith(FIRST_LINE) and isinstance(earlier, dict)):
            raise ValueError(
                f"{self.path} doesn't begin with the settings of replies, so it isn't a file of this command. Choose "
                "another `output`, or move the file away."
            )
        self._check_settings(earlier)
        for line_number, line in enumerate(lines, start=2):
            self._read(line_number, line)
        self._file = open(self.path, "ab")
        self._file.truncate(len(complete))
        if not complete:
            self._append({"settings": self.settings})
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if not self:
            os.remove(self.path)

    def add(self, number: int, reply: Reply) -> None:
        """Append a reply; it is out of this process's hands when this returns."""
        self._append({"question": number, "reply": reply.text, "cut_off": reply.cut_off})
        self[number] = reply

    def _append(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()

    def _check_settings(self, earlier: dict[str, Any]) -> None:
        different = [
            f"{name} was {earlier.get(name)!r} and is now {self.settings.get(name)!r}"
            for name in {**earlier, **self.settings}
            if earlier.get(name) != self.settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds the replies of a run with other settings: "
                f"{'; '.join(different)}. Use those settings to go on, choose another `output`, or remove the file."
            )

    def _read(self, line_number: int, line: bytes) -> None:
        content = _parse(line)
        number = content.get("question")
        reply = Reply(content.get("reply"), content.get("cut_off"))
        is_question = isinstance(number, int) and number in range(self.num_questions)
        if not (is_question and isinstance(reply.text, str) and isinstance(reply.cut_off, bool)):
            raise ValueError(
                f"{self.path}, line {line_number}, isn't a reply of this command. Remove the line, or the file to ask "
                "everything anew."
            )
        self[number] = reply


def _parse(line: bytes) -> dict[str, Any]:
    """A line's content, empty where it isn't a JSON object."""
    try:
        content = json.loads(line)
    except (RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
