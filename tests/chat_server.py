"""A small OpenAI-compatible endpoint on this machine, for the real client to ask; it fails on demand.

`python tests/chat_server.py RECORD [SECONDS]` serves until it is killed, prints its address, takes SECONDS for each
reply, and writes a line of JSON to RECORD for each question that it answered.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def describe(question: str) -> str:
    """Sentences that name what is asked about, as a model would write them."""
    name = question.split(" is ")[0]
    about = "parts" if "features" in question else "colours" if "differ in" in question else "shapes"
    return f"Here are some sentences:\n\n1. {name} has fine {about}.\n2. {name} has many {about}."


class ChatServer:
    """The endpoint, as a context manager.

    Attributes:
        base_url: where it is.
        api_key: the key that it wants; `None` takes any.
        answer: from a question to the reply's text, or to all of the body as `bytes` or `dict`.
        questions: those that were answered, in their order.
        requests: every request: path, headers, and body.
    """

    def __init__(self, answer: Callable[[str], Any] = describe, api_key: str | None = None, seconds: float = 0):
        self.answer, self.api_key, self.seconds = answer, api_key, seconds
        self.questions: list[str] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self._failures: list[tuple[int | str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.chat = self
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, status: int | str, times: int = 1, **headers: str) -> None:
        """Let the next `times` requests fail with a status, or `"drop"`: the connection closes amid the answer."""
        self._failures += [(status, headers)] * times

    def take_failure(self) -> tuple[int | str, dict[str, str]] | None:
        with self.lock:
            return self._failures.pop(0) if self._failures else None


class Handler(BaseHTTPRequestHandler):
    """`POST /v1/chat/completions`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        chat: ChatServer = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            chat.at_once += 1
            chat.most_at_once = max(chat.most_at_once, chat.at_once)
        try:
            self.reply(chat, body)
        finally:
            with chat.lock:
                chat.at_once -= 1

    def reply(self, chat: ChatServer, body: dict[str, Any]) -> None:
        if failure := chat.take_failure():
            return self.fail(*failure)
        if self.path != "/v1/chat/completions":
            return self.send(404, {"error": {"message": "There is nothing here."}})
        if chat.api_key is not None and self.headers["Authorization"] != f"Bearer {chat.api_key}":
            return self.send(401, {"error": {"message": "Incorrect API key provided."}})
        question = body["messages"][-1]["content"]
        time.sleep(chat.seconds)
        answer = chat.answer(question)
        with chat.lock:  # first, so that whoever has the answer finds the question here
            chat.questions.append(question)
        self.send(200, completion(answer) if isinstance(answer, str) else answer)
        return None

    def fail(self, status: int | str, headers: dict[str, str]) -> None:
        if status != "drop":
            return self.send(status, {"error": {"message": "As the test asked for."}}, headers)
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b'{"choices"')
        return None

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that didn't wait
            self.wfile.write(content)


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    """A body as OpenAI's documentation has it."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def main(record: str, seconds: str = "0") -> None:
    with ChatServer(seconds=float(seconds)) as server, open(record, "a", encoding="utf-8") as file:
        print(server.base_url, flush=True)
        written = 0
        while True:
            time.sleep(0.01)
            for question in server.questions[written:]:
                file.write(json.dumps(question) + "\n")
                written += 1
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
