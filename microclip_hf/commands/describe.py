"""`microclip describe`: class names -> what a language model says about their look, as a descriptions file."""

import contextlib
import datetime
import hashlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers.hf_argparser import HfArg

from .. import __version__
from ..data.class_names import read_class_names
from ..descriptions.asking import Outcome, ask, write_descriptions
from ..descriptions.chat import EndpointChat, LocalChat, first_line
from ..descriptions.questions import Questions
from ..descriptions.replies import ReplyFile
from ..descriptions.sentences import Fits, fits_text_tower
from ..files import check_writable, whole_file, write_whole
from . import command_frame, naming_options, read_options
from .options import check_files


PARTIAL = ".partial.jsonl"  # what the file of replies is named after the output, until all are there
META = ".meta.json"  # and that of the settings
LONGEST_TIMEOUT = 86400.0  # seconds; far more overflows in the sockets


@dataclass
class DescribeArguments:
    """The classes, the language model, and what to ask it."""

    class_names: str = HfArg(help="Text file with one class name a line, or JSON.")
    output: str = HfArg(help="The JSON file to write, for --descriptions of microclip adapt.")
    llm: str = HfArg(
        help="A chat model for this machine, Hub id or folder, as Qwen/Qwen2.5-7B-Instruct (15.2 GB to download, for "
        "a GPU with 16 to 24 GB) or Qwen/Qwen2.5-1.5B-Instruct (3.1 GB, slowly also on a CPU); with --base_url the "
        "endpoint's name of a model."
    )
    base_url: str | None = HfArg(
        default=None,
        help="Address of an OpenAI-compatible endpoint (vLLM, TGI, llama.cpp, Ollama, hosted ones), as in "
        "http://localhost:8000/v1. Its key is read from the environment: OPENAI_API_KEY.",
    )
    domain: str | None = HfArg(
        default=None, help='What each class is, as in "a species of flower"; names alone can mislead.'
    )
    num_sentences: int = HfArg(default=12, help="Sentences a class, from all questions together.")
    questions: list[str] | None = HfArg(
        default=None,
        help="Questions with {} for the class name and, where wanted, {similar} for similarly named classes; how to "
        "answer is added. Default: two about the look, one about what tells it from similar classes.",
    )
    model_name_or_path: str | None = HfArg(
        default=None,
        help="The CLIP that will read the sentences, Hub id or folder: those too long for it are shortened. Only its "
        "tokenizer is loaded. Default: no limit.",
    )
    max_new_tokens: int = HfArg(default=512, help="Limit of one reply; a reasoning model needs more.")
    temperature: float = HfArg(default=0.7, help="0 gives the most probable reply, more gives variety.")
    num_workers: int = HfArg(default=4, help="Questions that an endpoint is asked at once.")
    batch_size: int = HfArg(default=8, help="Questions that a model on this machine is asked at once.")
    timeout: float = HfArg(default=300.0, help="Seconds to wait for an endpoint's reply.")
    extra_body: str | None = HfArg(
        default=None,
        help='What else to send to an endpoint, as JSON, for example \'{"reasoning_effort": "low"}\'.',
    )


@command_frame("describe", "the replies are kept; the same command goes on")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, ask what wasn't answered before, write the file."""
    (options,) = read_options("describe", __doc__, DescribeArguments, arguments)
    _check_numbers(options)
    _check_files(options)
    extra_body = _read_extra_body(options)
    class_names = read_class_names(options.class_names)
    questions = Questions(class_names, options.questions, options.domain, options.num_sentences)
    fits = _load_fits(options.model_name_or_path)
    settings = _settings(options, questions, extra_body)
    with naming_options("output", "base_url", "timeout", "questions", "max_new_tokens"):
        with ReplyFile(options.output + PARTIAL, settings, len(questions)) as replies:
            if replies:
                print(f"{len(replies)} of {len(questions)} replies are there already, in {replies.path}.")
            if len(replies) < len(questions):
                with _first_interrupt_sets() as stop:
                    ask(questions, _load_chat(options, extra_body, stop), replies, stop)
            if len(replies) < len(questions):
                raise KeyboardInterrupt
        outcome = _write(options, settings, questions, replies, fits)
    num_described = len(class_names) - len(outcome.missing)
    print(f"Saved to {options.output}: {outcome.num_sentences} sentences about {num_described} classes.")


