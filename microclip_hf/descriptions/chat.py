"""Chat models: one in this process through transformers, or one behind an OpenAI-compatible endpoint.

Both have `replies(questions)`: `(number, question)` go in, `(number, Reply)` come out as they are ready, in any order.
"""

import email.utils
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError
from safetensors import SafetensorError
from tenacity import RetryCallState, Retrying, retry_if_exception, sleep_using_event, stop_after_attempt
from tenacity.stop import stop_when_event_set
from transformers import AutoModelForCausalLM, pipeline

from ..model_sources import announce_download, describe_problem
from .replies import Reply


logger = logging.getLogger(__name__)

NUM_TRIES = 6
FIRST_WAIT = 1.0  # seconds before the second try, doubled for each more
LONGEST_WAIT = 300.0  # seconds; an endpoint that asks for more is given up
# Where a Hugging Face token may go: to Hugging Face itself, and to Inference Endpoints, whose protected ones open with
# nothing else. Those are run by others too; for one that shouldn't have the token OPENAI_API_KEY comes first.
HUGGINGFACE_HOSTS = (".huggingface.co", ".endpoints.huggingface.cloud")
NO_KEY = "none"  # With None, huggingface_hub would send the Hugging Face token to any host.
ADVICE = {
    401: "Is OPENAI_API_KEY set, to a key of this endpoint?",
    403: "Is OPENAI_API_KEY set, to a key that may use this model?",
    404: "Is the address right, and {model!r} the endpoint's name of a model?",
}


class ChatError(RuntimeError):
    """A chat model can't be used; the text says what to do."""


@dataclass
class LocalChat:
    """A chat model of transformers, in this process; a `ChatError` where it can't be loaded, or isn't a chat model."""

    source: str  # Hub id or folder of a causal language model whose tokenizer has a chat template
    batch_size: int  # questions answered at once
    max_new_tokens: int  # the limit of one reply
    temperature: float  # 0 gives always the most probable reply

    def __post_init__(self) -> None:
        try:
            problem = describe_problem(self.source)
            if problem:
                raise ValueError(problem)
            announce_download(self.source)
            # Left to itself, the pipeline also takes models of other kinds, and fails with them later.
            model = AutoModelForCausalLM.from_pretrained(self.source, dtype="auto", device_map="auto")
            self._pipeline = pipeline(
                "text-generation",
                model=model,
                tokenizer=self.source,
                batch_size=self.batch_size,
                return_full_text=False,
                max_new_tokens=self.max_new_tokens,
                do_sample=self.temperature > 0,
                temperature=self.temperature or None,
            )
        except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ChatError(
                f"The language model {self.source} can't be loaded: {first_line(error)} Pass the Hub id or the folder "
                "of a causal language model of transformers, or with `base_url` an endpoint that serves another."
            ) from error
        tokenizer = self._pipeline.tokenizer
        if not tokenizer.chat_template:
            raise ChatError(
                f"{self.source} has no chat template, so it only continues texts; take a model that was trained to "
                "answer, often called -Instruct or -Chat."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def replies(self, questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Reply]]:
        """The replies, batch by batch."""
        questions = iter(questions)
        while batch := list(islice(questions, self.batch_size)):
            chats = [[{"role": "user", "content": question}] for _, question in batch]
            for (number, _), (output,) in zip(batch, self._pipeline(chats), strict=True):
                text = output["generated_text"]
                # The pipeline doesn't say how a text ended; its tokens are counted anew.
                length = len(self._pipeline.tokenizer(text, add_special_tokens=False)["input_ids"])
                yield number, Reply(text, cut_off=length >= self.max_new_tokens)


