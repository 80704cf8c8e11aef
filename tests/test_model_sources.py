"""What is said of a model before it is loaded: paths that aren't there, a Hub that isn't, what a download weighs."""

import math

import pytest
from hub_server import HubServer, run_client

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import describe, evaluate, export, predict
from microclip_hf.configuration_microclip import describe_missing
from microclip_hf.model_sources import describe_problem


ASK = """
import contextlib, io
from huggingface_hub import hf_hub_download
from microclip_hf.model_sources import announce_download, describe_problem
def said(source):
    with contextlib.redirect_stderr(io.StringIO()) as text:
        announce_download(source)
    return text.getvalue()
names = ["user/safe", "user/parts", "user/none", "user/broken", "user/away"]
said_before = [said(name) for name in names]
problems = [describe_problem(name) for name in names]
for name in ("config.json", "model.safetensors", "tokenizer.json"):
    hf_hub_download("user/safe", name)
hf_hub_download("user/parts", "pytorch_model-00001-of-00002.bin")
waits.clear()
said_after = [said(name) for name in names]
result = said_before, problems, said_after, waits
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with models in `models/adapted` and `models/other`."""
    for name in ("adapted", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """Questions to the Hub, which fail the test."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: pytest.fail("asked the Hub"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("models/adpated", "there is no such folder here; did you mean 'models/adapted'?"),
        ("./models/othr", "there is no such folder here; did you mean 'models/other'?"),
        ("modells", "there is no such folder here; did you mean 'models'?"),
        ("models/adaptd/", "there is no such folder here; did you mean 'models/adapted'?"),
        ("somewhere", "there is no such folder here; pass a folder"),
        ("~/no such folder", "there is no such folder here; pass a folder"),
        ("/no/such/folder", "there is no such folder here; pass a folder"),
        ("a/b/c", "there is no such folder here; pass a folder"),
        ("user/model/", "there is no such folder here; pass a folder"),
        ("C:\\models", "there is no such folder here; "),
        ("models\\adapted", "there is no such folder here; "),
        ("file", "that is a file; pass the folder that it lies in."),
    ],
)
def test_what_is_clearly_a_path_is_not_asked_for(here, offline, source, problem):
    assert describe_problem(source).startswith(problem)
    with pytest.raises(ValueError, match="can't be loaded"):
        MicroCLIPForImageClassification.from_clip(source, ["red disc", "blue bar"])
    with pytest.raises(OSError, match="can't be loaded"):
        MicroCLIPForImageClassification.from_pretrained(source)


def test_folders_are_no_problem(here, offline):
    assert [describe_problem(source) for source in ("models", "models/adapted", "./models/other/")] == [None] * 3


def test_a_folder_named_like_an_owner_hides_no_models_of_theirs(here):
    """The Hub is asked, unless a name in that folder is near."""
    assert describe_missing("models/something-else", {}) is None
    assert describe_missing("models/adapted2", {}).endswith("did you mean 'models/adapted'?")
    assert describe_missing("~nobody-of-this-name/x", {}).startswith("there is no such folder here")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (predict, ["file", "--model", "models/adpated"]),
        (export, ["--model_name_or_path", "models/adpated", "--output", "model.onnx"]),
        (evaluate, ["--model_name_or_path", "models/adpated", "--test_dir", "models", "--output_dir", "out"]),
        (describe, ["--class_names", "names.txt", "--output", "out.json", "--llm", "models/adpated"]),
        (
            describe,
            [
                *("--class_names", "names.txt", "--output", "out.json", "--llm", "chat"),
                *("--model_name_or_path", "models/adpated"),
            ],
        ),
    ],
)
def test_commands_say_it_in_one_line(here, offline, command, arguments):
    (here / "names.txt").write_text("red disc\nblue bar\n")
    with pytest.raises(SystemExit, match=r"models/adpated.*can't be loaded: .*did you mean 'models/adapted'") as end:
        command.main(arguments)
    assert len(str(end.value.code).splitlines()) == 1


def test_what_a_download_weighs(tmp_path):
    """Of weights in two formats one counts, and what is here already doesn't. A Hub that fails, or isn't there, is
    asked once.
    """
    config = {"config.json": b"{}", "README.md": bytes(5_000_000), "tokenizer.json": bytes(400_000)}
    weights = {"model.safetensors": bytes(2_300_000), "pytorch_model.bin": bytes(9_000_000)}
    shards = {f"pytorch_model-0000{part}-of-00002.bin": bytes(1_000_000) for part in (1, 2)}
    with HubServer() as hub:
        hub.add_commit("user/safe", config | weights)
        hub.add_commit("user/parts", config | shards | {"open_clip_model.safetensors": bytes(7_000_000)})
        hub.add_commit("user/none", config)
        hub.fail("GET", "/api/models/user/broken*", 500, math.inf)
        hub.fail("GET", "/api/models/user/away*", "drop", math.inf)
        before, problems, after, waits = run_client(hub, tmp_path, ASK)
        unreachable = f"there is no such folder here, it wasn't downloaded before, and {hub.endpoint} can't be reached"
    lines = ["user/safe will be downloaded once: 3 MB.\n", "user/parts will be downloaded once: 2 MB.\n"]
    assert before == [*lines, "", "", ""]
    assert after == ["", "user/parts will be downloaded once: 1 MB.\n", "", "", ""]
    assert problems[:4] == [None] * 4 and problems[4].startswith(unreachable)
    assert waits == []
