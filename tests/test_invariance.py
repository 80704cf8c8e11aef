"""The same numbers however a run is spread over batches, processes and interruptions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kill_and_resume
import pytest
from adaptation import adapt, draw_images
from decisions import ClearDecisions
from safetensors.torch import load_file
from tolerances import LOSS, assert_weights_close
from transformers import TrainerCallback


pytestmark = pytest.mark.numerical


TESTS = Path(__file__).parent
METRICS = (
    "loss",
    "cross_entropy",
    "fairness",
    "grad_norm",
    "student_agreement",
    "pseudo_label_confidence",
    "head_agreement",
    "effective_classes",
    "label_changes",
)
# Whole batches of 8, for two processes to share: a last one that isn't whole would be filled up with first images.
THREE_BATCHES = {"num_images": 24, "seed": 2}


def steps(log_history):
    """What each step logged that doesn't depend on the clock."""
    return [{name: entry[name] for name in METRICS if name in entry} for entry in log_history if "loss" in entry]


def assert_same_run(log_history, weights, reference):
    expected = steps(reference.state.log_history)
    assert len(steps(log_history)) == len(expected)
    for own, other in zip(steps(log_history), expected, strict=True):
        assert own == pytest.approx(other, rel=LOSS, abs=LOSS)
    way = sum(entry["learning_rate"] for entry in log_history if "loss" in entry)
    assert_weights_close(weights, reference.model.state_dict(), way)


@pytest.fixture(scope="module")
def reference(clip_folder, tmp_path_factory):
    """Batches of 8, 8 and 4."""
    with ClearDecisions():
        return adapt(clip_folder, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, id="accumulated"),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, id="one by one"),
        pytest.param({"attention": "eager"}, id="eager attention"),
        pytest.param({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, id="workers"),
        pytest.param({"gradient_checkpointing": True}, id="activation checkpointing"),
    ],
)
def test_invariance(clip_folder, tmp_path, reference, options):
    trainer = adapt(clip_folder, tmp_path, **options)
    assert_same_run(trainer.state.log_history, trainer.model.state_dict(), reference)


def test_invariance_to_unequal_parts(clip_folder, tmp_path):
    """Batches of 6 as 4 + 2: a mean of means would be another loss."""
    with ClearDecisions():
        whole = adapt(clip_folder, tmp_path, per_device_train_batch_size=20)
    parts = adapt(clip_folder, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=3)
    assert_same_run(parts.state.log_history, parts.model.state_dict(), whole)


def test_invariance_to_labels(clip_folder, tmp_path, reference):
    trainer = adapt(clip_folder, tmp_path, draw_images().remove_columns("label"), gradient_accumulation_steps=1)
    assert_same_run(trainer.state.log_history, trainer.model.state_dict(), reference)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = adapt(clip_folder, tmp_path, draw_images().remove_columns("label"), **accumulated)
    assert_same_run(trainer.state.log_history, trainer.model.state_dict(), reference)


def run_processes(clip_folder, folder, count, *runs):
    """Logs and weights of runs in `count` processes, which do one after the other, in `folder / "0"` and so on."""
    outputs = [folder / str(index) for index in range(len(runs))]
    runs = [json.dumps({**options, "output_dir": str(output)}) for output, options in zip(outputs, runs, strict=True)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launch, str(TESTS / "adaptation.py"), str(clip_folder), *runs]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [
        (json.loads((output / "log.json").read_text()), load_file(output / "model.safetensors")) for output in outputs
    ]


def test_two_process_runs(clip_folder, tmp_path):
    plain, aligned = THREE_BATCHES, {**THREE_BATCHES, "distribution_alignment": True}
    fours = {"per_device_train_batch_size": 4}
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    by_four, by_two, with_alignment = run_processes(
        clip_folder, tmp_path, 2, plain | fours, plain | accumulated, aligned | fours
    )
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "plain", **plain)
        aligned_reference = adapt(clip_folder, tmp_path / "aligned", **aligned)
    assert_same_run(*by_four, reference)
    assert_same_run(*by_two, reference)
    assert_same_run(*with_alignment, aligned_reference)


