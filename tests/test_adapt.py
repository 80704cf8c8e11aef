"""The command and its errors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_inputs
import torch
from PIL import Image
from safetensors.torch import load_file
from tolerances import assert_clear
from torch.nn.functional import normalize
from transformers import AutoProcessor, CLIPModel

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer
from microclip_hf.commands import adapt
from microclip_hf.commands import main as microclip
from microclip_hf.data.sources import load_image_folder


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
UNIFORM = '{"prior_weighting": "uniform"}'


def flags(inputs, output, **options):
    options = {
        "model_name_or_path": inputs / "clip",
        "train_dir": inputs / "photos",
        "class_names": inputs / "names.txt",
        "output_dir": output,
        "num_train_epochs": 1,
        "num_crops": 1,
        "use_cpu": True,
        **options,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_adapt_trains_saves_reloads_and_predicts(inputs, tmp_path, capsys):
    options = {"descriptions": inputs / "descriptions.json", "test_dir": inputs / "test"}
    overrides = '{"prior_weighting": "uniform", "fg_query": "cls"}'
    adapt.main(flags(inputs, tmp_path, config_overrides=overrides, **options))
    printed = capsys.readouterr().out
    assert re.search(r"names .* % -> descriptions .* % -> adapted .* %\n", printed)
    assert sorted(re.findall(r"%  (.*)", printed)) == sorted(tiny_inputs.DESCRIPTIONS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["prior_weighting"] == "uniform" and config["fg_query"] == "cls"
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert all(0 <= results[f"{name}_accuracy"] <= 1 for name in ("zero_shot", "cupl", "adapted"))
    assert (tmp_path / "README.md").exists() and Image.open(tmp_path / "adaptation.png").width > 600
    assert load_file(tmp_path / "model.safetensors")["classifier.weight"].shape == (3, 16)


def test_adapt_goes_on_after_an_unreadable_image(inputs, tmp_path):
    """The first one, which would also be shown."""
    shutil.copytree(inputs / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "0.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 49 images can't be read \(.*0.png\)"):
        adapt.main(flags(inputs, tmp_path / "out", train_dir=tmp_path / "photos", config_overrides=UNIFORM))
    assert (tmp_path / "out" / "adaptation.png").exists()


def test_an_interrupted_run_says_how_to_go_on(inputs, tmp_path, monkeypatch, capsys):
    def train(trainer, **kwargs):
        (tmp_path / "checkpoint-3").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(MicroCLIPTrainer, "train", train)
    with pytest.raises(SystemExit) as end:
        adapt.main(flags(inputs, tmp_path, config_overrides=UNIFORM))
    assert end.value.code == 130
    assert f"--resume_from_checkpoint true the same command goes on from {tmp_path}" in capsys.readouterr().err


def test_an_existing_result_is_not_overwritten(inputs, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="already holds a model"):
        adapt.main(flags(inputs, tmp_path))
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("class_names", "one\n", "at least two classes"),
        ("class_names", "a\nA\n", "duplicate"),
        ("descriptions", '{"yellow star": ["x"]}', "'yellow star', which is none of the 3 class names"),
        (
            "descriptions",
            '{"red dics": ["x"]}',
            r"to 'red dics' in .*names.txt is 'red disc': make the two the same\.$",
        ),
        ("model_name_or_path", "no/such/clip", "no/such/clip can't be loaded: there is no such folder here"),
        ("descriptions", "{", "isn't a JSON file"),
        ("train_dir", "no folder", "isn't a folder"),
        ("num_crops", -1, "num_crops is -1"),
        ("class_names", None, "--class_names .*: there is no such file"),
        ("resume_from_checkpoint", "true", "holds no checkpoint"),
        ("config_overrides", '{"fusion_ratio": 3}', "fusion_ratio is 3"),
        ("config_overrides", "{fusion", "isn't JSON"),
        ("config_overrides", '{"fusion": 1}', "has 'fusion'; the settings are fg_pooling"),
        ("templates", "a photo", "no '{}'"),
        ("streaming", "true", "--streaming true needs --max_steps"),
        ("dataset_name", "user/photos", "either --train_dir or --dataset_name"),
        (
            "eval_strategy",
            "epoch",
            "--eval_strategy needs images with labels; pass them with --test_dir or --test_split",
        ),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(inputs, tmp_path, option, content, message, monkeypatch):
    monkeypatch.setattr(MicroCLIPForImageClassification, "from_clip", None)
    if option in ("class_names", "descriptions"):
        if content is not None:
            (tmp_path / "file").write_text(content)
        content = tmp_path / "file"
    with pytest.raises(SystemExit, match=message):
        adapt.main(flags(inputs, tmp_path / "out", **{option: content}))
    assert not (tmp_path / "out").exists()


def test_an_adapted_model_is_no_start(inputs, tmp_path, model):
    model.save_pretrained(tmp_path / "adapted")
    with pytest.raises(
        SystemExit, match=r"adapted was adapted already; pass the CLIP .* --resume_from_checkpoint true"
    ):
        adapt.main(flags(inputs, tmp_path / "out", model_name_or_path=tmp_path / "adapted"))
    assert not (tmp_path / "out").exists()


def test_folders_of_images(inputs, tmp_path):
    names = list(tiny_inputs.DESCRIPTIONS)
    assert load_image_folder(inputs / "photos", names).column_names == ["image"]
    labelled = load_image_folder(inputs / "test", ["Blue_Bar", "green-square", "unused", "RED disc"])
    assert sorted(set(labelled["label"])) == [0, 1, 3] and len(labelled) == 12
    image, label = labelled[0]["image"], labelled[0]["label"]
    red, green, blue = np.asarray(image, int).sum((0, 1))
    assert {0: blue, 1: green, 3: red}[label] == max(red, green, blue)
    with pytest.raises(ValueError, match="labels 'blue bar', 'green square' are none of the 2 classes"):
        load_image_folder(inputs / "test", ["red disc", "star"], labels_required=True)
    with pytest.raises(ValueError, match="lie in no sub-folder"):
        load_image_folder(inputs / "photos", names, labels_required=True)
    assert load_image_folder(inputs / "test", ["red disc", "star"]).column_names == ["image"]
    odd = tmp_path / "photos [2024]"
    (odd / "real").mkdir(parents=True)
    (odd / "linked").symlink_to(inputs / "test" / "red disc")
    for name in (".hidden.png", "metadata.csv", "photos.zip"):
        (odd / name).write_text("")
    (odd / "real" / "one.PNG").write_bytes(next((inputs / "photos").iterdir()).read_bytes())
    assert len(load_image_folder(odd, names)) == 5
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no image files"):
        load_image_folder(tmp_path / "empty", names)


def test_classes_called_train_and_test_are_classes(inputs, tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        for source in sorted((inputs / "photos").iterdir())[:2]:
            (tmp_path / name / source.name).write_bytes(source.read_bytes())
    dataset = load_image_folder(tmp_path, ["train", "test"], labels_required=True)
    assert sorted(dataset["label"]) == [0, 0, 1, 1]


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["microclip", "--help"])
    microclip()
    assert "adapt" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["microclip", "adpat"])
    with pytest.raises(SystemExit, match="no command 'adpat'"):
        microclip()
    monkeypatch.setattr(sys, "argv", ["microclip", "adapt", "--help"])
    with pytest.raises(SystemExit, match="0"):
        microclip()
    printed = capsys.readouterr().out
    assert "--train_dir" in printed and "--num_crops" in printed and "microclip adapt" in printed


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["microclip", "adapt"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.startswith("microclip_hf.") and "adapt" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r'pip install "microclip_hf\[train\]"'):
        microclip()


def test_settings_from_a_file(inputs, tmp_path, capsys):
    lines = dict(zip(*[iter(flags(inputs, tmp_path / "out"))] * 2, strict=True))
    text = "".join(f"{name[2:]}: {value}\n" for name, value in lines.items())
    text += "learning_rate: 1e-3\nconfig_overrides: {prior_weighting: uniform}\ncrop_ratio: [0.4, 0.6]\nseed: 3\n"
    (tmp_path / "settings.yaml").write_text(text)
    adapt.main(["--config", str(tmp_path / "settings.yaml"), "--seed", "5"])
    saved = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert (saved["learning_rate"], saved["crop_ratio"], saved["seed"]) == (1e-3, [0.4, 0.6], 5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["prior_weighting"] == "uniform"
    (tmp_path / "settings.yaml").write_bytes(text.encode("utf-16"))  # as Notepad saves it
    assert adapt._expand_config(["--config", str(tmp_path / "settings.yaml")])[-2:] == ["--seed", "3"]
    for content, message in (("a: [", "isn't a YAML file"), ("- 1", "holds a list")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(SystemExit, match=message):
            adapt.main(["--config", str(tmp_path / "bad.yaml"), *flags(inputs, tmp_path / "other")])
    with pytest.raises(SystemExit, match="No such file"):
        adapt.main(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "bad.yaml").write_text("lerning_rate: 1")
    with pytest.raises(SystemExit):
        adapt.main(["--config", str(tmp_path / "bad.yaml")])
    assert "no setting --lerning_rate" in capsys.readouterr().err


@pytest.mark.numerical
def test_accuracies_of_plain_clip(inputs, tmp_path):
    """Against CLIPModel's own features and texts."""
    options = {"test_dir": inputs / "test", "descriptions": inputs / "descriptions.json", "num_train_epochs": 0.1}
    adapt.main(flags(inputs, tmp_path, config_overrides='{"prior_weighting": "uniform"}', **options))
    results = json.loads((tmp_path / "all_results.json").read_text())
    clip = CLIPModel.from_pretrained(inputs / "clip")
    processor = AutoProcessor.from_pretrained(inputs / "clip", backend="pil")
    names = list(tiny_inputs.DESCRIPTIONS)
    photos = load_image_folder(inputs / "test", names, labels_required=True)
    with torch.no_grad():
        images = clip.get_image_features(**processor(images=list(photos["image"]), return_tensors="pt")).pooler_output
        for key, texts in (
            ("zero_shot", [[f"a photo of a {name}."] for name in names]),
            ("cupl", tiny_inputs.DESCRIPTIONS.values()),
        ):
            heads = []
            for own in texts:
                tokens = processor(text=list(own), return_tensors="pt", padding=True)
                heads.append(
                    normalize(normalize(clip.get_text_features(**tokens).pooler_output, dim=-1).mean(0), dim=0)
                )
            scores = normalize(images, dim=-1) @ torch.stack(heads).T
            assert_clear(scores, scale=1)
            right = scores.argmax(-1) == torch.tensor(photos["label"])
            assert results[f"{key}_accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.slow
@pytest.mark.skipif(not (BIN / ".." / ".installed").exists(), reason="not an environment that make set up")
def test_make_demo():
    result = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.loads((ROOT / "outputs" / "demo" / "all_results.json").read_text())
    assert results["adapted_accuracy"] > max(results["cupl_accuracy"], results["zero_shot_accuracy"])
    for name in ("model.safetensors", "README.md", "adaptation.png"):
        assert (ROOT / "outputs" / "demo" / name).exists()
    assert "says of the first image" in result.stdout
    assert re.search(r"names [\d.]+ % -> descriptions [\d.]+ % -> adapted [\d.]+ %\n", result.stdout)
    bars = ("Features before training: ", "Adapting: ", "Features after training: ")
    assert all(line.startswith(bars) for line in re.split(r"[\r\n]+", result.stderr) if line)
