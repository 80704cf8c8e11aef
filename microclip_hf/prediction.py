"""What unlabelled photos show: the best class of each and the runner-up, in batches, a photo in memory no longer."""

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import BaseImageProcessor

from .data.folders import match_files
from .data.photo_files import photo_files
from .images import UNREADABLE, cut_strip, to_rgb
from .modeling_microclip import MicroCLIPForImageClassification


# Of a table of predictions, a row for each photo.
COLUMNS = ("file", "label", "score", "runner_up", "runner_up_score")


@dataclass(frozen=True)
class Prediction:
    """The names of the two best classes of a photo, and their probabilities among all classes."""

    label: str
    score: float
    runner_up: str
    runner_up_score: float


def table_row(name: str, prediction: Prediction | None) -> list[str]:
    """A photo's row under `COLUMNS`; without a prediction it has no label."""
    if prediction is None:
        return [name, *[""] * (len(COLUMNS) - 1)]
    values = astuple(prediction)
    return [name, *(f"{value:.6f}" if isinstance(value, float) else value for value in values)]


def find_photos(sources: Sequence[str]) -> dict[str, Path]:
    """The photos, by name and in order, that one folder stands for, or any number of files and patterns.

    The folder is searched at any depth (see [`photo_files`]); names are relative to it. Files and patterns
    (`photos/*.jpg`, `photos/**/*.jpg`, see [`match_files`]) are taken whatever their ending. An error if there is
    nothing, a folder isn't alone, or one can't be listed.
    """
    if len(sources) == 1 and os.path.isdir(sources[0]):
        folder = sources[0]
        return {file.as_posix(): Path(folder, file) for file in photo_files(folder)}
    photos = {}
    for source in sources:
        if os.path.isdir(source):
            raise ValueError(f"{source} is a folder, and not the only source; pass one folder, or files alone.")
        matches = match_files(source)
        if not matches:
            raise ValueError(f"{source} is no file or folder here, and no file matches it as a pattern.")
        photos |= {path: Path(path) for path in matches}
    return photos


@torch.inference_mode()
def predict_photos(
    model: MicroCLIPForImageClassification, photos: Iterable[str | os.PathLike], batch_size: int = 32
) -> Iterator[Prediction | Exception]:
    """Classify photo after photo; the scores are those of transformers' pipeline with the model's own processor.

    While the model works on a batch, threads prepare the next one. Grey of more than 8 bits is scaled to 8, as in
    adaptation, where the pipeline clips it.

    Args:
        model ([`MicroCLIPForImageClassification`]): in evaluation mode, on any device.
        photos, batch_size: image files, and how many of them are classified at once.

    Returns:
        `Iterator[Prediction | Exception]`, for each photo in turn; the exception is why one can't be read.

    Example:
    ```python
    >>> from microclip_hf import MicroCLIPForImageClassification
    >>> from microclip_hf.prediction import predict_photos

    >>> model = MicroCLIPForImageClassification.from_clip("openai/clip-vit-base-patch32", ["red disc", "blue bar"])
    >>> best, problem = predict_photos(model, ["photo.jpg", "notes.txt"])
    >>> best.label in model.config.class_names
    True
    >>> problem
    UnidentifiedImageError("cannot identify image file 'notes.txt'")
    ```
    """
    photos = iter(photos)
    read = functools.partial(_read_pixels, model.image_processor)
    with ThreadPoolExecutor() as pool:
        ahead = [pool.submit(read, photo) for photo in itertools.islice(photos, batch_size)]
        while ahead:
            batch = ahead
            # Before this batch is waited for, so that the threads are busy meanwhile.
            ahead = [pool.submit(read, photo) for photo in itertools.islice(photos, batch_size)]
            yield from _predict_batch(model, [future.result() for future in batch])


def _read_pixels(processor: BaseImageProcessor, photo: str | os.PathLike) -> torch.Tensor | Exception:
    """Pixels `(num_channels, height, width)`, or why a photo can't be read."""
    try:
        with Image.open(photo) as image:
            image = to_rgb(image)
    except UNREADABLE as error:
        return error
    return processor(cut_strip(image), return_tensors="pt")["pixel_values"][0]


def _predict_batch(
    model: MicroCLIPForImageClassification, batch: list[torch.Tensor | Exception]
) -> list[Prediction | Exception]:
    """Predictions in the places of pixels; the exceptions stay."""
    readable = [index for index, pixels in enumerate(batch) if isinstance(pixels, torch.Tensor)]
    if not readable:
        return batch
    pixel_values = torch.stack([batch[index] for index in readable]).to(model.device, model.dtype)
    best = model(pixel_values=pixel_values).logits.softmax(-1).topk(2)
    names = model.config.class_names
    results = list(batch)
    for index, scores, classes in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
        results[index] = Prediction(names[classes[0]], scores[0], names[classes[1]], scores[1])
    return results