MIXTURE = {"class_mixture": True, "class_frequencies": "estimated", "distribution_alignment": True}
# Of a mixture's weights, relative: features are kept in half precision, 2^-11 of a number, and the covariance's
# inverse may enlarge their differences some times.
MIXTURE_WEIGHT = 0.02


def assert_same_mixture(log_history, weights, reference):
    """The same steps, and the same model at the end."""
    expected = steps(reference.state.log_history)
    for own, other in zip(steps(log_history), expected, strict=True):
        assert own == pytest.approx(other, rel=LOSS, abs=LOSS)
    for name in ("classifier.weight", "logit_adjustment.scale", "logit_adjustment.bias"):
        own = weights[name]
        other = reference.model.state_dict()[name]
        assert (own - other).norm() <= MIXTURE_WEIGHT * other.norm(), name


def test_class_mixture_of_two_processes(clip_folder, tmp_path):
    options = {**THREE_BATCHES, **MIXTURE}
    fours = {"per_device_train_batch_size": 4}
    once = {"num_train_epochs": 0}
    trained, fitted = run_processes(clip_folder, tmp_path, 2, options | fours, options | once)
    with ClearDecisions():
        trained_reference = adapt(clip_folder, tmp_path / "trained", **options)
    assert_same_mixture(*trained, trained_reference)
    assert_same_mixture(*fitted, adapt(clip_folder, tmp_path / "fitted", **options, **once))


@pytest.mark.parametrize("prior_refresh", ["step", "never"])
def test_class_mixture_of_accumulated_batches(clip_folder, tmp_path, prior_refresh):
    options = {**THREE_BATCHES, **MIXTURE, "distribution_alignment": False, "prior_refresh": prior_refresh}
    with ClearDecisions():
        whole = adapt(clip_folder, tmp_path / "whole", **options)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    parts = adapt(clip_folder, tmp_path / "parts", **options, **accumulated)
    assert_same_mixture(parts.state.log_history, parts.model.state_dict(), whole)


class StopAt(TrainerCallback):
    """Stops as a kill would: nothing more is done for the run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def assert_resume_is_exact(whole_run, clip_folder, folder, step, **options):
    """A run that is interrupted after a step, whose checkpoint is its last, ends as one that isn't."""
    whole = whole_run(**options)
    with pytest.raises(KeyboardInterrupt):
        adapt(clip_folder, folder, callbacks=[StopAt(step + 1)], **options)
    shutil.rmtree(folder / f"checkpoint-{step + 1}", ignore_errors=True)
    resumed = adapt(clip_folder, folder, resume=True, **options)
    assert steps(resumed.state.log_history) == steps(whole.state.log_history)
    weights = resumed.model.state_dict()
    assert all(value.equal(weights[name]) for name, value in whole.model.state_dict().items())
    state = resumed.diagnostics.state_dict()
    for name, value in whole.diagnostics.state_dict().items():
        assert value.equal(state[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_resume_is_exact(whole_run, clip_folder, tmp_path, step, accumulation):
    """Interrupted after any step, within an epoch (of 3) or at its end, the run ends in the same bits."""
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    assert_resume_is_exact(whole_run, clip_folder, tmp_path, step, **options)


def test_resume_is_exact_with_aligned_distributions(whole_run, clip_folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "distribution_alignment": True}
    assert_resume_is_exact(whole_run, clip_folder, tmp_path, 2, **options)


def test_resume_is_exact_with_a_class_mixture(whole_run, clip_folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, **MIXTURE}
    assert_resume_is_exact(whole_run, clip_folder, tmp_path, 2, **options)


@pytest.mark.slow
def test_resume_after_kills(clip_folder, tmp_path):
    """Twenty times, some of them while a checkpoint is being written; the process group gets SIGKILL."""
    assert kill_and_resume.main(str(clip_folder), str(tmp_path)) > 0
