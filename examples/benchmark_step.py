"""
What a microCLIP forward costs over a plain CLIP forward, on random weights.

    python examples/benchmark_step.py --model B/32 --batch_size 32 --json ratio.json

Both run in turn in one process; the ratio is the median over pairs of runs, since a machine's speed drifts.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification


NUM_CLASSES = 102
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIZES = {
    "B/32": {"patch_size": 32},
    "B/16": {"patch_size": 16},
    "L/14": {**LARGE, "patch_size": 14},
    "L/14@336": {**LARGE, "patch_size": 14, "image_size": 336},
}


def seconds(model: torch.nn.Module, pixel_values: torch.Tensor) -> float:
    """Wall seconds of one forward without gradient."""
    if pixel_values.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        model(pixel_values)
    if pixel_values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def inference_ratio(size: str, batch_size: int, steps: int, device: str) -> tuple[float, float]:
    """Median cost of our forward over that of `CLIPVisionModelWithProjection`, and our images per second."""
    vision = CLIPVisionConfig(**SIZES[size])
    config = MicroCLIPConfig(clip_config={"vision_config": vision.to_dict()}, num_labels=NUM_CLASSES)
    ours = MicroCLIPForImageClassification(config).eval().to(device)
    plain = CLIPVisionModelWithProjection(vision).eval().to(device)
    pixel_values = torch.randn(batch_size, 3, vision.image_size, vision.image_size, device=device)
    for model in (ours, plain):
        seconds(model, pixel_values)
    pairs = [
        (seconds(ours, pixel_values), seconds(plain, pixel_values)) for _ in tqdm(range(steps), f"batch {batch_size}")
    ]
    return (
        statistics.median(own / other for own, other in pairs),
        batch_size / statistics.median(own for own, _ in pairs),
    )


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="B/32", help="size of the vision tower")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 32], help="images at once")
    parser.add_argument("--steps", type=int, default=7, help="pairs of runs")
    parser.add_argument("--json", help="file to write to")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}"
    result = {"model": options.model, "machine": machine, "threads": torch.get_num_threads(), "inference_ratio": {}}
    for batch_size in options.batch_size:
        ratio, speed = inference_ratio(options.model, batch_size, options.steps, device)
        result["inference_ratio"][str(batch_size)] = round(ratio, 4)
        print(
            f"{options.model}, batch {batch_size}: {ratio:.3f} x a plain CLIP forward, {speed:.1f} images/s, {machine}"
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
