"""Chat models: one in this process through transformers, or one behind an OpenAI-compatible endpoint.

Both have `replies(questions)`: `(key, question)` go in, `(key, Reply)` come out as they are ready, in any order.
"""

import email.utils
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, pipeline


logger = logging.getLogger(__name__)

NUM_TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before the second try, doubled for each more; and what is too long
# Where a Hugging Face token may go: to Hugging Face itself, and to Inference Endpoints, whose protected ones open with
# nothing else. Those are run by others too; for one that shouldn't have the token OPENAI_API_KEY comes first.
HUGGINGFACE_HOST = "huggingface.co"
HUGGINGFACE_SUFFIXES = (f".{HUGGINGFACE_HOST}", ".endpoints.huggingface.cloud")
NO_KEY = "none"  # With None, huggingface_hub would send the Hugging Face token to any host.


@dataclass(frozen=True)
class Reply:
    """What a chat model answered.

    Args:
        text (`str`): empty where it said nothing.
        cut_off (`bool`): whether it ran into its limit of tokens.
    """

    text: str
    cut_off: bool = False


class ChatError(RuntimeError):
    """A chat model can't be used; the text says what to do."""


class LocalChat:
    """A chat model of transformers, in this process.

    Args:
        source (`str`): Hub id or folder of a causal language model whose tokenizer has a chat template.
        batch_size (`int`): questions answered at once.
        max_new_tokens (`int`): the limit of one reply.
        temperature (`float`): 0 gives always the most probable reply.

    Raises:
        ChatError: if it can't be loaded, or isn't a chat model.
    """

    def __init__(self, source: str, batch_size: int, max_new_tokens: int, temperature: float) -> None:
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        try:
            # Left to itself, the pipeline also takes models of other kinds, and fails with them later.
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="auto")
            self.pipeline = pipeline("text-generation", model=model, tokenizer=source)
        except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ChatError(
                f"The language model {source} can't be loaded: {first_line(error)} Pass the Hub id or the folder of a "
                "causal language model of transformers, or with --base_url an endpoint that serves another."
            ) from error
        tokenizer = self.pipeline.tokenizer
        if not tokenizer.chat_template:
            raise ChatError(
                f"{source} has no chat template, so it only continues texts; take a model that was trained to answer, "
                "often called -Instruct or -Chat."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._settings["temperature"] = temperature

    def replies(self, questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Reply]]:
        """The replies, batch by batch."""
        questions = iter(questions)
        while batch := list(islice(questions, self.batch_size)):
            chats = [[{"role": "user", "content": question}] for _, question in batch]
            outputs = self.pipeline(chats, batch_size=self.batch_size, return_full_text=False, **self._settings)
            for (key, _), (output,) in zip(batch, outputs, strict=True):
                text = output["generated_text"]
                # The pipeline doesn't say how a text ended; its tokens are counted anew.
                length = len(self.pipeline.tokenizer(text, add_special_tokens=False)["input_ids"])
                yield key, Reply(text, cut_off=length >= self.max_new_tokens)


