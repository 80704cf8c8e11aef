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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import huggingface_hub
import torch
import transformers

from .. import __version__
from ..data.class_names import read_class_names
from ..descriptions.asking import Outcome, Questions, ask, write_descriptions
from ..descriptions.chat import EndpointChat, LocalChat, first_line
from ..descriptions.replies import AnswerFile
from ..descriptions.sentences import Fits, fits_text_tower
from ..files import write_whole
from . import command_frame, make_parser, refuse_unknown


LONGEST_TIMEOUT = 86400.0  # seconds; far more overflows in the sockets


@dataclass
class DescribeArguments:
    """The classes, the language model, and what to ask it."""

    class_names: str = field(metadata={"help": "Text file with one class name a line, or JSON."})
    output: str = field(metadata={"help": "The JSON file to write, for --descriptions of microclip adapt."})
    llm: str = field(
        metadata={
            "help": "A chat model for this machine, Hub id or folder; with --base_url the endpoint's name of a model."
        }
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible endpoint (vLLM, TGI, llama.cpp, Ollama, hosted ones), as in "
            "http://localhost:8000/v1. Its key is read from the environment: OPENAI_API_KEY."
        },
    )
    domain: str | None = field(
        default=None, metadata={"help": 'What each class is, as in "a species of flower"; names alone can mislead.'}
    )
    num_sentences: int = field(default=12, metadata={"help": "Sentences a class, from all questions together."})
    questions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Questions with {} for the class name and, where wanted, {similar} for similarly named classes; "
            "how to answer is added. Default: two about the look, one about what tells it from similar classes."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The CLIP that will read the sentences, Hub id or folder: those too long for it are shortened. "
            "Only its tokenizer is loaded. Default: no limit."
        },
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Limit of one reply; a reasoning model needs more."})
    temperature: float = field(default=0.7, metadata={"help": "0 gives the most probable reply, more gives variety."})
    num_workers: int = field(default=4, metadata={"help": "Questions that an endpoint is asked at once."})
    batch_size: int = field(default=8, metadata={"help": "Questions that a model on this machine is asked at once."})
    timeout: float = field(default=300.0, metadata={"help": "Seconds to wait for an endpoint's reply."})
    extra_body: str | None = field(
        default=None,
        metadata={"help": 'What else to send to an endpoint, as JSON, for example \'{"reasoning_effort": "low"}\'.'},
    )


@command_frame("describe", "the replies are kept; the same command goes on")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, ask what wasn't answered before, write the file."""
    parser = make_parser(DescribeArguments, "describe", __doc__)
    stop = threading.Event()
    options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    refuse_unknown(unknown, parser)
    with _first_interrupt_sets(stop):
        outcome = _describe(options, stop)
    if outcome is None:
        raise KeyboardInterrupt
    described = len(read_class_names(options.class_names)) - len(outcome.missing)
    print(f"Saved to {options.output}: {outcome.num_sentences} sentences about {described} classes.")


def _describe(options: DescribeArguments, stop: threading.Event) -> Outcome | None:
    """All but the command line; `None` if `stop` was set before all was answered."""
    questions, extra_body = _check_input(options)
    fits = _load_fits(options.model_name_or_path)
    settings = _settings(options, questions, extra_body)
    with AnswerFile(_partial(options), settings, len(questions)) as answers:
        if answers.num_answered:
            print(f"{answers.num_answered} of {len(questions)} replies are there already, in {answers.path}.")
        if answers.num_answered < len(questions):
            ask(questions, _load_chat(options, extra_body, stop), answers, stop)
        if answers.num_answered < len(questions):
            return None
        unfinished = Path(f"{options.output}.incomplete")
        try:
            outcome = write_descriptions(unfinished, questions, answers, fits)
            _write_meta(options, settings, outcome)
            unfinished.replace(options.output)
        finally:
            unfinished.unlink(missing_ok=True)
    os.remove(answers.path)
    return outcome


def _check_input(options: DescribeArguments) -> tuple[Questions, dict[str, Any] | None]:
    """All that can be wrong is found before a model is loaded or asked."""
    for name in ("num_sentences", "max_new_tokens", "num_workers", "batch_size", "timeout"):
        if not vars(options)[name] > 0:
            raise ValueError(f"--{name} is {vars(options)[name]}; it must be more than 0.")
    if options.timeout > LONGEST_TIMEOUT:
        raise ValueError(f"--timeout is {options.timeout}; it must be at most {LONGEST_TIMEOUT:.0f} seconds, a day.")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature is {options.temperature}; it must be 0 or more, and finite.")
    if not os.path.basename(options.output) or os.path.isdir(options.output):
        raise ValueError(f"--output {options.output!r} isn't the name of a file; pass one, as in descriptions.json.")
    if not os.path.isfile(options.class_names):
        raise ValueError(f"--class_names {options.class_names}: there is no such file.")
    meta, resumed = _meta(options), os.path.exists(_partial(options))
    if existing := [path for path in (options.output, meta) if os.path.exists(path) and (path != meta or not resumed)]:
        raise ValueError(f"--output {options.output}: {existing[0]} exists already; choose another name.")
    if not os.path.isdir(folder := os.path.dirname(os.path.abspath(options.output))):
        raise ValueError(f"--output {options.output}: there is no folder {folder}.")
    if options.extra_body is not None and options.base_url is None:
        raise ValueError("--extra_body is for an endpoint; pass its --base_url too.")
    class_names = read_class_names(options.class_names)
    questions = Questions(class_names, options.questions, options.domain, options.num_sentences)
    return questions, _read_extra_body(options.extra_body)


def _read_extra_body(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
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
    if options.base_url is None:
        return LocalChat(options.llm, options.batch_size, options.max_new_tokens, options.temperature)
    return EndpointChat(
        options.base_url,
        options.llm,
        options.num_workers,
        options.max_new_tokens,
        options.temperature,
        options.timeout,
        extra_body,
        stop,
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
    write_whole(Path(_meta(options)), json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _partial(options: DescribeArguments) -> str:
    return f"{options.output}.partial.jsonl"


def _meta(options: DescribeArguments) -> str:
    return f"{options.output}.meta.json"


@contextlib.contextmanager
def _first_interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C lets the questions on their way come to their end; a second one doesn't."""

    def set_stop(number: int, frame: FrameType | None) -> None:
        print("\nWaiting for the replies on their way; Ctrl-C again leaves without them.", file=sys.stderr)
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    earlier = signal.signal(signal.SIGINT, set_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
