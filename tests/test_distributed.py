"""The configurations for `accelerate launch`, and the runs that they start: as in one process.

As a program, a small run in each process:

accelerate launch --config_file CONFIG tests/test_distributed.py CLIP_FOLDER OUTPUT_DIR '{"num_train_epochs": 1}'
"""

import csv
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from adaptation import CLASS_NAMES, adapt, draw_images
from decisions import ClearDecisions
from packaging.version import Version
from safetensors.torch import load_file
from test_invariance import MIXTURE, THREE_BATCHES, assert_same_mixture, assert_same_run
from tiny_inputs import LOGIT_SCALE, TOKENIZERS, make_clip
from tolerances import assert_clear, within
from torch.testing import assert_close
from transformers import CLIPModel, MetaClip2Model

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.report.record import write_record


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate_configs"
# Batches of 4 in each of two processes, in two parts: as one process's batches of 8.
OPTIONS = {**THREE_BATCHES, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
# How far probabilities may be apart.
PROBABILITY = within(LOGIT_SCALE / 2)["atol"]
needs_torch = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="FSDP2 fails with PyTorch 2.8 and 2.9"
)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


def parse(name, *options):
    """The settings of `accelerate launch` with this configuration."""
    command = ["--config_file", str(CONFIGS / name), *options, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_configuration_is_known_to_accelerate(path):
    """Every key, nested ones too, which Accelerate itself doesn't check."""
    config = load_config_from_file(str(path))
    args, known = parse(path.name), vars(launch_command_parser().parse_args(["script.py"]))
    for name in ("fsdp_config", "deepspeed_config"):
        for key, value in getattr(config, name).items():
            assert key in known
            assert getattr(args, key) == value
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        config.distributed_type == kind for kind in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_configuration_says_its_command(path):
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert 2 <= len(comment) <= 3
    assert f"accelerate launch --config_file examples/accelerate_configs/{path.name} " in comment[-1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(CLIPModel, []), (MetaClip2Model, ["--fsdp_transformer_layer_cls_to_wrap", "MetaClip2EncoderLayer"])],
)
def test_fsdp2_splits_layers_and_saves_all_of_them(monkeypatch, kind, options):
    tokenizer = TOKENIZERS[kind]()
    clip = make_clip(tokenizer, kind=kind)
    model = MicroCLIPForImageClassification.from_clip(clip, CLASS_NAMES, tokenizer=tokenizer)
    for name, value in prepare_multi_gpu_env(parse("fsdp2.yaml", "--main_process_port", "0", *options)).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(model)
    layers = model.clip.vision_model.encoder.layers
    wrap = plugin.auto_wrap_policy
    assert all(wrap(module=layer, recurse=False, nonwrapped_numel=0) for layer in layers)
    assert not wrap(module=model.fg_pooling, recurse=False, nonwrapped_numel=0)


def test_deepspeed_splits_the_optimizer():
    """As far as it can be seen without DeepSpeed."""
    config = load_config_from_file(str(CONFIGS / "deepspeed_zero2.yaml")).deepspeed_config
    settings = DeepSpeedPlugin(**config).deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"


def launch(log, config, *arguments):
    """`accelerate launch` on CPUs, where it has the processes that it would have on GPUs."""
    environment = {
        **os.environ,
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *arguments]
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def finish(launches):
    """Wait for launches, `{log: process}`."""
    try:
        for log, process in launches.items():
            assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        for process in launches.values():
            process.terminate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def read_run(folder):
    return json.loads((folder / "log.json").read_text()), load_file(folder / "model.safetensors")


def test_processes_that_would_each_do_the_whole_run_are_refused(tmp_path):
    """As of `--multi_gpu` on a machine without GPUs, before anything is read or written."""
    message = "microclip adapt: 2 processes were launched, and find no GPU to share the run on (their device is cpu)"
    log = tmp_path / "log"
    script = [str(TESTS.parent / "examples" / "adapt.py"), "--output_dir", str(tmp_path / "out")]
    script += ["--model_name_or_path", "none", "--train_dir", "none"]
    process = launch(log, "multi_gpu.yaml", "--main_process_port", free_port(), *script)
    assert process.wait(timeout=300) != 0
    if "is connected to 1 peer ranks" in log.read_text():
        pytest.skip("this version of accelerate has the two processes share the run on the CPU")
    told = [line for line in log.read_text().splitlines() if line.startswith("microclip adapt:")]
    assert 1 <= len(told) <= 2 and all(line.startswith(message) for line in told), log.read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        pytest.param("fsdp2.yaml", {"min_lr": 2e-6}, id="FSDP2", marks=needs_torch),
        pytest.param("deepspeed_zero2.yaml", {"min_lr_rate": 2e-3}, id="DeepSpeed", marks=needs_deepspeed),
    ],
)
def test_two_process_sharded_run(clip_folder, tmp_path, config, schedule):
    """The same run and evaluations, saved as any model is, and resumed."""
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    options = {"lr_scheduler_kwargs": schedule, "save_strategy": "epoch"}
    with ClearDecisions():
        reference = adapt(clip_folder, one, **THREE_BATCHES, **options)
    arguments = [str(TESTS / "test_distributed.py"), str(clip_folder), str(two), json.dumps(OPTIONS | options)]
    finish({log: launch(log, config, "--main_process_port", free_port(), *arguments)})

    history, weights = read_run(two)
    assert_same_run(history, weights, reference)
    measured = json.loads((two / "evaluations.json").read_text())
    for trainer, error in zip((untrained(clip_folder, one), reference), measured, strict=True):
        assert_clear_bins(trainer.predict(draw_images()).predictions)
        assert error == pytest.approx(calibration_error(trainer), abs=PROBABILITY)
    # Both went the same way on the same machine; at most what is loaded was rounded once more.
    assert_close(load_file(two / "resumed" / "model.safetensors"), weights, rtol=0, atol=1e-7)

    whole = one / "checkpoint-6"
    assert {path.name for path in two.glob("*.py")} == {path.name for path in whole.glob("*.py")}
    assert (two / "config.json").read_text() == (whole / "config.json").read_text()
    loaded = MicroCLIPForImageClassification.from_pretrained(two).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(value.equal(weights[name]) for name, value in loaded.items())


