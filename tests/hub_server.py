"""A small Hugging Face Hub on this machine, for the real client to push to and load from; it fails on demand.

It speaks what huggingface_hub 2.4 asks of a Hub of models: `main` only, plain LFS, no Xet, no pull requests.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SIZE = 10_000  # Larger files go through LFS, as weights do. The real Hub's limit is higher.
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Commit:
    """A commit with all files of its repo."""

    repo_id: str
    title: str
    files: dict[str, bytes]
    oid: str = field(default_factory=lambda: secrets.token_hex(20))


class HubServer:
    """The Hub, as a context manager.

    Attributes:
        endpoint: the value for `HF_ENDPOINT`.
        token: the token of `user`, who may write. Any other gets a 401; without one, public repos can be read.
        commits: all commits, oldest first. Creating a repo makes one, with `.gitattributes`, as on the real Hub.
        private: ids of the repos that only `user` may read.
        lfs_objects: what was uploaded through LFS, by SHA-256, committed or not.
        requests: method and path of every request, those that fail among them.
    """

    user = "user"

    def __init__(self):
        self.token = f"hf_{secrets.token_hex(17)}"
        self.commits: list[Commit] = []
        self.private: set[str] = set()
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._failures: list[tuple[str, str, SimpleNamespace]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def repos(self) -> dict[str, dict[str, bytes]]:
        """The files of every repo's latest commit: `{id: {path: bytes}}`."""
        return {commit.repo_id: commit.files for commit in self.commits}

    def add_commit(self, repo_id: str, files: dict[str, bytes], title: str = "Add files") -> Commit:
        """Make `files` all that a repo holds, which needn't exist."""
        self.commits.append(Commit(repo_id, title, dict(files)))
        return self.commits[-1]

    def fail(
        self, method: str, path_pattern: str, status: int | str, times: float = 1, headers=None, after_bytes=None
    ) -> None:
        """Let the next `times` matching requests fail, without any effect. The client repeats some up to five times.

        Args:
            method: `"PUT"` and the like.
            path_pattern: the path, with `*` for anything: `"/lfs/user/name/*"`.
            status: the answer's status, or `"drop"`: no answer, and the connection closes.
            times: how many requests; `math.inf` for all.
            headers: of the answer, for example `{"Retry-After": "0"}`.
            after_bytes: how much of the body is read before; by default all, and half before a drop.
        """
        failure = SimpleNamespace(status=status, times=times, headers=headers, after_bytes=after_bytes)
        self._failures.append((method, path_pattern, failure))

    def heal(self) -> None:
        """Let nothing fail any more."""
        self._failures.clear()

    def take_failure(self, method: str, path: str) -> SimpleNamespace | None:
        """The failure due for a request, counted as used."""
        with self.lock:
            for failing_method, pattern, failure in self._failures:
                if failure.times > 0 and failing_method == method and fnmatchcase(path, pattern):
                    failure.times -= 1
                    return failure
        return None


