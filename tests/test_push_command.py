"""`microclip push` by the real client to a Hub on loopback: what is pushed, what is refused, what loads."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from hub_server import HubServer, run_client
from safetensors.torch import load_file, save_file
from tiny_inputs import DESCRIPTIONS, LOGIT_SCALE, draw_shape
from tolerances import within

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import push


CARD = """---
library_name: transformers
---
# Shapes

classify = pipeline("image-classification", model="{}", trust_remote_code=True)
"""
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json"} | {
    f"{name}.py" for name in ("configuration_microclip", "modeling_microclip", "saliency", "text_heads")
}
BESIDES = {"README.md", "descriptions.json", "adaptation.png", "all_results.json", "runs/today/events.out.tfevents.1"}
SHARDS = ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "vocab.json")  # of an earlier model
PRIVATE_THINGS = (
    "runs/.env",
    "runs/today/optimizer.pt",
    "LICENSE_KEY",
    "tokenizer_token.json",
    "model-optimizer.safetensors",
    "my_secret_results.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "token",
    ".env",
    "notes.txt",
    "train.py",
    "labels.json",
    "photos/me.png",
    "_prior/prior.safetensors",
    "checkpoint-3/model.safetensors",
    "checkpoint-3/README.md",
    "checkpoint-3/runs/log",
)


@pytest.fixture(scope="module")
def model(clip_folder):
    return MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")


@pytest.fixture
def saved(model, tmp_path):
    """A folder as a training run leaves it, and more."""
    folder = tmp_path / "it's here"
    model.save_pretrained(folder)
    for name in (*BESIDES, *PRIVATE_THINGS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    (folder / "README.md").write_text(CARD.format("adapted"))
    (folder / "descriptions.json").write_text(json.dumps(DESCRIPTIONS))
    return folder


PUSH = """
import os
from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.commands.push import main
from PIL import Image
from transformers import pipeline
folder, photo = sys.argv[1:]
def push(*options):
    try:
        main([folder, "--repo_id", *options])
    except SystemExit as end:
        return end.code
