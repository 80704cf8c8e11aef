"""A run from Python: the same folder as the command's, and plain CLIP measured by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_inputs
import torch
from test_adapt import UNIFORM, flags

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.commands import adapt as command
from microclip_hf.data.sources import load_image_folder
from microclip_hf.descriptions.files import read_descriptions
from microclip_hf.hub.model_card import CardFacts
from microclip_hf.loading import load_clip
from microclip_hf.training.run import adapt, measure_clip


ROOT = Path(__file__).parents[1]
NAMES = list(tiny_inputs.DESCRIPTIONS)


def load_test(inputs):
    return load_image_folder(inputs / "test", NAMES, labels_required=True)


def make_args(folder, **settings):
    return MicroCLIPTrainingArguments(str(folder), num_train_epochs=1, num_crops=1, use_cpu=True, **settings)


def load_model(inputs):
    descriptions = read_descriptions(inputs / "descriptions.json", NAMES)
    texts = {"class_names": NAMES, "templates": None, "descriptions": descriptions}
    return descriptions, *load_clip(str(inputs / "clip"), texts, {"prior_weighting": "uniform"})


def test_python_gives_the_folder_that_the_command_gives(inputs, tmp_path, capsys):
    options = {"test_dir": inputs / "test", "descriptions": inputs / "descriptions.json"}
    command.main(flags(inputs, tmp_path / "by_command", config_overrides=UNIFORM, **options))
    descriptions, model, heads = load_model(inputs)
    facts = CardFacts(str(inputs / "clip"), str(inputs / "photos"), test_dataset=str(inputs / "test"))
    photos = load_image_folder(str(inputs / "photos"), NAMES)
    printed = capsys.readouterr().out
    results = adapt(model, photos, make_args(tmp_path / "by_python"), load_test(inputs), heads, descriptions, facts)
    files = [
        {path.relative_to(own) for path in own.rglob("*")} for own in (tmp_path / "by_command", tmp_path / "by_python")
    ]
    assert files[0] == files[1]
    for name in ("model.safetensors", "eval_results.json", "descriptions.json", "pseudo_labels.csv"):
        assert (tmp_path / "by_command" / name).read_bytes() == (tmp_path / "by_python" / name).read_bytes()
    assert results == json.loads((tmp_path / "by_python" / "eval_results.json").read_text())
    assert {"zero_shot_accuracy", "cupl_accuracy", "adapted_accuracy"} <= set(results)
    heading = "Adapting to 48 images of 3 classes, 3 of them described."
    assert heading in printed and heading in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`output_dir` .*by_python already holds a model"):
        adapt(model, photos, make_args(tmp_path / "by_python"))


def test_the_fewest_arguments(inputs, tmp_path):
    """As in the docstring."""
    model = MicroCLIPForImageClassification.from_clip(inputs / "clip", NAMES, prior_weighting="uniform")
    assert adapt(model, load_image_folder(inputs / "photos", NAMES), make_args(tmp_path)) == {}
    assert (tmp_path / "report.html").exists() and not (tmp_path / "descriptions.json").exists()


@pytest.mark.parametrize("test_dataset", [[], {"image": []}, "unlabelled"])
def test_test_images_need_labels(inputs, tmp_path, test_dataset):
    photos = load_image_folder(inputs / "photos", NAMES)
    with pytest.raises(ValueError, match=r"pass a datasets\.Dataset with columns image and label"):
        adapt(None, photos, make_args(tmp_path), photos if test_dataset == "unlabelled" else test_dataset)


def test_measuring_clip_leaves_model_and_random_numbers_alone(inputs, tmp_path):
    _, model, heads = load_model(inputs)
    args = make_args(tmp_path, dataloader_num_workers=1)
    photos = load_image_folder(inputs / "photos", NAMES)
    trainer = MicroCLIPTrainer(model=model, args=args, train_dataset=photos, eval_dataset=load_test(inputs))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    results = measure_clip(trainer, heads)
    assert results.keys() == {"zero_shot_accuracy", "cupl_accuracy"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert logged >= {"zero_shot_loss", "cupl_runtime", "cupl_samples_per_second", "cupl_top5_accuracy"}
    trainer.eval_dataset = None
    assert measure_clip(trainer, heads) == {}


def test_processes_share_the_images_out(inputs, tmp_path):
    """The third process has none of two images."""
    (tmp_path / "test" / "red disc").mkdir(parents=True)
    for path in sorted((inputs / "test" / "red disc").iterdir())[:2]:
        (tmp_path / "test" / "red disc" / path.name).symlink_to(path)
    options = {"descriptions": inputs / "descriptions.json", "test_dir": tmp_path / "test"}
    options |= {"config_overrides": UNIFORM, "max_steps": 1, "report": False}
    command.main(flags(inputs, tmp_path / "alone", **options))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    script = [str(ROOT / "examples" / "adapt.py"), *flags(inputs, tmp_path / "shared", **options)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, shared = (json.loads((tmp_path / run / "eval_results.json").read_text()) for run in ("alone", "shared"))
    for name in ("zero_shot_accuracy", "cupl_accuracy"):
        assert alone[name] == shared[name]


@pytest.mark.parametrize(("given", "spins"), [(None, "0"), ("active", "30000000000")])
def test_threads_sleep_while_they_wait_unless_the_user_wants_otherwise(given, spins):
    """By what OpenMP says of itself as PyTorch loads it."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
    environment.pop("OMP_WAIT_POLICY", None)
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", "import microclip_hf"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch isn't built with GNU's OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
