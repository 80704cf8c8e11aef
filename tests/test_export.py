"""ONNX files and exported programs against the model in PyTorch, and every code block of docs/export.md."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, DESCRIPTIONS
from decisions import ClearDecisions
from export_checks import assert_agrees, run_onnx
from PIL import Image
from tiny_inputs import LOGIT_SCALE, draw_shape
from tolerances import assert_clear, within
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import main as microclip


pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
onnx_ir = pytest.importorskip("onnx_ir", reason="needs the extra onnx")
export = pytest.importorskip("microclip_hf.export", reason="needs the extra onnx")

ROOT = Path(__file__).parents[1]


def run_microclip(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    microclip()


def make_images(count, size=32):
    """Smooth ones, whose patches differ."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    return torch.nn.functional.interpolate(noise, (size, size), mode="bicubic")


@pytest.fixture
def workplace(clip, tokenizer, tmp_path, monkeypatch):
    """A folder with what docs/export.md names."""
    model = MicroCLIPForImageClassification.from_clip(
        clip,
        CLASS_NAMES,
        descriptions=DESCRIPTIONS,
        tokenizer=tokenizer,
        prior_weighting="uniform",
        keep_text_model=True,
    )
    model.save_pretrained(tmp_path / "adapted")
    draw_shape("red disc", np.random.default_rng(0)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_code_block_of_the_docs(workplace, monkeypatch, capsys, tokenizer):
    """One export serves all: it takes long."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (_, command), (_, without_torch), (_, with_torch) = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    model = MicroCLIPForImageClassification.from_pretrained("adapted")

    run_microclip(monkeypatch, command)
    size = Path("adapted.onnx").stat().st_size
    printed = capsys.readouterr().out
    assert f"Saved to adapted.onnx ({size / 1e6:.1f} MB)" in printed
    assert re.search(r"\d of 4 saliency masks are the same", printed)
    assert float(re.search(r"at most (\S+),", printed)[1]) < within(LOGIT_SCALE)["atol"]
    for count in (1, 3, 40):
        known = assert_agrees(*run_onnx("adapted.onnx", make_images(count)), model, make_images(count))
    assert known > 20
    check_file(Path("adapted.onnx"), len(tokenizer))
    with pytest.raises(SystemExit, match=r"adapted\.onnx exists already"):
        run_microclip(monkeypatch, command)

    ending = "import sys\nprint(json.dumps(logits.tolist()))\nassert not {'torch', 'transformers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", without_torch + ending], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer, logits = result.stdout.splitlines()
    with torch.no_grad(), ClearDecisions():
        expected = model(**model.image_processor(Image.open("photo.png"), return_tensors="pt")).logits
    assert_clear(expected)
    assert answer == model.config.id2label[int(expected.argmax())]
    np.testing.assert_allclose(json.loads(logits), expected.numpy(), **within(LOGIT_SCALE))

    exec(with_torch, {})
    program = torch.export.load("adapted.pt2").module()
    for count in (1, 3, 8):
        known = assert_agrees(program(pixel_values=make_images(count)).logits, None, model, make_images(count))
    assert known > 4


def check_file(path, vocabulary_size):
    """Names, axes and metadata, and that nothing of this machine or of the text tower is in it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    axes = {value.name: value.shape for value in session.get_inputs() + session.get_outputs()}
    assert axes == {
        "pixel_values": ["batch_size", 3, 32, 32],
        "logits": ["batch_size", 3],
        "saliency_mask": ["batch_size", 16],
    }
    facts = session.get_modelmeta().custom_metadata_map
    assert "bicubic" in facts.pop("preparation")
    assert {name: json.loads(value) for name, value in facts.items()} == {
        "class_names": CLASS_NAMES,
        "image_size": 32,
        "shortest_edge": 32,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    assert str(ROOT).encode() not in path.read_bytes()
    assert all(vocabulary_size not in weight.dims for weight in onnx.load(path).graph.initializer)


@pytest.mark.numerical
def test_exported_program_of_other_settings(clip, tokenizer):
    settings = {"saliency_affinity": "cosine", "saliency_cut": "mean", "fg_query": "random"}
    model = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, tokenizer=tokenizer, prior_weighting="uniform", **settings
    )
    shapes = {"pixel_values": {0: torch.export.Dim("batch_size")}}
    arguments = {"pixel_values": make_images(2), "output_patch_embeds": True}
    shapes["output_patch_embeds"] = None
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes).module()
    for count in (1, 3, 8):
        output = program(pixel_values=make_images(count), output_patch_embeds=True)
        known = assert_agrees(output.logits, output.saliency_mask, model, make_images(count))
    assert known > 4


