"""The CLIP of the bird world as ONNX, in float32 and in 8 bits, against PyTorch, on rendered birds."""

import copy

import numpy as np
import pytest
import torch
from birdworld import tiny_clip
from birdworld.domains import DOMAINS
from export_checks import assert_agrees, run_onnx

from microclip_hf import MicroCLIPForImageClassification


onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
export = pytest.importorskip("microclip_hf.export", reason="needs the extra onnx")


@pytest.mark.slow
def test_birds(tmp_path, monkeypatch):
    """64 patches. One trace serves both files: it takes long."""
    domain = DOMAINS["dusk"]
    model = MicroCLIPForImageClassification.from_clip(
        tiny_clip.FOLDER, domain.class_names, descriptions=domain.descriptions, prior_weighting="uniform"
    )
    images = [example["image"] for example in domain.examples("test", 100)]
    pixel_values = model.image_processor(images, return_tensors="pt")["pixel_values"]
    reference = copy.deepcopy(model.half()).float()
    traced = export._trace(model.train())
    assert model.training and model.dtype == torch.float16
    monkeypatch.setattr(export, "_trace", lambda model: traced)
    whole, small = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    export.export_onnx(model, whole)
    export.export_onnx(model, small, int8=True)

    logits, masks = run_onnx(whole, pixel_values)
    assert assert_agrees(logits, masks, reference, pixel_values) > 80
    rounded, rounded_masks = run_onnx(small, pixel_values)
    assert (rounded.argmax(-1) == logits.argmax(-1)).mean() > 0.9
    assert (rounded_masks == masks).mean() > 0.97
    assert np.median(np.abs(rounded - logits)) < 0.1
    assert small.stat().st_size < 0.45 * whole.stat().st_size
    check_weights(onnx.load(small).graph, reference)


def check_weights(graph, model):
    """Each linear layer's weight is there in 8 bits, within a step of what it was; no other product is."""
    initializers = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    linear = {
        name: layer.weight.detach().numpy().T
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "text_" not in name
    }
    found = set()
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            stored, zero_point = (initializers[node.input[i]].astype(np.float32) for i in (1, 3))
            step = initializers[node.input[1].replace("_quantized", "_scale")]
            weight = (stored - zero_point) * step
            # Projections of the pooling are all alike before adaptation.
            same_shape = {name: exact for name, exact in linear.items() if exact.shape == weight.shape}
            names = [name for name, exact in same_shape.items() if (np.abs(weight - exact) < 1.01 * step).all()]
            assert names
            found.update(names)
    assert found == set(linear)
