"""The real client against our small Hub: a model pushed and loaded, and what becomes of a push that fails."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from hub_server import HubServer, run_client
from tiny_inputs import LOGIT_SCALE, draw_shape
from tolerances import within

from microclip_hf import MicroCLIPForImageClassification


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


PUSH_AND_REPEAT = """
from huggingface_hub import HfApi
api, (folder, repo_id) = HfApi(), sys.argv[1:]
def push():
    repo = api.create_repo(repo_id, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["_*", "checkpoint-*"]).oid
result = {"user": api.whoami()["name"], "oids": [push(), push()], "create": attempt(api.create_repo, repo_id)}
"""
LOAD = """
import torch
from transformers import AutoModelForImageClassification, pipeline
repo_id, photo, pixels = *sys.argv[1:3], torch.load(sys.argv[3])
models = [AutoModelForImageClassification.from_pretrained(repo_id, trust_remote_code=True)]
assert "microclip_hf" not in sys.modules
from microclip_hf import MicroCLIPForImageClassification
models.append(MicroCLIPForImageClassification.from_pretrained(repo_id))
with torch.no_grad():
    logits = [model(pixel_values=pixels).logits.tolist() for model in models]
classify = pipeline("image-classification", model=repo_id, image_processor=models[1].image_processor)
result = {"logits": logits, "scores": {answer["label"]: answer["score"] for answer in classify(photo)}}
"""


def assert_loads_from_the_hub(hub, tmp_path, repo_id, folder):
    """By remote code, the package and the pipeline, from an empty cache and without a token: the folder's numbers."""
    model = MicroCLIPForImageClassification.from_pretrained(folder)
    photo = draw_shape("red disc", np.random.default_rng(0))
    pixels = model.image_processor(photo, return_tensors="pt")["pixel_values"]
    photo.save(tmp_path / "photo.png")
    torch.save(pixels, tmp_path / "pixels.pt")
    arguments = (repo_id, tmp_path / "photo.png", tmp_path / "pixels.pt")
    loaded = run_client(hub, tmp_path / "reader", LOAD, *arguments, HF_TOKEN=None)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    for logits in loaded["logits"]:
        torch.testing.assert_close(torch.tensor(logits), expected, **within(LOGIT_SCALE))
    scores = torch.tensor([loaded["scores"][model.config.id2label[index]] for index in range(3)])
    torch.testing.assert_close(scores, expected.softmax(-1)[0], **within(LOGIT_SCALE / 2))


def test_a_pushed_model_loads_from_the_hub(hub, clip_folder, tmp_path):
    """What is pushed is the folder, but for what the patterns leave out."""
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Shapes\n")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "checkpoint-3").mkdir()
    for name in ("_notes.txt", "checkpoint-3/model.safetensors"):
        (folder / name).write_text("not to be pushed")
    pushed = run_client(hub, tmp_path / "writer", PUSH_AND_REPEAT, folder, "user/shapes")
    assert hub.repos.keys() == {"user/shapes"}
    assert hub.repos["user/shapes"] == {**files, **hub.commits[0].files}
    assert [commit.title for commit in hub.commits] == ["initial commit", "Upload folder using huggingface_hub"]
    assert files["model.safetensors"] in hub.lfs_objects.values()
    assert pushed["user"] == hub.user
    assert pushed["oids"] == [hub.commits[1].oid] * 2, "unchanged files make no commit"
    assert "409" in pushed["create"]["message"]

    assert_loads_from_the_hub(hub, tmp_path, "user/shapes", folder)


FIVE_RETRIES = [1, 2, 4, 8, 8]
CREATE, LFS = "/api/repos/create", "/lfs/user/{}/*"
PREUPLOAD, COMMIT = (f"/api/models/user/{{}}/{step}/main" for step in ("preupload", "commit"))
FAILURES = {  # What fails, what the client raises (nothing if it repeats the request by itself), its waits.
    "create_401": (("POST", CREATE, 401), ["HfHubHTTPError"], []),
    "create_404": (("POST", CREATE, 404), ["HfHubHTTPError"], []),
    "create_429": (("POST", CREATE, 429, 1, {"Retry-After": "3"}), ["HfHubHTTPError"], []),
    "create_500": (("POST", CREATE, 500), ["HfHubHTTPError"], []),
    "create_drop": (("POST", CREATE, "drop"), ["RemoteProtocolError"], []),
    "preupload_401": (("POST", PREUPLOAD, 401), ["HfHubHTTPError"], []),
    "preupload_404": (("POST", PREUPLOAD, 404, 1, {"X-Error-Code": "RepoNotFound"}), ["RepositoryNotFoundError"], []),
    "preupload_429": (("POST", PREUPLOAD, 429, 1, {"Retry-After": "3"}), [], [4]),
    "upload_404": (("PUT", LFS, 404), ["RuntimeError", "HfHubHTTPError"], []),
    "upload_429": (("PUT", LFS, 429, 6), ["RuntimeError", "HfHubHTTPError"], FIVE_RETRIES),
    "upload_500": (("PUT", LFS, 500, 1, None, 1000), [], [1]),
    "upload_always_500": (("PUT", LFS, 500, 6, None, 1000), ["RuntimeError", "HfHubHTTPError"], FIVE_RETRIES),
    "upload_drop": (("PUT", LFS, "drop"), [], [1]),
    "upload_always_drop": (("PUT", LFS, "drop", 6), ["RuntimeError"], FIVE_RETRIES),
    "commit_401": (("POST", COMMIT, 401), ["HfHubHTTPError"], []),
    "commit_429": (("POST", COMMIT, 429), ["HfHubHTTPError"], []),
    "commit_500": (("POST", COMMIT, 500), ["HfHubHTTPError"], []),
    "commit_drop": (("POST", COMMIT, "drop"), ["RemoteProtocolError"], []),
}
PUSH_ALL = """
from pathlib import Path
from huggingface_hub import HfApi
api, result = HfApi(), {}
def push(name):
    Path(name).mkdir(exist_ok=True)
    Path(name, "config.json").write_text("{}")
    Path(name, "model.safetensors").write_text(name * 10000)
    repo_id = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=name)
for name in sys.argv[1:]:
    waits.clear()
    result[name] = attempt(push, name), list(waits)
"""