result = {"errors": {repo_id: push(repo_id) for repo_id in (
    "user/shapes", "user/old", "user/card", "user/clip", "user/files", "stranger/shapes", "user/broken", "a/b/c"
)}}
result["again"] = push("user/shapes", "--commit_message", "Again")
result["public"] = push("user/shapes", "--private")
result["hidden"] = push("hidden", "--private", "--commit_message", "In secret")
result["branch"] = push("user/shapes", "--revision", "nowhere")
model = MicroCLIPForImageClassification.from_pretrained("user/shapes")
classify = pipeline("image-classification", model="user/shapes", image_processor=model.image_processor)
result["scores"] = {answer["label"]: answer["score"] for answer in classify(Image.open(photo))}
args = MicroCLIPTrainingArguments("out", push_to_hub=True, hub_model_id="user/clip", use_cpu=True)
result["trainer"] = attempt(MicroCLIPTrainer, model, args)
os.environ["HF_TOKEN"] = "hf_wrong"
result["unknown"] = push("user/shapes")
del os.environ["HF_TOKEN"]
result["anonymous"] = push("user/shapes")
"""


def test_what_is_pushed_and_what_is_refused(model, saved, tmp_path):
    photo = draw_shape("red disc", np.random.default_rng(0))
    photo.save(tmp_path / "photo.png")
    kept = {
        "user/old": {
            "config.json": b'{"model_type": "microclip"}',
            "old.txt": b"old",
            **dict.fromkeys(SHARDS, b"old"),
        },
        "user/card": {".gitattributes": b"", "README.md": b"# To come"},
        "user/clip": {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"weights"},
        "user/files": {"data.csv": b"1,2"},
    }
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with HubServer() as hub:
        for repo_id, files in kept.items():
            hub.add_commit(repo_id, files)
        hub.fail("POST", "/api/models/user/broken/commit/main", 500)
        result = run_client(hub, tmp_path, PUSH, saved, tmp_path / "photo.png")

    repos, errors = hub.repos, result["errors"]
    assert [errors[repo_id] for repo_id in ("user/shapes", "user/old", "user/card")] == [None] * 3
    assert repos["user/shapes"].keys() == MODEL | BESIDES | {".gitattributes"}
    for name, content in repos["user/shapes"].items():
        local = CARD.format("user/shapes").encode() if name == "README.md" else before.get(saved / name)
        assert name == ".gitattributes" or content == local, name
    assert repos["user/old"].keys() == MODEL | BESIDES | {"old.txt"}
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    with torch.no_grad():
        expected = model(**model.image_processor(photo, return_tensors="pt")).logits.softmax(-1)[0]
    for name, score in zip(CLASS_NAMES, expected.tolist(), strict=True):
        assert result["scores"][name] == pytest.approx(score, abs=within(LOGIT_SCALE / 2)["atol"])

    # One commit a push, besides the one that makes a repository; nothing new makes none.
    assert result["again"] is None
    titles = [(commit.repo_id, commit.title) for commit in hub.commits[len(kept) :]]
    assert [title for repo_id, title in titles if repo_id == "user/shapes"] == ["initial commit", "Push a microCLIP"]
    assert titles[-2:] == [("user/hidden", "initial commit"), ("user/hidden", "In secret")]
    assert result["hidden"] is None and hub.private == {"user/hidden"}

    for repo_id, reason in (("user/clip", "a model of type 'clip'"), ("user/files", "other files ('data.csv')")):
        assert f"{repo_id} on the Hub holds {reason}" in errors[repo_id] and repos[repo_id] == kept[repo_id]
    assert "user/clip on the Hub holds a model of type 'clip'" in result["trainer"]["message"]  # before it trains
    assert "user/shapes exists on the Hub and is public" in result["public"]
    assert "hf auth login" in result["anonymous"] and "push it with" not in result["anonymous"]
    assert "hf auth login" in errors["stranger/shapes"] and "403" in errors["stranger/shapes"]
    assert "401" in result["unknown"] and "404" in result["branch"]
    assert "a/b/c" in errors["a/b/c"] and "push it with" not in errors["a/b/c"]
    assert "500 " in errors["user/broken"] and set(repos["user/broken"]) == {".gitattributes"}
    command = shlex.split(errors["user/broken"].splitlines()[-1])
    assert command == ["microclip", "push", str(saved), "--repo_id", "user/broken"]


def lacks(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def change_config(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return damage


def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


DAMAGES = {  # What is done to a folder, and what the error says.
    "no card": (lacks("README.md"), r"lacks 'README.md', which others need"),
    "no weights": (lacks("model.safetensors"), r"lacks 'model\.safetensors'"),
    "no processor": (lacks("preprocessor_config.json"), r"lacks 'preprocessor_config.json'"),
    "no code": (lacks("modeling_microclip.py", "README.md"), r"lacks 'modeling_microclip.py', 'README.md'"),
    "no code of theirs": (lacks("saliency.py"), r"lacks 'saliency.py'"),
    "no config": (lacks("config.json"), r"lacks 'config.json', which"),
    "code not named": (change_config(auto_map=None), r"lacks 'auto_map in config.json'"),
    "another model": (change_config(model_type="clip"), r"holds a model of type 'clip'; pass a microCLIP"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config.json holds a list; save"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config.json isn't JSON; save"),
    "half weights": (cut_weights, r"can't be loaded"),
    "a weight less": (drop_weight, r"lacks the weights 'classifier.weight'; save it again"),
    "other classes": (change_config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}), r"of shape \(3, 16\)"),
    "no folder": (shutil.rmtree, r"isn't a folder; pass one that"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_folders_that_are_not_whole(saved, monkeypatch, name):
    """They are found before the Hub is asked anything."""
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises(SystemExit, match=f"(?s)microclip push: .*{message}"):
        push.main([str(saved), "--repo_id", "user/shapes"])
