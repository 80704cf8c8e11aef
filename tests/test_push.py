"""Runs that push their result, by the real client to a Hub on loopback; what is pushed, and what a failure leaves."""

import math
import os
import sys
from pathlib import Path

import pytest
import tiny_inputs
from hub_server import HubServer, run_client
from huggingface_hub import ModelCard
from test_hub_server import assert_loads_from_the_hub

from microclip_hf import MicroCLIPForImageClassification


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_inputs.write_inputs(folder)
    return folder


ADAPT = """
from microclip_hf.commands.adapt import main
inputs, output, token = sys.argv[1:]
options = {
    "model_name_or_path": f"{inputs}/clip", "train_dir": f"{inputs}/photos", "test_dir": f"{inputs}/test",
    "class_names": f"{inputs}/names.txt", "descriptions": f"{inputs}/descriptions.json", "output_dir": output,
    "config_overrides": '{"prior_weighting": "uniform"}', "num_train_epochs": "1", "num_crops": "1",
    "use_cpu": "true", "report_to": "tensorboard", "logging_steps": "1", "license": "mit",
    "push_to_hub": "true", "hub_model_id": "user/shapes", "hub_token": token,
}
try:
    main([text for name, value in options.items() for text in (f"--{name}", value)])
    result = None
except SystemExit as error:
    result = str(error)
"""


def test_a_run_pushes_a_model_that_loads(hub, inputs, tmp_path):
    """All of it in one commit, without checkpoints; neither pickles nor the token, there or in the saved folder."""
    output = tmp_path / "shapes"
    assert run_client(hub, tmp_path / "writer", ADAPT, inputs, output, hub.token, HF_TOKEN=None) is None
    files = hub.repos["user/shapes"]
    assert len(hub.commits) == 2
    wanted = ("config.json", "model.safetensors", "preprocessor_config.json", "modeling_microclip.py", "README.md")
    assert files.keys() >= {*wanted, "adaptation.png", "descriptions.json", "training_args.json", "all_results.json"}
    assert any(name.startswith("runs/") for name in files)
    # They show photos.
    for name in ("report.html", "report/run.json", "report/class_sizes_light.png", "pseudo_labels.csv"):
        assert (output / name).exists() and not any(other.startswith(("report", "pseudo")) for other in files)
    assert (output / "checkpoint-1" / "optimizer.pt").exists() and not any("checkpoint" in name for name in files)
    saved = [path for path in output.rglob("*") if path.is_file() and "checkpoint-1" not in path.parts]
    contents = {**files, **{str(path): path.read_bytes() for path in saved}}
    for name, content in contents.items():
        assert hub.token.encode() not in content, name
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl")) and not content.startswith((b"\x80", b"PK")), name
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    assert 'model="user/shapes"' in card.text and "descriptions.json" in card.text
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "mean_class_accuracy"}

    assert_loads_from_the_hub(hub, tmp_path, "user/shapes", output)


TRAIN_AND_PUSH = """
from adaptation import adapt
clip, output = sys.argv[1:]
trainer = adapt(clip, output, num_train_epochs=1, hub_model_id="user/birds")
result = attempt(trainer.push_to_hub)
"""
PUSH_AGAIN = """
import subprocess
from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
command, output = sys.argv[1:]
model = MicroCLIPForImageClassification.from_pretrained(output)
trainer = MicroCLIPTrainer(model, MicroCLIPTrainingArguments(output, hub_model_id="user/birds"))
result = [attempt(trainer.push_to_hub) for _ in range(3)]
done = subprocess.run(command, shell=True, capture_output=True, text=True)
result += [done.stderr if done.returncode else None, attempt(trainer.push_to_hub)]
"""


def test_a_push_that_fails_leaves_both_sides_whole(hub, clip_folder, tmp_path):
    """Broken off in the middle of the weights, 429, 401, 500; then the command that the error names does it."""
    output = tmp_path / "it's here"
    hub.fail("PUT", "/lfs/user/birds/*", "drop", times=4, after_bytes=1000)
    hub.fail("PUT", "/lfs/user/birds/*", 500, times=math.inf, after_bytes=1000)
    broken_off = run_client(hub, tmp_path, TRAIN_AND_PUSH, clip_folder, output)
    hub.heal()
    hub.fail("POST", "/api/models/user/birds/preupload/main", 429, times=6)
    hub.fail("POST", "/api/models/user/birds/commit/main", 401)
    hub.fail("POST", "/api/models/user/birds/commit/main", 500)
    assert set(hub.repos["user/birds"]) == {".gitattributes"}
    command = broken_off["message"].splitlines()[-1].strip()
    *refused, by_hand, again = run_client(hub, tmp_path, PUSH_AGAIN, command, output, PATH=PATH)
    for failure in (broken_off, *refused):
        assert failure["names"][0] == "RuntimeError" and "The result is safe in" in failure["message"], failure
    assert ["429 " in failure["message"] for failure in refused] == [True, False, False]
    assert by_hand is None and again is None
    assert len(hub.commits) == 2  # the last push had nothing new
    files = hub.repos["user/birds"]
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert {"README.md", "adaptation.png", "modeling_microclip.py"} <= files.keys()
    MicroCLIPForImageClassification.from_pretrained(output)


@pytest.mark.parametrize("reason", ["401", "no network"])
def test_a_hub_that_refuses_is_found_before_any_work(hub, inputs, tmp_path, reason):
    environment = {}
    if reason == "401":
        hub.fail("POST", "/api/repos/create", 401)
    else:
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    output = tmp_path / "out"
    message = run_client(hub, tmp_path, ADAPT, inputs, output, hub.token, **environment)
    assert "user/shapes on the Hub can't be used" in message and "hf auth login" in message
    assert "choose another --hub_model_id, or leave out --push_to_hub" in message
    assert not hub.commits and not (output / "config.json").exists()
