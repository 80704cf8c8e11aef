"""
How near labelling photos from JPEG files comes to the speed of the model alone, on random weights.

    python examples/benchmark_predict.py --json predict.json

For photos of 0.5 and of 12 megapixels, a turn labels some from files to a CSV file, with a model that is loaded
already, and before and after it runs the same model on pixels in memory, in batches of the same size. The share is the
median over the turns of the one's photos a second over the other's; on a CPU there is the same of photos a second of
CPU time, which says more where others use the machine too. Where the processor has instructions for it, bfloat16
takes turns with float32.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_step import bfloat16_instructions, has_bfloat16, make_model
from benchmark_views import photo
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.prediction import Classifier, open_photos
from microclip_hf.prediction.labelling import LabelSettings, label_photos


SIZES = {"0.5 megapixels": (816, 612), "12 megapixels": (4000, 3000)}


def make_classifier(size: str, precision: str) -> Classifier:
    """Random weights, the same in any precision."""
    model: MicroCLIPForImageClassification = make_model(size).eval()
    edge = model.config.clip_config.vision_config.image_size
    model.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
    )
    return Classifier(model, precision=precision)


def write_photos(folder: Path, size: tuple[int, int], count: int) -> None:
    """One JPEG under many names."""
    folder.mkdir()
    (folder / "0.jpg").write_bytes(photo(*size))
    for index in range(1, count):
        os.link(folder / "0.jpg", folder / f"{index}.jpg")


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds of one call, and seconds of CPU time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu_start


def turn(classify: Classifier, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Photos a second, from files and by the model alone."""
    edge = classify.model.config.clip_config.vision_config.image_size
    pixels = torch.randn(options.batch_size, 3, edge, edge)
    source = open_photos([str(folder)])
    settings = LabelSettings(options.batch_size, exact_pixels=options.exact_pixels)
    num_batches = max(1, options.photos // options.batch_size // 2)

    def run_model() -> None:
        for _ in range(num_batches):
            classify(pixels)

    classify(pixels)  # the first time takes longer
    # The model before and after, as a shared machine's speed drifts.
    with tempfile.TemporaryDirectory() as output:
        before = seconds(run_model)
        whole, whole_cpu = seconds(
            lambda: label_photos(classify, source, os.path.join(output, "labels.csv"), settings)
        )
        after = seconds(run_model)
    alone, alone_cpu = (sum(times) for times in zip(before, after, strict=True))
    num_photos = 2 * num_batches * options.batch_size
    cpu_share = (source.total / whole_cpu) / (num_photos / alone_cpu)
    speeds = {"files": source.total / whole, "model": num_photos / alone}
    return {**speeds, "share": speeds["files"] / speeds["model"], "cpu_share": cpu_share}


def report(turns: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over turns, and all shares."""
    medians = {name: statistics.median(each[name] for each in turns) for name in turns[0]}
    return {**medians, "shares": sorted(each["share"] for each in turns)}


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B/32", help="as in benchmark_step.py")
    parser.add_argument("--batch_size", type=int, default=32, help="photos at once")
    parser.add_argument("--photos", type=int, default=512, help="photos of a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="of the photos")
    parser.add_argument("--exact_pixels", action="store_true", help="prepare photos to the last bit as the pipeline")
    parser.add_argument("--json", help="file to write to")
    options = parser.parse_args()
    precisions = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
    classifiers = {precision: make_classifier(options.model, precision) for precision in precisions}
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "instructions": bfloat16_instructions()}
    for size in options.sizes:
        turns: dict[str, list[dict[str, float]]] = {precision: [] for precision in precisions}
        with tempfile.TemporaryDirectory() as place:
            write_photos(folder := Path(place, "photos"), SIZES[size], options.photos)
            for _ in range(options.turns):
                for precision, classify in classifiers.items():
                    turns[precision].append(turn(classify, folder, options))
        result[size] = {precision: report(found) for precision, found in turns.items()}
        if "bfloat16" in turns:
            pairs = list(zip(turns["bfloat16"], turns["float32"], strict=True))
            for name in ("files", "model"):
                result[size][f"bfloat16_over_float32_{name}"] = statistics.median(a[name] / b[name] for a, b in pairs)
    result["load"] = os.getloadavg()
    print(json.dumps(result, indent=1))
    if "bfloat16" not in precisions:
        print("This processor has no instructions for bfloat16, so float32 alone was measured.")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