def _write(
    options: DescribeArguments, settings: dict[str, Any], questions: Questions, replies: ReplyFile, fits: Fits | None
) -> Outcome:
    """Write the descriptions, which get their name last, and in place of the replies the settings."""
    with whole_file(options.output) as unfinished:
        outcome = write_descriptions(unfinished, questions, replies, fits)
        _write_meta(options, settings, outcome)
    replies.path.unlink()
    return outcome


def _check_numbers(options: DescribeArguments) -> None:
    for name in ("num_sentences", "max_new_tokens", "num_workers", "batch_size", "timeout"):
        value = vars(options)[name]
        if not value > 0:  # so that NaN is refused too
            raise ValueError(f"--{name} is {value}; it must be more than 0.")
    if options.timeout > LONGEST_TIMEOUT:
        raise ValueError(f"--timeout is {options.timeout}; it must be at most {LONGEST_TIMEOUT:.0f} seconds, a day.")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature is {options.temperature}; it must be 0 or more, and finite.")


def _check_files(options: DescribeArguments) -> None:
    output = Path(options.output)
    if not os.path.basename(options.output) or output.is_dir():
        raise ValueError(f"--output {options.output!r} isn't the name of a file; pass one, as in descriptions.json.")
    check_files(options, "class_names")
    # A run that goes on may have been ended between the two files that it writes, the settings first.
    results = [output] if os.path.exists(options.output + PARTIAL) else [output, Path(options.output + META)]
    for path in results:
        if path.exists():
            raise ValueError(f"--output {options.output}: {path} exists already; choose another name.")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--output {options.output}: there is no folder {folder}.")
    check_writable(folder, "--output: the folder")


def _read_extra_body(options: DescribeArguments) -> dict[str, Any] | None:
    text = options.extra_body
    if text is None:
        return None
    if options.base_url is None:
        raise ValueError("--extra_body is for an endpoint; pass its --base_url too.")
    try:
        extra_body = json.loads(text)
        json.dumps(extra_body, allow_nan=False)  # Python reads NaN and Infinity, and 1e999 as one
    except ValueError as error:
        raise ValueError(f"--extra_body {text} isn't JSON: {error}") from error
    if not isinstance(extra_body, dict):
        raise ValueError(f'--extra_body {text} must be a JSON object, as in \'{{"reasoning_effort": "low"}}\'.')
    return extra_body


def _load_fits(source: str | None) -> Fits | None:
    if source is None:
        return None
    try:
        return fits_text_tower(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {source} must be the Hub id or folder of a CLIP; it can't be loaded: "
            f"{first_line(error)}"
        ) from error


def _load_chat(
    options: DescribeArguments, extra_body: dict[str, Any] | None, stop: threading.Event
) -> LocalChat | EndpointChat:
    limits = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    if options.base_url is None:
        return LocalChat(options.llm, options.batch_size, **limits)
    return EndpointChat(
        options.base_url,
        options.llm,
        options.num_workers,
        **limits,
        timeout=options.timeout,
        extra_body=extra_body,
        stop=stop,
    )


def _settings(options: DescribeArguments, questions: Questions, extra_body: dict[str, Any] | None) -> dict[str, Any]:
    """What the replies depend on. A server that comes back at another address gives the same ones."""
    names = "\n".join(questions.class_names).encode()
    return {
        "llm": options.llm,
        "domain": options.domain,
        "questions": questions.templates,
        "num_sentences": options.num_sentences,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "extra_body": extra_body,
        "class_names": f"{len(questions.class_names)} names, SHA-256 {hashlib.sha256(names).hexdigest()}",
    }


def _write_meta(options: DescribeArguments, settings: dict[str, Any], outcome: Outcome) -> None:
    content = {
        **settings,
        "base_url": options.base_url,
        "model_name_or_path": options.model_name_or_path,
        "num_sentences_written": outcome.num_sentences,
        "classes_without_sentences": outcome.missing,
        "shared_sentences_left_out": outcome.shared,
        "versions": {
            "microclip_hf": __version__,
            "transformers": transformers.__version__,
            "huggingface_hub": huggingface_hub.__version__,
            "torch": torch.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sha256": outcome.sha256,
    }
    write_whole(Path(options.output + META), json.dumps(content, ensure_ascii=False, indent=1) + "\n")


@contextlib.contextmanager
def _first_interrupt_sets() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that the questions on their way come to their end; a second one ends all."""
    stop = threading.Event()

    def set_stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()
        print("\nWaiting for the replies on their way; Ctrl-C again leaves without them.", file=sys.stderr)

    earlier = signal.signal(signal.SIGINT, set_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, earlier)
