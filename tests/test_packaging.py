"""The lower bounds that are tested, and the wheel, as a stranger installs it."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from microclip_hf.commands import COMMANDS


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
CLASSIFY = """
import importlib.util, sys
import microclip_hf
from transformers import pipeline
assert importlib.util.find_spec("datasets") is None and importlib.util.find_spec("onnx") is None
print(pipeline("image-classification", model=sys.argv[1])(sys.argv[2]))
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
    named = [setup["options"]["install_requires"], *(extras[name] for name in ("train", "onnx", "heic", "open_clip"))]
    allowed = "\n".join(named).split()
    tested = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    tested = [line for line in tested if not line.startswith("#")]
    assert read_requirements(allowed, ">=") == read_requirements(tested, "==")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


class Fresh:
    """An environment of its own with the wheel and one extra, or none."""

    def __init__(self, folder, wheel, extra=None):
        self.folder = folder
        self.run(sys.executable, "-m", "venv", folder / "fresh")
        self.bin = folder / "fresh" / "bin"
        install = ("-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
        self.python(*install, f"{wheel}[{extra}]" if extra else wheel)

    def run(self, *command, returncode=0):
        """What a command prints."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [*map(str, command)]
        result = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert result.returncode == returncode, result.stdout + result.stderr
        return result.stdout + result.stderr

    def python(self, *arguments):
        return self.run(self.bin / "python", *arguments)

    def microclip(self, *arguments, returncode=0):
        return self.run(self.bin / "microclip", *arguments, returncode=returncode)


@pytest.fixture(scope="module")
def saved(inputs, tmp_path_factory):
    """A model, to be used where nothing but the wheel is."""
    from microclip_hf import MicroCLIPForImageClassification

    folder = tmp_path_factory.mktemp("saved")
    MicroCLIPForImageClassification.from_clip(
        inputs / "clip", ["red disc", "blue bar"], prior_weighting="uniform"
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_without_any_extra(wheel, inputs, saved, tmp_path):
    """It imports, classifies, pushes and converts; the other commands say which extra they need."""
    fresh = Fresh(tmp_path, wheel)
    photo = next((inputs / "photos").iterdir())
    assert "red disc" in fresh.python("-c", CLASSIFY, saved, photo)
    need_none = {"push": "--repo_id", "convert": "--quick_gelu"}
    for name, (_, extra) in COMMANDS.items():
        if name not in need_none:
            assert f'pip install "microclip_hf[{extra}]"' in fresh.microclip(name, "--help", returncode=1)
    for name, option in need_none.items():
        assert option in fresh.microclip(name, "--help")


def test_push_and_convert_need_no_extra():
    """As above, seen by their imports; PyYAML and Jinja come with other packages too."""
    hidden = ("accelerate", "datasets", "evaluate", "matplotlib", "tenacity")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import microclip_hf.commands."
    for name in ("push", "convert"):
        subprocess.run([sys.executable, "-c", f"{code}{name}"], check=True)
    assert subprocess.run([sys.executable, "-c", f"{code}adapt"], capture_output=True).returncode == 1


@pytest.mark.slow
def test_the_extra_onnx_alone(wheel, saved, tmp_path):
    fresh = Fresh(tmp_path, wheel, "onnx")
    assert "--int8" in fresh.microclip("export", "--help")
    printed = fresh.microclip("export", "--model_name_or_path", saved, "--output", "model.onnx")
    assert "4 of 4 saliency masks are the same" in printed and (tmp_path / "model.onnx").exists()
    assert 'pip install "microclip_hf[train]"' in fresh.microclip("adapt", "--help", returncode=1)


@pytest.mark.slow
def test_the_extra_train_alone(wheel, inputs, clip_folder, tmp_path):
    """Its commands run, with presets read from files of the wheel; a saved model loads once the package is gone."""
    from test_adapt import UNIFORM, flags

    fresh = Fresh(tmp_path, wheel, "train")
    commands = [name for name, (_, extra) in COMMANDS.items() if extra == "train"]
    usage = {name: fresh.microclip(name, "--help") for name in commands}
    assert "--train_dir" in usage["adapt"] and "birdsnap" in usage["evaluate"] and "--base_url" in usage["describe"]
    texts = {"descriptions": inputs / "descriptions.json", "test_dir": inputs / "test", "config_overrides": UNIFORM}
    assert "says of the first image" in fresh.microclip("adapt", *flags(inputs, tmp_path / "out", **texts))
    assert "Written" in fresh.microclip("report", "out")
    assert "48 photos" in fresh.microclip("predict", inputs / "photos", "--model", "out", "--output", "labels.csv")
    model = ("--model_name_or_path", "out", "--output_dir", "results")
    assert "Saved to results" in fresh.microclip("evaluate", *model, "--test_dir", inputs / "test")
    assert "login" in fresh.microclip("push", "out", "--repo_id", "user/shapes", returncode=1)
    fresh.python("-c", SAVE, clip_folder, tmp_path / "saved")
    fresh.python("-m", "pip", "uninstall", "-q", "-y", "microclip_hf")
    photo = next((inputs / "photos").iterdir())
    assert "Do you wish" not in fresh.python("-c", LOAD, tmp_path / "saved", photo)