class EndpointChat:
    """A chat model behind an OpenAI-compatible endpoint: vLLM, TGI, llama.cpp, Ollama, or a hosted one.

    Busy servers, dropped connections and time-outs are tried again, with growing pauses or the one asked for.

    Args:
        base_url (`str`): the endpoint's address, as in `http://localhost:8000/v1`.
        model (`str`): the endpoint's name of the model.
        num_workers (`int`): questions asked at once.
        max_new_tokens (`int`): the limit of one reply.
        temperature (`float`): 0 gives always the most probable reply.
        timeout (`float`): seconds to wait for a reply.
        extra_body (`dict[str, Any]`): what else to send with each question; `None` as a value leaves a field out.
        stop (`threading.Event`): once set, nothing is tried again. Set here after an error.

    Raises:
        ChatError: if the address isn't one, or holds a password.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        num_workers: int,
        max_new_tokens: int,
        temperature: float,
        timeout: float = 300.0,
        extra_body: dict[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        try:
            url = urlsplit(base_url)
            is_address = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # brackets that don't match, or a port that isn't a number
            is_address = False
        if not is_address:
            raise ChatError(f"--base_url {base_url} isn't the address of an endpoint, as in http://localhost:8000/v1.")
        if url.username or url.password or url.query:
            raise ChatError(
                "The endpoint's address must hold no user, password or query; a key is read from OPENAI_API_KEY."
            )
        self.base_url, self.model, self.num_workers = base_url, model, num_workers
        self.stop = stop or threading.Event()
        self._client = InferenceClient(base_url=base_url, api_key=find_api_key(base_url), timeout=timeout)
        self._settings = {"max_tokens": max_new_tokens, "temperature": temperature, "extra_body": extra_body}

    def replies(self, questions: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Reply]]:
        """The replies as they come. After an error the questions on their way are still waited for, then it is raised.

        Raises:
            ChatError: if the endpoint can't be used.
        """
        todo, asked, answered = iter(questions), queue.SimpleQueue(), queue.SimpleQueue()
        for _ in range(self.num_workers):  # daemons, so that nothing has to wait for them at a program's end
            threading.Thread(target=self._work, args=(asked, answered), daemon=True).start()
        on_their_way, error = 0, None
        try:
            while True:
                more = islice(todo, self.num_workers - on_their_way) if error is None else ()
                for question in more:
                    asked.put(question)
                    on_their_way += 1
                if not on_their_way:
                    break
                key, reply = answered.get()
                on_their_way -= 1
                if isinstance(reply, Exception):
                    error = error or reply
                    self.stop.set()
                elif reply is not None:
                    yield key, reply
        finally:
            for _ in range(self.num_workers):
                asked.put(None)
        if error is not None:
            raise error

    def _work(self, asked: queue.SimpleQueue, answered: queue.SimpleQueue) -> None:
        """A thread: questions in; replies, errors and, once stopped, nothing out."""
        while (question := asked.get()) is not None:
            key, text = question
            try:
                answered.put((key, self._ask(text)))
            except Exception as error:
                answered.put((key, error))

    def _ask(self, question: str) -> Reply | None:
        """One reply, after as many tries as it takes; `None` if stopped while waiting."""
        for attempt in count(1):
            try:
                output = self._client.chat_completion(
                    [{"role": "user", "content": question}], model=self.model, **self._settings
                )
                return self._read(output)
            except OfflineModeIsEnabled as error:
                raise ChatError(
                    "HF_HUB_OFFLINE=1 also forbids requests to endpoints; unset it for this command."
                ) from error
            except (HTTPError, OSError) as error:
                wait = self._wait_before_next(error, attempt)
                logger.warning("%s Trying again in %.0f s.", self._explain(error), wait)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ChatError(
                    f"{self.base_url} answered what isn't a chat completion ({error}). Is it an OpenAI-compatible "
                    "endpoint? Its address mostly ends with /v1."
                ) from error
            if self.stop.wait(wait):
                return None

    def _read(self, output: Any) -> Reply:
        """The text of an answer. A model that says nothing (a filter, or all tokens thought away) said so."""
        if not output.choices:
            raise ValueError(f"it has no choices: {dict(output)}"[:300])
        choice = output.choices[0]
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError(f"its content is a {type(text).__name__}")
        return Reply(text, cut_off=choice.finish_reason == "length")

    def _wait_before_next(self, error: Exception, attempt: int) -> float:
        """Seconds until the next try.

        Raises:
            ChatError: if there is no use in one.
        """
        wait = FIRST_WAIT * 2 ** (attempt - 1)
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status not in (408, 429) and status < 500:
                raise ChatError(self._explain(error)) from error
            wait = _retry_after(error.response.headers.get("Retry-After"), wait)
        if attempt == NUM_TRIES:
            raise ChatError(f"{self._explain(error)} Gave up after {attempt} tries.") from error
        if wait > LONGEST_WAIT:
            raise ChatError(f"{self._explain(error)} It asks to come back in {wait:.0f} s.") from error
        return wait

    def _explain(self, error: Exception) -> str:
        """An error of the connection or the server, in one line with what to do."""
        if isinstance(error, InferenceTimeoutError):
            return f"{self.base_url} gave no reply within {self._client.timeout:.0f} s (--timeout)."
        if not isinstance(error, HfHubHTTPError):
            return f"{self.base_url} can't be reached ({error or type(error).__name__}). Is it running?"
        status = error.response.status_code
        advice = {
            401: "Is OPENAI_API_KEY set, to a key of this endpoint?",
            403: "Is OPENAI_API_KEY set, to a key that may use this model?",
            404: f"Is the address right, and {self.model!r} the endpoint's name of a model?",
        }
        said = " ".join((error.server_message or error.response.text).split())[:300]
        return (
            f"{self.base_url} answered with the status {status}: {said or 'nothing'}. {advice.get(status, '')}".strip()
        )


def find_api_key(base_url: str) -> str:
    """The key for an endpoint: `OPENAI_API_KEY`, or without it the Hugging Face token for Hugging Face's hosts.

    Raises:
        ChatError: if it holds what can't be sent.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ChatError("OPENAI_API_KEY holds characters that no key has; copy it anew.")
    url = urlsplit(base_url)
    own = url.hostname == HUGGINGFACE_HOST or url.hostname.endswith(HUGGINGFACE_SUFFIXES)
    token = get_token() if own and url.scheme == "https" else None
    return key or token or NO_KEY


def first_line(error: Exception) -> str:
    """What transformers' errors say before their long advice, as a sentence."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _retry_after(header: str | None, default: float) -> float:
    """Seconds, from a number or a date; what is neither gives the default."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except (OverflowError, ValueError):
            return default
    return max(0.0, seconds) if math.isfinite(seconds) else default