@needs_torch
def test_two_process_sharded_class_mixture(clip_folder, tmp_path):
    """Fitted to features of a model that is split, and merged into it."""
    two = tmp_path / "two"
    options = {"lr_scheduler_kwargs": {"min_lr": 2e-6}, "save_strategy": "epoch", **MIXTURE}
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "one", **THREE_BATCHES, **options)
    options |= {**THREE_BATCHES, "per_device_train_batch_size": 4}
    arguments = [str(TESTS / "test_distributed.py"), str(clip_folder), str(two), json.dumps(options)]
    log = tmp_path / "log"
    finish({log: launch(log, "fsdp2.yaml", "--main_process_port", free_port(), *arguments)})
    history, weights = read_run(two)
    assert_same_mixture(history, weights, reference)
    assert_same_mixture(history, load_file(two / "resumed" / "model.safetensors"), reference)


def test_two_process_run_of_two_machines(clip_folder, tmp_path):
    """Two launches with one file system, where each step's checkpoint gets its final name once."""
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "one", **THREE_BATCHES)
    two = tmp_path / "two"
    options = {"output_dir": str(two), "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    machines = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", "2"]
    arguments = [str(TESTS / "adaptation.py"), str(clip_folder), json.dumps(OPTIONS | options)]
    finish(
        {
            (log := tmp_path / rank): launch(log, "multi_node.yaml", *machines, "--machine_rank", rank, *arguments)
            for rank in ("0", "1")
        }
    )
    assert_same_run(*read_run(two), reference)
    assert sorted(path.name for path in two.iterdir() if path.is_dir()) == ["checkpoint-5", "checkpoint-6", "report"]
    assert (two / "checkpoint-6" / "rng_state_1.pth").exists()
    write_record(reference)
    one, other = (read_csv(folder / "pseudo_labels.csv") for folder in (tmp_path / "one", two))
    assert len(one) == 24 and {row["label"] for row in one} <= set(CLASS_NAMES)
    for own, expected in zip(other, one, strict=True):
        assert float(own.pop("confidence")) == pytest.approx(float(expected.pop("confidence")), abs=PROBABILITY)
        assert own == expected
    swaps = [read_csv(folder / "report" / "swaps.csv") for folder in (tmp_path / "one", two)]
    assert swaps[0] == swaps[1]


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def untrained(clip, output_dir, **options):
    model = MicroCLIPForImageClassification.from_clip(clip, CLASS_NAMES, prior_weighting="uniform")
    args = MicroCLIPTrainingArguments(str(output_dir), disable_tqdm=True, **{"use_cpu": True, **options})
    return MicroCLIPTrainer(model=model, args=args)


def calibration_error(trainer):
    """Unlike the loss, it counts no image twice."""
    return trainer.evaluate(draw_images())["eval_expected_calibration_error"]


def assert_clear_bins(logits):
    """No image changes its class, or its bin of 15, by rounding."""
    assert_clear(logits)
    places = 15 * torch.tensor(logits).double().softmax(-1).amax(-1)
    assert (places - places.round()).abs().min() > 15 * PROBABILITY


def main(clip, output_dir, options):
    # Accelerate splits models over GPUs alone; gloo does so over CPUs as well.
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    options = {**options, "use_cpu": False}
    before = calibration_error(untrained(clip, output_dir, use_cpu=False))
    trainer = adapt(clip, output_dir, **options)
    after = calibration_error(trainer)
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
        Path(output_dir, "evaluations.json").write_text(json.dumps([before, after]))
        shutil.rmtree(Path(output_dir, "checkpoint-6"))
    trainer.accelerator.wait_for_everyone()
    trainer = adapt(clip, output_dir, resume=True, **options)
    trainer.save_model(os.path.join(output_dir, "resumed"))
    trainer.leave_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
