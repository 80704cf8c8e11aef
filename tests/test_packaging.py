"""The wheel, as a stranger installs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

SAVE = """
import sys
from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
model = MicroCLIPForImageClassification.from_clip(sys.argv[1], ["red disc", "blue bar"])
model.save_pretrained(sys.argv[2])
"""
LOAD = """
import importlib.util, sys
assert importlib.util.find_spec("microclip_hf") is None
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
assert {answer["label"] for answer in classify(sys.argv[2])} == {"red disc", "blue bar"}
"""


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(clip_folder, tmp_path):
    """It imports, shows the command's help, saves a model, and that model loads once the package is gone."""
    from numpy.random import default_rng
    from tiny_inputs import DESCRIPTIONS, draw_shape

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        result = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[train]")
    assert "--train_dir" in run(tmp_path / "fresh" / "bin" / "microclip", "adapt", "--help")
    run(python, "-c", SAVE, clip_folder, tmp_path / "saved")
    run(python, "-m", "pip", "uninstall", "-q", "-y", "microclip_hf")
    draw_shape(next(iter(DESCRIPTIONS)), default_rng(0)).save(tmp_path / "photo.png")
    assert "Do you wish" not in run(python, "-c", LOAD, tmp_path / "saved", tmp_path / "photo.png")