class Refused(Exception):
    """An answer with an error status; by `code` the client chooses its exception. `body` is added to the JSON."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


class Handler(BaseHTTPRequestHandler):
    """The protocol: a method for each endpoint, which answers or raises `Refused`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        self.hub: HubServer = self.server.hub
        url, size = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        request = self.command, unquote(url.path)
        self.hub.requests.append(request)
        if failure := self.hub.take_failure(*request):
            self.fail(failure, size)
            return
        self.query, self.body = parse_qs(url.query), self.rfile.read(size)
        try:
            self.dispatch(url.path)
        except Refused as refused:
            self.answer(refused.body, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def fail(self, failure: SimpleNamespace, size: int) -> None:
        self.close_connection = failure.status == "drop"
        default = size // 2 if self.close_connection else size
        before = default if failure.after_bytes is None else min(size, failure.after_bytes)
        self.rfile.read(before)
        if not self.close_connection:
            self.answer({"error": "As the test asked for."}, failure.status, failure.headers)
            self.rfile.read(size - before)

    def dispatch(self, path: str) -> None:
        authorization = self.headers.get("Authorization")
        self.signed_in = authorization == f"Bearer {self.hub.token}"
        if authorization and not self.signed_in:
            raise Refused(401, "Invalid credentials in Authorization header")
        for method, pattern, open_to_all, endpoint in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                if not (open_to_all or self.signed_in):
                    raise Refused(401, "Invalid username or password.")
                return endpoint(self, *map(unquote, match.groups("")))
        raise Refused(404, f"There is no {self.command} {path} here.")

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, repo_id: str, revision: str = "") -> Commit:
        """The commit that a revision names."""
        commits = [commit for commit in self.hub.commits if commit.repo_id == repo_id]
        if not commits or (repo_id in self.hub.private and not self.signed_in):
            raise Refused(404 if self.signed_in else 401, "Repository not found", "RepoNotFound")
        for commit in reversed(commits):
            if revision in ("", "main", commit.oid):
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self) -> None:
        self.answer({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.hub.user
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if owner != self.hub.user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise Refused(409, "You already created this model repo", url=url)
            self.hub.add_commit(repo_id, {".gitattributes": GITATTRIBUTES}, "initial commit")
        if wanted.get("visibility") == "private":
            self.hub.private.add(repo_id)
        self.answer({"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", json.loads(self.body)["content"], re.DOTALL)
        try:
            if match and not isinstance(yaml.safe_load(match[1]), dict):
                raise yaml.YAMLError("The metadata is no mapping.")
        except yaml.YAMLError as error:
            raise Refused(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        self.answer({"errors": [], "warnings": [] if match else [{"message": "empty or missing yaml metadata"}]})

    def model_info(self, repo_id: str, revision: str) -> None:
        commit = self.find(repo_id, revision)
        files = sorted(commit.files.items())
        siblings = [{"rfilename": path} for path, _ in files]
        if "blobs" in self.query:
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files]
        private = repo_id in self.hub.private
        self.answer({"id": repo_id, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        files = self.find(repo_id, revision).files
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not paths:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive") != ["true"]:
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        self.answer([file_info(path, files[path]) for path in paths])

    def paths_info(self, repo_id: str, revision: str) -> None:
        files = self.find(repo_id, revision).files
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.answer([file_info(path, files[path]) for path in paths if path in files])

    def preupload(self, repo_id: str, revision: str) -> None:
        files, answers = self.find(repo_id, revision).files, []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            mode = "lfs" if is_lfs(path, wanted["size"]) else "regular"
            oid = content_oid(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.find(repo_id)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.lfs_objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{repo_id}/{wanted['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo_id: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content isn't what the address says.")
        self.hub.lfs_objects[oid] = self.body
        self.answer(b"")

    def lfs_verify(self, repo_id: str) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "Object not found")
        self.answer({})

    def commit(self, repo_id: str, revision: str) -> None:
        if "create_pr" in self.query:
            raise Refused(400, "There are no pull requests here.")
        items = [json.loads(line) for line in self.body.splitlines()]
        header = next(item["value"] for item in items if item["key"] == "header")
        with self.hub.lock:
            parent = self.find(repo_id, revision)
            if header.get("parentCommit", parent.oid) != parent.oid:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for item in items:
                self.change(files, item["key"], item["value"])
            oid = self.hub.add_commit(repo_id, files, header["summary"]).oid
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"})

    def change(self, files: dict[str, bytes], key: str, value: dict[str, str]) -> None:
        """Apply one line of a commit."""
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs_objects:
                raise Refused(400, f"The LFS pointer of {value['path']} points to a file that does not exist")
            files[value["path"]] = self.hub.lfs_objects[value["oid"]]
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key != "header":
            raise Refused(400, f"There is no {key} here.")

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.find(repo_id, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            error = {"error": "Entry not found"}
            return self.answer(error, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = commit.files[path]
        headers["ETag"] = f'"{content_oid(path, content)}"'
        if is_lfs(path, len(content)):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return self.answer(content, headers=headers)


REPO, MODEL, REVISION = "([^/]+/[^/]+)", "/api/models/([^/]+/[^/]+)", "([^/]+)"
ROUTES = [  # Method, path, whether it is open to those without a token, endpoint.
    ("GET", "/api/whoami-v2", False, Handler.whoami),
    ("POST", "/api/repos/create", False, Handler.create_repo),
    ("POST", "/api/validate-yaml", True, Handler.validate_yaml),
    ("GET", f"{MODEL}(?:/revision/{REVISION})?", True, Handler.model_info),
    ("GET", f"{MODEL}/tree/{REVISION}(?:/(.+))?", True, Handler.tree),
    ("POST", f"{MODEL}/paths-info/{REVISION}", True, Handler.paths_info),
    ("POST", f"{MODEL}/preupload/{REVISION}", False, Handler.preupload),
    ("POST", f"{MODEL}/commit/{REVISION}", False, Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", False, Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", False, Handler.lfs_verify),
    ("PUT", f"/lfs/{REPO}/([0-9a-f]+)", True, Handler.lfs_upload),  # Like a signed address: it needs no token.
    ("GET", f"/{REPO}/resolve/{REVISION}/(.+)", True, Handler.resolve),
]


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes through LFS; an empty one never does."""
    return size > LFS_SIZE or (size > 0 and path.endswith(".safetensors"))


def file_info(path: str, content: bytes) -> dict[str, Any]:
    """A file's entry in a listing: with git's id of the file, or of the pointer that stands for it."""
    info = {"type": "file", "path": path, "size": len(content)}
    if is_lfs(path, len(content)):
        oid = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        info["lfs"] = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
        content = pointer
    return {**info, "oid": hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()}


def content_oid(path: str, content: bytes) -> str:
    """What the client compares a local file with: LFS's SHA-256, or git's id."""
    info = file_info(path, content)
    return info.get("lfs", info)["oid"]


def run_client(hub: HubServer, tmp_path: Path, code: str, *args: object, **environment: str | None) -> Any:
    """Run `code` in a process of its own whose Hub is `hub`; return what it leaves in `result`, through JSON.

    The code finds `args` in `sys.argv[1:]`, may import from `tests/` and of this checkout, and has `attempt` and
    `waits`: the seconds that the client would have waited before each retry, which comes at once. `HF_HOME` is
    `tmp_path / "hf"`.

    Args:
        environment: more variables, for example `HF_TOKEN="other"`; None takes one away.
    """
    tmp_path.mkdir(parents=True, exist_ok=True)
    foreign = re.compile("(HF_|HUGGING|TRANSFORMERS_).*|.*_proxy", re.IGNORECASE)
    variables = {
        **{name: value for name, value in os.environ.items() if not foreign.fullmatch(name)},
        **{f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
        **environment,
    }
    prelude = "import json, sys\nfrom hub_server import attempt, retry_at_once\nwaits = retry_at_once()\n"
    program = f"{prelude}{code}\nprint('\\n' + json.dumps(result))"
    outcome = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout.strip().splitlines()[-1])


def attempt(call: Callable, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """The names of the exception that a call raises, and of its causes, with its message; None if there is none."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        message, names = str(error), []
        while error is not None:
            names.append(type(error).__name__)
            error = error.__cause__
        return {"names": names, "message": message}
    return None


def retry_at_once() -> list[float]:
    """Let the client of this process retry without waiting; the list collects the seconds it would have waited."""
    from huggingface_hub.utils import _http

    waits: list[float] = []
    _http.time = SimpleNamespace(sleep=waits.append)
    return waits
