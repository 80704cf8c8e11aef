"""
What the views of an image cost on one core, and how many images a second a data loader makes them of.

    python examples/benchmark_views.py --num_workers 0 2 --json views.json
"""

import argparse
import io
import json
from collections.abc import Callable
from time import perf_counter, process_time
from timeit import repeat

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from microclip_hf.images import crop_box, cut_square, cut_squares, to_rgb
from microclip_hf.training.view_datasets import ViewCollator, ViewDataset, ViewSettings
from microclip_hf.training.views import augment, draft, make_views, strong_box, weak_box


def photo(width: int, height: int) -> bytes:
    """A JPEG of blurred noise, about as large as that of a camera."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "jpeg")
    return file.getvalue()


def milliseconds(part: Callable[[np.random.Generator], object]) -> float:
    """Mean CPU time of eight random draws; the least of five runs, since others may use the machine too."""
    runs = repeat(lambda: [part(np.random.default_rng(seed)) for seed in range(8)], timer=process_time, number=1)
    return round(1000 * min(runs) / 8, 2)


def costs(content: bytes, settings: ViewSettings) -> dict[str, float]:
    """Milliseconds of decoding, of each kind of view, and of all together, from the file to arrays."""
    size, ratio = settings.size, settings.crop_ratio

    def decode() -> tuple[int, Image.Image]:
        return draft(opened := Image.open(io.BytesIO(content)), size, ratio), to_rgb(opened)

    def all_views(rng: np.random.Generator) -> dict[str, np.ndarray]:
        opened = Image.open(io.BytesIO(content))
        return make_views(opened, size, settings.num_crops, ratio, rng, may_draft=True)

    full, (scale, image) = Image.open(io.BytesIO(content)).size, decode()
    parts = {
        "decoding": lambda rng: decode(),
        "weak": lambda rng: cut_square(image, weak_box(*full, size, rng), size, scale),
        "strong": lambda rng: augment(cut_square(image, strong_box(*full, rng), size, scale), rng),
        "crops": lambda rng: cut_squares(
            image, [crop_box(*full, ratio, rng) for _ in range(settings.num_crops)], size, scale
        ),
        "all": all_views,
    }
    return {name: milliseconds(part) for name, part in parts.items()}


def images_per_second(data: ViewDataset, workers: int) -> float:
    """Speed of a data loader's second pass, when its workers have started."""
    loader = DataLoader(data, 8, num_workers=workers, collate_fn=ViewCollator(), persistent_workers=workers > 0)
    for _ in range(2):
        start, num_images = perf_counter(), sum(len(batch["weak"]) for batch in loader)
    return round(num_images / (perf_counter() - start), 1)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="the model's input size in pixels")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 2], help="workers of the data loader")
    parser.add_argument("--json", help="file to write to")
    options, result = parser.parse_args(), {}
    settings = ViewSettings(options.size, num_crops=8, crop_ratio=(0.5, 0.9), seed=0)
    for width, height in ((500, 375), (4000, 3000)):
        content = photo(width, height)
        data = ViewDataset([{"image": {"path": None, "bytes": content}}] * 64, settings)
        speeds = {number: images_per_second(data, number) for number in options.num_workers}
        result[f"{width} x {height}"] = {"milliseconds": costs(content, settings), "images_per_second": speeds}
    print(json.dumps(result, indent=1))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
