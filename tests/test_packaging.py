"""The lower bounds that are tested, and the wheel, as a stranger installs it."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


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


def read_requirements(lines, operator):
    """`{name: version}`, where each line is one name and one version."""
    requirements = [Requirement(line) for line in lines]
    bounds = {
        canonicalize_name(own.name): [(one.operator, one.version) for one in own.specifier] for own in requirements
    }
    assert all(len(own) == 1 and own[0][0] == operator for own in bounds.values()), bounds
    return {name: version for name, ((_, version),) in bounds.items()}


def test_the_lowest_versions_are_the_tested_ones():
    """`make test-lowest` runs with exactly the lower bounds of setup.cfg, and each of its libraries has one."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    allowed = f"{setup['options']['install_requires']}\n{extras['train']}\n{extras['onnx']}".split()
    tested = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    tested = [line for line in tested if not line.startswith("#")]
    assert read_requirements(allowed, ">=") == read_requirements(tested, "==")


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
    usage = run(tmp_path / "fresh" / "bin" / "microclip", "adapt", "--help")
    assert "--train_dir" in usage and "birdsnap" in usage  # a preset, read from its file
    run(python, "-c", SAVE, clip_folder, tmp_path / "saved")
    run(python, "-m", "pip", "uninstall", "-q", "-y", "microclip_hf")
    draw_shape(next(iter(DESCRIPTIONS)), default_rng(0)).save(tmp_path / "photo.png")
    assert "Do you wish" not in run(python, "-c", LOAD, tmp_path / "saved", tmp_path / "photo.png")
