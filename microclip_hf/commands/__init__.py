"""The command line: `microclip <command>`; `microclip <command> --help` explains one."""

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm

from .. import __version__
from .parser import OptionParser, UsageError


# Exit codes
USAGE_ERROR = 2
INTERRUPTED = 130  # after Ctrl-C
# Set to anything, this variable shows the traceback of what is expected too.
TRACEBACK = "MICROCLIP_TRACEBACK"
# What is wrong with the input, the machine or the network, mostly; any other exception is a mistake of ours.
EXPECTED = (ImportError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError)
# What each does, and the extra that it needs.
COMMANDS = {
    "adapt": ("adapt a CLIP to a folder of images without labels", "train"),
    "report": ("show what a run learned, as a page to look at", "train"),
    "describe": ("let a language model write the descriptions of classes", "train"),
    "evaluate": ("measure a model on images with labels, in every way that it can predict", "train"),
    "predict": ("label photos, as CSV or Parquet", "train"),
    "explain": ("show where a model looked in a photo, and what it said", "train"),
    "check": ("say by a few labels whether adapting helped", "train"),
    "push": ("upload an adapted model to the Hub", "train"),
    "convert": ("write a CLIP of open_clip's as transformers does", "train"),
    "export": ("write an adapted model as one ONNX file", "onnx"),
}


def main() -> None:
    """Entry point of `microclip`."""
    arguments = sys.argv[1:]
    listing = "\n".join(f"  {name:10} {summary}" for name, (summary, _) in COMMANDS.items())
    usage = f"usage: microclip <command> [options]\n\ncommands:\n{listing}\n\nmicroclip <command> --help explains one."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    if arguments[0] in ("-V", "--version"):
        print(f"microclip {__version__}")
        return
    if arguments[0] not in COMMANDS:
        sys.exit(f"microclip: there is no command {arguments[0]!r}\n\n{usage}")
    try:
        # Only now: other commands need other extras.
        command = importlib.import_module(f".{arguments[0]}", __name__)
    except ModuleNotFoundError as error:
        extra = COMMANDS[arguments[0]][1]
        sys.exit(f'microclip: {error.name} is missing; pip install "microclip_hf[{extra}]" brings it.')
    command.main(arguments[1:])


@contextlib.contextmanager
def command_frame(command: str, interrupted: str) -> Iterator[None]:
    r"""A command's frame: what is expected to go wrong ends it with one line and an exit code, not a traceback.

    `interrupted` says what Ctrl-C leaves behind, unless the `KeyboardInterrupt` does. Warnings are one line too, and a
    letter that the terminal's encoding lacks is printed as `\uXXXX`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook stands in
            stream.reconfigure(errors="backslashreplace")
    format_with_place = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **kwargs: f"microclip {command}: warning: {message}\n"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _close_bars()
        print(f"microclip {command}: interrupted; {str(interrupt) or interrupted}.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UsageError as error:
        print(f"microclip {command}: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except EXPECTED as error:
        if _is_unread(sys.stdout):  # as of `| head`; what is still buffered has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        _close_bars()
        if os.environ.get(TRACEBACK):
            raise
        sys.exit(f"microclip {command}: {_describe(error)}")
    finally:
        warnings.formatwarning = format_with_place


def _is_unread(stream: TextIO) -> bool:
    """Whether nobody reads any more what was printed."""
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    return False


def _close_bars() -> None:
    """End the line of progress bars that an error cut short, so that the next text begins a line of its own."""
    # A copy: bars leave the set as they are closed.
    for bar in list(tqdm._instances):
        bar.close()


def _describe(error: Exception) -> str:
    """What an error says; of one that a process which reads images hands on with its traceback, the last line."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return text


def read_options(
    command: str,
    description: str | None,
    options: type | tuple[type, ...],
    arguments: list[str] | None,
    groups: Mapping[str, Sequence[str]] | None = None,
    required: Sequence[str] = (),
    **others: dict[str, Any],
) -> tuple[Any, ...]:
    """What a command is called with: an instance of each dataclass, then, if there are others, a namespace of these.

    The rest goes to [`OptionParser`]; `others` are what no dataclass can say, such as a folder. A [`UsageError`] says
    what can't be read.
    """
    parser = OptionParser(command, description, options, groups, required, others)
    return parser.parse_args_into_dataclasses(arguments)


@contextlib.contextmanager
def naming_options(*names: str, **options: str) -> Iterator[None]:
    """Errors, and what Ctrl-C says, speak of options, as in --output_dir, where the library speaks of arguments.

    `names` are arguments whose options are called the same; `options` are the names of others, by argument.
    """
    try:
        yield
    except (KeyboardInterrupt, RuntimeError, ValueError) as error:
        text = str(error)
        for argument, option in {**dict(zip(names, names, strict=True)), **options}.items():
            text = text.replace(f"`{argument}`", f"--{option}")
        kind = next(kind for kind in (KeyboardInterrupt, RuntimeError, ValueError) if isinstance(error, kind))
        raise kind(text) from error
