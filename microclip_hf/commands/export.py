"""`microclip export`: an adapted model -> one ONNX file that classifies photos without torch and transformers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx.checker import ValidationError
from transformers.hf_argparser import HfArg

from ..export import export_onnx
from ..files import check_new_file
from ..loading import load_adapted
from ..modeling_microclip import MicroCLIPForImageClassification
from . import command_frame, read_options


@dataclass
class ExportArguments:
    """The model and the file."""

    model_name_or_path: str = HfArg(help="An adapted model: Hub id or folder.")
    output: str = HfArg(help="The ONNX file to write.")
    int8: bool = HfArg(default=False, help="Linear layers in 8 bits: a quarter of the size.")


@command_frame("export", "no file was written")
def main(arguments: list[str] | None = None) -> None:
    """Load the model, write the file, and show that onnxruntime and PyTorch agree on it."""
    (options,) = read_options("export", __doc__, ExportArguments, arguments)
    check_new_file(options.output, "--output")
    model = load_adapted(options.model_name_or_path)
    try:
        export_onnx(model, options.output, options.int8)
    except ValidationError as error:
        raise ValueError(f"The exported model isn't valid ONNX: {error}") from error
    size = sum(file.stat().st_size for file in map(Path, (options.output, f"{options.output}.data")) if file.exists())
    print(f"Saved to {options.output} ({size / 1e6:.1f} MB).")
    print(_compare(model, options.output))


def _compare(model: MicroCLIPForImageClassification, path: str, count: int = 4) -> str:
    """The file in onnxruntime against the model, on smooth random images."""
    vision = model.config.clip_config.vision_config
    # Smooth, since patches of noise are all alike, and how they are cut would hang on rounding.
    noise = torch.randn(count, vision.num_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    pixel_values = torch.nn.functional.interpolate(noise, (vision.image_size,) * 2, mode="bicubic")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits, masks = session.run(["logits", "saliency_mask"], {"pixel_values": pixel_values.numpy()})
    with torch.no_grad():
        expected = model(pixel_values, output_patch_embeds=True)
    difference = np.abs(logits - expected.logits.numpy()).max()
    same = (masks == expected.saliency_mask.numpy()).all(-1).sum()
    return (
        f"onnxruntime against PyTorch on {count} random images: logits differ by at most {difference:.1e}, {same} "
        f"of {count} saliency masks are the same."
    )