@pytest.fixture(scope="module")
def pushes(tmp_path_factory):
    """All failures, one after the other: outcomes and files of a first push, and of a second, which nothing disturbs.

    The failures of creating come first, since their requests name no repo in the path; only their repos are new.
    """
    tmp_path, rounds = tmp_path_factory.mktemp("pushes"), []
    with HubServer() as hub:
        for name, (failure, _, _) in FAILURES.items():
            hub.fail(failure[0], failure[1].format(name), *failure[2:])
            if failure[1] != CREATE:
                hub.add_commit(f"user/{name}", {"old.txt": b"old"})
        for _ in range(2):
            outcomes = run_client(hub, tmp_path, PUSH_ALL, *FAILURES)
            rounds.append({name: (*outcomes[name], hub.repos.get(f"user/{name}")) for name in FAILURES})
    return rounds


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_push_leaves_the_files_as_they_were(pushes, name):
    failure, expected, expected_waits = FAILURES[name]
    new = failure[1] == CREATE
    complete = {"config.json": b"{}", "model.safetensors": name.encode() * 10000}
    error, waits, files = pushes[0][name]
    assert (error["names"][: len(expected)] if error else []) == expected
    assert waits == expected_waits
    if expected:
        assert files == (None if new else {"old.txt": b"old"})
    else:
        assert files == {"old.txt": b"old", **complete}
    error, _, files = pushes[1][name]
    assert error is None
    assert {path: files[path] for path in complete} == complete


ERRORS = """
from huggingface_hub import HfApi
from huggingface_hub import CommitOperationDelete as Delete
api, anonymous, stranger = HfApi(), HfApi(token=False), HfApi(token="hf_other")
add = lambda name, content, **kwargs: api.upload_file(
    repo_id="user/a", path_in_repo=name, path_or_fileobj=content, **kwargs
)
commit = lambda *operations: api.create_commit("user/a", operations, commit_message="Change")
api.create_repo("hidden", private=True)
first = api.model_info("user/a").sha
files = [file.rfilename for file in api.list_repo_tree("user/a", recursive=True)]
top = [file.rfilename for file in api.list_repo_tree("user/a")]
info = api.get_paths_info("user/a", ["folder/weights.bin", "missing"])
download = lambda name, **kwargs: open(api.hf_hub_download("user/a", name, **kwargs), "rb").read().decode()
snapshot = api.snapshot_download("user/a")
errors = [
    attempt(stranger.model_info, "user/a"),
    attempt(stranger.whoami),
    attempt(anonymous.create_repo, "b"),
    attempt(api.create_repo, "other/b"),
    attempt(anonymous.model_info, "user/hidden"),
    attempt(api.model_info, "user/missing"),
    attempt(api.model_info, "user/a", revision="v2"),
    attempt(download, "missing"),
    attempt(commit, Delete("missing")),
    attempt(add, "README.md", b"---\\na: [\\n---\\n"),
    attempt(add, "new.txt", b"new", parent_commit="0" * 40),
    attempt(add, "new.txt", b"new", create_pr=True),
]
unchanged = api.model_info("user/a").sha == first
commit(Delete("config.json"))
result = {
    "errors": [error["names"][0] for error in errors],
    "files": files,
    "top": top,
    "info": [(file.path, file.size, file.lfs and file.lfs.sha256) for file in info],
    "unchanged": unchanged,
    "old": download("config.json", revision=first),
    "weights": len(download("folder/weights.bin")),
    "left": api.list_repo_files("user/a"),
    "hidden": api.model_info("user/hidden").private,
}
"""


def test_what_the_hub_refuses(hub, tmp_path):
    """Each refusal reaches the user as the exception of the real Hub, and nothing changes."""
    weights = b"w" * 20_000
    hub.add_commit("user/a", {"config.json": b"{}", "folder/weights.bin": weights})
    answer = run_client(hub, tmp_path, ERRORS)
    assert answer["errors"] == [
        *["HfHubHTTPError"] * 4,
        *["RepositoryNotFoundError"] * 2,
        "RevisionNotFoundError",
        *["RemoteEntryNotFoundError"] * 2,
        "ValueError",
        "HfHubHTTPError",
        "BadRequestError",
    ]
    assert answer["unchanged"]
    assert answer["files"] == ["config.json", "folder/weights.bin"]
    assert answer["top"] == ["config.json"]
    assert answer["info"] == [["folder/weights.bin", len(weights), hashlib.sha256(weights).hexdigest()]]
    assert answer["old"] == "{}"
    assert answer["weights"] == len(weights)
    assert answer["left"] == ["folder/weights.bin"]
    assert answer["hidden"]
