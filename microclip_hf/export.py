"""The whole classifier, the saliency cut included, as an ONNX file that is used without torch and transformers."""

import contextlib
import copy
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir
import onnxscript  # noqa: F401  torch's exporter needs it, and would miss it late
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL.Image import Resampling
from torch import nn

from .configuration_microclip import default_image_processor
from .files import whole_files
from .modeling_microclip import MicroCLIPForImageClassification
from .preparation import Preparation


PREPARATION = (
    "Upright RGB image; shorter side resized to shortest_edge, bicubic with antialiasing; centre crop of image_size x "
    "image_size; divided by 255; minus image_mean, divided by image_std; float32 of shape (batch_size, 3, image_size, "
    "image_size). Outputs: logits (batch_size, classes), in the order of class_names; saliency_mask (batch_size, "
    "patches), the salient patches, row by row."
)
# Bytes of weights in one file: a protobuf message ends at 2^31, and the graph itself needs some.
ONE_FILE = 2**31 - 2**26
# Where torch's exporter writes which modules an operation comes from.
MODULES = "pkg.torch.onnx.class_hierarchy"


def export_onnx(model: MicroCLIPForImageClassification, path: str | os.PathLike, int8: bool = False) -> None:
    """Write a model as ONNX, in float32 and for any batch size; the model itself isn't changed.

    Input `pixel_values` (float32 of shape `(batch_size, num_channels, image_size, image_size)`), outputs `logits`
    (float32 of shape `(batch_size, num_labels)`) and `saliency_mask` (bool of shape `(batch_size, num_patches)`). The
    file's metadata holds what an image has to go through: `class_names`, `image_size`, `shortest_edge`, `image_mean`
    and `image_std`, each as JSON, and `preparation` in words.

    The file gets its name, or replaces an older one, once it is complete and checked. Weights of 2 GB and more lie
    beside it, in `{path}.data`.

    Args:
        model, path: on any device and in any precision; the file to write, whose folders are made if missing.
        int8 (`bool`, *optional*, defaults to `False`): weights of linear layers in 8 bits, one scale an output
            channel, and their inputs rounded to 8 bits while running; everything else, the cut, the attention between
            tokens and the class vectors among it, stays in float32.

    Raises:
        ValueError: if the model's image processor doesn't prepare images as above.
        onnx.checker.ValidationError: if what was written is no valid ONNX model.
    """
    path = Path(path)
    metadata = _usage_metadata(model)
    graph, float_products = _trace(model)
    graph.metadata_props.update(metadata)
    # The weights' file moves first: what has the final name is complete.
    with whole_files(path.parent, last=path.name) as folder:
        written = folder / path.name
        if int8:
            _save_int8(graph, written, float_products)
        else:
            _save(graph, written)
        onnx.checker.check_model(written, full_check=True)


class _Classifier(nn.Module):
    """The two outputs that are exported."""

    def __init__(self, model: MicroCLIPForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values, output_patch_embeds=True)
        return output.logits, output.saliency_mask


def _usage_metadata(model: MicroCLIPForImageClassification) -> dict[str, str]:
    size = model.config.clip_config.vision_config.image_size
    processor = model.image_processor or default_image_processor(model.config)
    preparation = Preparation.of(processor, size)
    settings = json.loads(processor.to_json_string())
    expected = {"do_center_crop": True, "resample": int(Resampling.BICUBIC)}
    differing = {name: settings.get(name) for name, value in expected.items() if settings.get(name) != value}
    if differing or "shortest_edge" not in settings.get("size", {}):
        raise ValueError(
            f"The model's image processor has {differing or {'size': settings.get('size')}}; an exported model's "
            f"images are resized by their shortest_edge (bicubic) and cropped to the model's {size} x {size} pixels. "
            "Change its preprocessor_config.json, or model.image_processor in Python."
        )
    facts = {
        "class_names": model.config.class_names,
        "image_size": size,
        "shortest_edge": settings["size"]["shortest_edge"],
        "image_mean": preparation.mean,
        "image_std": preparation.std,
    }
    return {name: json.dumps(value) for name, value in facts.items()} | {"preparation": PREPARATION}


def _trace(model: MicroCLIPForImageClassification) -> tuple[onnx_ir.Model, list[str]]:
    """The graph with its weights, and the names of its matrix products that aren't linear layers."""
    model = copy.deepcopy(model).to("cpu", torch.float32)
    model.drop_text_model()
    vision = model.config.clip_config.vision_config
    with _quiet():
        model.set_attn_implementation("sdpa")
        program = torch.onnx.export(
            _Classifier(model).eval(),
            (torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size),),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits", "saliency_mask"],
            dynamic_shapes={"pixel_values": {0: "batch_size"}},
            verbose=False,
        )
    products = [node for node in program.model.graph if node.op_type in ("MatMul", "Gemm")]
    others = [node.name for node in products if "Linear" not in node.metadata_props[MODULES]]
    # It holds stack traces, with the paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    return program.model, others


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries tell their developers, of torchvision, trees and shapes."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(disabled)


def _save(graph: onnx_ir.Model, path: Path) -> int:
    """Write it, with the weights in a second file where one can't hold them; return the bytes of weights."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    onnx_ir.save(graph, path, external_data=f"{path.name}.data" if size > ONE_FILE else None)
    return size


def _save_int8(graph: onnx_ir.Model, path: Path, float_products: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        whole = Path(folder) / path.name
        size = _save(graph, whole)
        quantize_dynamic(
            whole,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=float_products,
            per_channel=True,
            # Signed weights times unsigned inputs saturate on CPUs without VNNI.
            weight_type=QuantType.QUInt8,
            use_external_data_format=size > 4 * ONE_FILE,
        )