@dataclass
class EndpointChat:
    """A chat model behind an OpenAI-compatible endpoint: vLLM, TGI, llama.cpp, Ollama, or a hosted one.

    Busy servers, dropped connections and time-outs are tried again, with growing pauses or the one asked for. A
    `ChatError` where the address isn't one or holds a password, or huggingface_hub is offline.
    """

    base_url: str  # as in http://localhost:8000/v1
    model: str  # the endpoint's name of it
    num_workers: int  # questions asked at once
    max_new_tokens: int  # the limit of one reply
    temperature: float  # 0 gives always the most probable reply
    timeout: float = 300.0  # seconds to wait for a reply
    extra_body: dict[str, Any] | None = None  # sent with each question; None as a value leaves a field out
    stop: threading.Event = field(default_factory=threading.Event)  # once set, as after an error, nothing is asked

    def __post_init__(self) -> None:
        _check_address(self.base_url)
        if is_offline_mode():
            raise ChatError("HF_HUB_OFFLINE=1 also forbids requests to endpoints; unset it for this command.")
        self._client = InferenceClient(
            base_url=self.base_url, api_key=find_api_key(self.base_url), timeout=self.timeout
        )
        self._retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=_pause,
            stop=stop_when_event_set(self.stop) | stop_after_attempt(NUM_TRIES) | _is_long_wait,
            sleep=sleep_using_event(self.stop),
            before_sleep=self._log,
            retry_error_callback=self._give_up,
        )

    def replies(self, questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Reply]]:
        """The replies as they come; after a `ChatError` those on their way still come, and then it is raised."""
        unasked = iter(questions)
        on_their_way: dict[Future[Reply | None], int] = {}
        error = None
        while True:
            for number, question in islice(unasked, self.num_workers - len(on_their_way)):
                on_their_way[_start(self._ask, question)] = number
            if not on_their_way:
                break
            for future in wait(on_their_way, return_when=FIRST_COMPLETED).done:
                number = on_their_way.pop(future)
                if future.exception() is not None:
                    error = error or future.exception()
                    unasked = iter(())
                    self.stop.set()
                elif future.result() is not None:
                    yield number, future.result()
        if error is not None:
            raise error

    def _ask(self, question: str) -> Reply | None:
        """One reply, after as many tries as it takes; `None` if stopped before there is one."""
        try:
            return self._retrying(self._try, question)
        except (HTTPError, OSError) as error:
            raise ChatError(self._explain(error)) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ChatError(
                f"{self.base_url} answered what isn't a chat completion ({error}). Is it an OpenAI-compatible "
                "endpoint? Its address mostly ends with /v1."
            ) from error

    def _try(self, question: str) -> Reply | None:
        if self.stop.is_set():  # in the pause before this try
            return None
        output = self._client.chat_completion(
            [{"role": "user", "content": question}],
            model=self.model,
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            extra_body=self.extra_body,
        )
        if not output.choices:
            raise ValueError(f"it has no choices: {dict(output)}"[:300])
        choice = output.choices[0]
        text = choice.message.content or ""  # empty after a filter, or where all tokens were thoughts
        if not isinstance(text, str):
            raise TypeError(f"its content is a {type(text).__name__}")
        return Reply(text, cut_off=choice.finish_reason == "length")

    def _log(self, state: RetryCallState) -> None:
        logger.warning("%s Trying again in %.0f s.", self._explain(state.outcome.exception()), state.upcoming_sleep)

    def _give_up(self, state: RetryCallState) -> None:
        """An error after the last try, unless an interruption made it the last."""
        if not self.stop.is_set():
            error = state.outcome.exception()
            reason = f"Gave up after {state.attempt_number} tries."
            if _is_long_wait(state):
                reason = f"It asks to come back in {state.upcoming_sleep:.0f} s."
            raise ChatError(f"{self._explain(error)} {reason}") from error

    def _explain(self, error: BaseException) -> str:
        """An error of the connection or the server, in one line with what to do."""
        if isinstance(error, InferenceTimeoutError):
            return f"{self.base_url} gave no reply within {self.timeout:.0f} s (`timeout`)."
        if not isinstance(error, HfHubHTTPError):
            return f"{self.base_url} can't be reached ({error or type(error).__name__}). Is it running?"
        status = error.response.status_code
        text = " ".join((error.server_message or error.response.text).split())[:300]
        advice = ADVICE.get(status, "").format(model=self.model)
        return f"{self.base_url} answered with the status {status}: {text or 'nothing'}. {advice}".strip()


def find_api_key(base_url: str) -> str:
    """The key for an endpoint: `OPENAI_API_KEY`, or without it the Hugging Face token for Hugging Face's hosts; a
    `ChatError` where it holds what can't be sent.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ChatError("OPENAI_API_KEY holds characters that no key has; copy it anew.")
    url = urlsplit(base_url)
    is_huggingface = f".{url.hostname}".endswith(HUGGINGFACE_HOSTS)
    token = get_token() if is_huggingface and url.scheme == "https" else None
    return key or token or NO_KEY


def first_line(error: Exception) -> str:
    """What transformers' errors say before their long advice, as a sentence."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _check_address(base_url: str) -> None:
    try:
        url = urlsplit(base_url)
        is_address = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # brackets that don't match, or a port that isn't a number
        is_address = False
    if not is_address:
        raise ChatError(f"`base_url` {base_url} isn't the address of an endpoint, as in http://localhost:8000/v1.")
    if url.username or url.password or url.query:
        raise ChatError(
            "The endpoint's address must hold no user, password or query; a key is read from OPENAI_API_KEY."
        )


def _start(ask: Callable[[str], Reply | None], question: str) -> Future[Reply | None]:
    """Like an executor's `submit`, but in a daemon: at a program's end executors wait for all that they began."""
    future: Future[Reply | None] = Future()

    def run() -> None:
        try:
            future.set_result(ask(question))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _may_pass(error: BaseException) -> bool:
    """Whether another try may end better: after lost connections, time-outs, busy and failing servers."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, (HTTPError, OSError))


def _is_long_wait(state: RetryCallState) -> bool:
    return state.upcoming_sleep > LONGEST_WAIT


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: those that the server asks for, as a number or a date, or twice those of before."""
    doubled = FIRST_WAIT * 2 ** (state.attempt_number - 1)
    error = state.outcome.exception()
    header = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    try:
        is_number = re.fullmatch(r"[\d.]+", header)
        seconds = float(header) if is_number else email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (OverflowError, ValueError):
        return doubled
    return max(0.0, seconds)