@pytest.fixture
def traced(monkeypatch):
    """One linear layer takes the place of the traced model."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["pixel_values", "weight"], ["logits"], "product")],
        "layer",
        [onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, ["batch_size", 64])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch_size", 64])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    proto = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    monkeypatch.setattr(export, "_trace", lambda model: (onnx_ir.serde.deserialize_model(proto), []))
    return weight


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.numerical
def test_weights_beyond_one_file_lie_beside_it(traced, model, tmp_path, monkeypatch, one_file, int8):
    if not one_file:
        monkeypatch.setattr(export, "ONE_FILE", 0)
    path = tmp_path / "new" / "model.onnx"
    export.export_onnx(model, path, int8)
    names = {"model.onnx"} if one_file else {"model.onnx", "model.onnx.data"}
    assert {file.name for file in path.parent.iterdir()} == names
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    assert size < 2.5 * traced.size if int8 else size > 4 * traced.size
    inputs = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"pixel_values": inputs})
    expected = inputs @ traced
    close = {"rtol": 0, "atol": 0.5} if int8 else within(np.abs(expected).max())
    np.testing.assert_allclose(outputs, expected, **close)


@pytest.mark.parametrize("failing", ["onnx.checker.check_model", "microclip_hf.export.quantize_dynamic"])
def test_a_failed_export_leaves_what_was_there(traced, model, tmp_path, monkeypatch, failing):
    def fail(*arguments, **kwargs):
        raise RuntimeError("no room")

    path = tmp_path / "model.onnx"
    monkeypatch.setattr(failing, fail)
    for before in ([], [path]):
        for file in before:
            file.write_bytes(b"older")
        with pytest.raises(RuntimeError, match="no room"):
            export.export_onnx(model, path, int8=True)
        assert list(tmp_path.iterdir()) == before
    assert path.read_bytes() == b"older"


def test_an_image_processor_that_the_metadata_cannot_describe(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_trace", None)
    for settings, message in (
        ({"do_center_crop": False}, "set do_center_crop=True"),
        ({"crop_size": {"height": 48, "width": 48}}, "48"),
        ({"resample": Image.Resampling.BILINEAR}, "'resample': 2"),
        ({"size": {"height": 32, "width": 32}}, "'size'"),
    ):
        processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **settings}
        model.image_processor = CLIPImageProcessorPil(**processor)
        with pytest.raises(ValueError, match=message):
            export.export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_hands_int8_on(clip, tokenizer, tmp_path, monkeypatch, capsys):
    model = MicroCLIPForImageClassification.from_clip(clip, CLASS_NAMES, tokenizer=tokenizer)
    model.half().save_pretrained(tmp_path / "adapted")
    calls = []

    def write(model, path, int8):
        calls.append((model.dtype, path, int8))
        Path(path).write_bytes(bytes(300_000))
        Path(f"{path}.data").write_bytes(bytes(2_000_000))

    monkeypatch.setattr("microclip_hf.commands.export.export_onnx", write)
    monkeypatch.setattr("microclip_hf.commands.export._compare", lambda model, path: "compared")
    path = str(tmp_path / "small.onnx")
    run_microclip(monkeypatch, f"microclip export --model_name_or_path {tmp_path}/adapted --output {path} --int8 true")
    assert calls == [(torch.float32, path, True)]
    assert capsys.readouterr().out == f"Saved to {path} (2.3 MB).\ncompared\n"


def test_errors_of_the_command(clip_folder, tmp_path, monkeypatch):
    command = f"microclip export --output {tmp_path / 'model.onnx'} --model_name_or_path"
    with pytest.raises(SystemExit, match=r"microclip export: .* is a model of type 'clip'; pass a microCLIP"):
        run_microclip(monkeypatch, f"{command} {clip_folder}")
    with pytest.raises(SystemExit, match=r"microclip export: .*no-folder"):
        run_microclip(monkeypatch, f"{command} {tmp_path / 'no-folder'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith("microclip_hf.") and "export" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=rf'{package} is missing; pip install "microclip_hf\[onnx\]"'):
        run_microclip(monkeypatch, "microclip export")
