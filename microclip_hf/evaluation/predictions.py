"""Every way in which a microCLIP and its CLIP can classify images, in one pass over the images."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.nn.functional import normalize
from transformers import BaseImageProcessor
from transformers.utils.logging import tqdm

from ..data.image_columns import describe_unreadable, gives_stored_images, stored_images
from ..data.labels import read_labels
from ..data.photo_sources import NumberedPhotos, PhotoList, PhotoSource, digest_images
from ..images import CROP_RATIO, NUM_CROPS, UNREADABLE, crop_box, cut_squares, cut_strip, decode, to_rgb
from ..loading import digest_model, digest_weights
from ..modeling_microclip import MicroCLIPForImageClassification, MicroCLIPOutput
from ..passes.photo_batches import NumberReader, Place, Reader, RowBatch, RowBatches
from ..passes.row_parts import RowParts, WrittenRows
from ..passes.row_pass import PassSettings, compute_rows, count_workers, join_processes, load_batches
from ..preparation import Preparation
from ..pseudo_labels import composite_embeds
from ..run_names import ACCURACIES


WAYS = {
    "zero_shot": ACCURACIES["zero_shot_accuracy"],
    "cupl": ACCURACIES["cupl_accuracy"],
    "cls": "[CLS] alone",
    "fg": "[FG] alone",
    "fused": ACCURACIES["adapted_accuracy"],
    "multi_crop": "crops, with the frozen head",
}
# The way in which the model answers, and the one that shows what it has gained.
ANSWER = "fused"
BASELINE = "zero_shot"
# What a first look compares; the other ways are parts of the model.
MAIN_WAYS = (BASELINE, "cupl", ANSWER)
PARTS = ".parts"  # in the folder of the results, until these are written
TITLE = "Evaluating"
# Null lists of a fixed size are read from Parquet by the newest versions of pyarrow only.
LOGITS = pa.list_(pa.float32())


@dataclass(frozen=True)
class PlainCLIP:
    """A CLIP that classifies by its own image features, which are the `coarse_embeds` of `model`.

    Args:
        heads (`dict[str, torch.Tensor]`): by the name of a way, class vectors of shape `(num_classes, embed_dim)`.
        texts (`str`): what they were made of, or a digest of it, by which an interrupted evaluation is known.
        is_adapted (`bool`): whether the model's own heads aren't made of these texts, but saved ones.
    """

    model: MicroCLIPForImageClassification
    heads: dict[str, torch.Tensor]
    texts: str = ""
    is_adapted: bool = False


@dataclass(frozen=True)
class EvaluationSettings:
    """How images are read and cropped.

    Args:
        num_crops (`int`): crops of each image; 0 leaves the way `multi_crop` out.
        seed (`int`): with the index of an image it seeds the crops.
        batch_size (`int`): images that the model takes at once.
        num_workers (`int`, *optional*): processes that read images for each that classifies; 0 reads them in threads.
            Default: 0 on a CPU, else this process's share of the cores.
        progress (`bool`): whether to show a progress bar.
    """

    num_crops: int = NUM_CROPS
    seed: int = 0
    batch_size: int = 64
    num_workers: int | None = None
    progress: bool = True


@dataclass(frozen=True)
class Predictions:
    """What each way says of the images that could be read; `num_unreadable` others were left out.

    Args:
        labels (`np.ndarray` of shape `(num_images,)`): the true class indices.
        logits (`dict[str, np.ndarray]`): by way, in the order of `WAYS`, float32 `(num_images, num_classes)`.
    """

    labels: np.ndarray
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    num_unreadable: int = 0


class ImageReader:
    """Prepares images: `crops`, uint8 `(num_crops, 3, size, size)`, and `pixel_values` as models take them, a list
    with an item for each of the `processors`, or one for both where they prepare alike.
    """

    def __init__(self, processors: list[BaseImageProcessor], size: int, settings: EvaluationSettings) -> None:
        self.size = size
        self.settings = settings
        # Most CLIPs prepare images as the model does; then they are prepared once.
        same = processors[0].to_dict() == processors[-1].to_dict()
        self.processors = processors[:1] if same else processors
        self.preparation = Preparation.of(processors[0], size)

    def __call__(self, image: Any, place: Place) -> dict[str, Any] | Exception:
        """Of what [`decode`] takes, or why it can't be read."""
        try:
            image = to_rgb(decode(image))
        except UNREADABLE as error:
            return error
        # By the row, so that neither the batches nor the number of processes change an image's crops.
        rng = np.random.default_rng((self.settings.seed, place[1]))
        boxes = [crop_box(*image.size, CROP_RATIO, rng) for _ in range(self.settings.num_crops)]
        middle = cut_strip(image)
        prepared = [processor(middle, return_tensors="pt")["pixel_values"][0] for processor in self.processors]
        crops = torch.from_numpy(cut_squares(image, boxes, self.size, resample=self.preparation.resample))
        return {"pixel_values": prepared, "crops": crops}

    def normalize(self, crops: torch.Tensor) -> torch.Tensor:
        """Of crops, uint8 `(n, 3, size, size)` on any device, what the model takes."""
        mean, std = (
            torch.tensor(values, device=crops.device).view(-1, 1, 1)
            for values in (self.preparation.mean, self.preparation.std)
        )
        return (crops / 255 - mean) / std


class WayClassifier:
    """A model, a plain CLIP or both, classifying what `read` makes of images; `schema` has a column for each way."""

    def __init__(
        self, model: MicroCLIPForImageClassification | None, plain: PlainCLIP | None, settings: EvaluationSettings
    ) -> None:
        self.model = model
        self.plain = plain
        self.has_crops = model is not None and settings.num_crops > 0
        self.models = [] if model is None else [model]
        if plain is not None and plain.model is not model:
            self.models.append(plain.model)
        size = self.models[0].config.clip_config.vision_config.image_size
        self.read = ImageReader([each.image_processor for each in self.models], size, settings)
        names = [] if plain is None else list(plain.heads)
        names += [] if model is None else ["cls", "fg", "fused"]
        names += ["multi_crop"] if self.has_crops else []
        self.schema = pa.schema([(way, LOGITS) for way in sorted(names, key=list(WAYS).index)])

    @property
    def device(self) -> torch.device:
        """Where images are classified."""
        return self.models[0].device

    def __call__(self, batch: RowBatch) -> pa.Table:
        """Logits `(num_classes,)` of each image in each way; null for images that can't be read."""
        logits = {} if batch.inputs is None else self._classify(batch.inputs)
        columns = []
        for way in self.schema.names:
            rows = iter(logits[way].cpu().numpy() if way in logits else ())
            columns.append(pa.array([next(rows) if problem is None else None for problem in batch.problems], LOGITS))
        return pa.table(columns, self.schema)

    def facts(self) -> dict[str, str]:
        """What logits depend on, as text: the CLIP, the heads of its texts, and whole models, which come last."""
        facts = {}
        if self.plain is not None:
            facts["clip"] = digest_weights(self.plain.model.clip.state_dict())
            facts["texts"] = ", ".join([*self.plain.heads, self.plain.texts])
        made = None if self.plain is None or self.plain.is_adapted else self.plain.model
        return facts | {"model": ", ".join(digest_model(each, each is not made) for each in self.models)}

    @torch.no_grad()
    def _classify(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Logits `(batch_size, num_classes)` of each way, of what [`ImageReader`] makes of images."""
        model, plain = self.model, self.plain
        pixel_values = [images.to(self.device, non_blocking=True) for images in inputs["pixel_values"]]
        logits = {}
        if model is not None:
            output = model(pixel_values=pixel_values[0])
            logits = {
                # Adjusted as the fused ones, which are their weighted mean, so that the ways can be compared.
                "cls": model.logit_adjustment(output.cls_logits),
                "fg": model.logit_adjustment(output.fg_logits),
                "fused": output.logits,
            }
        if self.has_crops:
            crops = inputs["crops"].to(self.device, non_blocking=True)
            logits["multi_crop"] = self._multi_crop_logits(crops, output)
        if plain is not None:
            is_same = plain.model is model
            cls_embeds = output.cls_embeds if is_same else plain.model.coarse_embeds(pixel_values[-1])
            for way, head in plain.heads.items():
                cosines = cls_embeds @ normalize(head.to(cls_embeds), dim=-1).T
                logits[way] = plain.model.logit_scale * cosines
        return logits

    def _multi_crop_logits(self, crops: torch.Tensor, output: MicroCLIPOutput) -> torch.Tensor:
        model = self.model
        # A forward pass for each crop: all at once would need K times the memory of the batch.
        crop_embeds = [model.coarse_embeds(self.read.normalize(images)) for images in crops.unbind(1)]
        composite = composite_embeds(torch.stack(crop_embeds, 1), output.cls_embeds)
        return model.logit_scale * model.prior_head(composite)


def predict_all_ways(
    model: MicroCLIPForImageClassification | None,
    dataset: Dataset,
    plain: PlainCLIP | None = None,
    settings: EvaluationSettings | None = None,
    output_dir: str | os.PathLike | None = None,
) -> Predictions | None:
    """Classify images in every way, in float32, on the model's device, with a progress bar.

    `cls` and `fg` are what the model would answer with a `fusion_ratio` of 1 and of 0, and `fused` is what it answers.
    `multi_crop` compares the composite embedding of the crops with the frozen head (arXiv:2510.02270, section 3.3);
    the crops' relevance is their cosine with the whole prepared image.

    Args:
        model ([`MicroCLIPForImageClassification`], *optional*): with its image processor, which prepares the images;
            without it the images are classified in the ways of `plain` alone, without crops.
        dataset (`Dataset`): `image` and `label`, an index of a class. Images that can't be read are left out, with a
            warning.
        plain ([`PlainCLIP`], *optional*): adds the ways that its heads name. Its image processor prepares its images.
        settings ([`EvaluationSettings`], *optional*): default, the published crops.
        output_dir (`str`, *optional*): a folder that all processes of a launch see, each of which must call this and
            classifies its share. The logits are written to its `.parts` as they come, and stay until
            [`remove_parts`]; an interrupted call, given again, goes on. Default: one process classifies all images,
            and writes nothing.

    Returns:
        [`Predictions`]; with `output_dir` in the first process alone, `None` in the others.

    Raises:
        ValueError: if no image can be read, an image processor isn't as [`Preparation`] expects, or there are parts of
            other models, texts, images or settings.
    """
    settings = settings or EvaluationSettings()
    classify = WayClassifier(model, plain, settings)
    with _evaluating(classify.models):
        if output_dir is None:
            tables = _classify_here(classify, dataset, settings)
        else:
            tables = _classify_together(classify, dataset, settings, output_dir)
    if tables is None:
        return None
    rows = pa.concat_tables([classify.schema.empty_table(), *tables])
    is_readable = rows[0].is_valid().to_numpy()
    unreadable = torch.from_numpy(~is_readable)
    if not is_readable.any():
        if output_dir is not None:
            remove_parts(output_dir)
        raise ValueError(f"{describe_unreadable(dataset, unreadable)}, so nothing can be measured.")
    if not is_readable.all():
        warnings.warn(f"{describe_unreadable(dataset, unreadable)} and are left out.", stacklevel=2)
    labels = np.array(read_labels(dataset))[is_readable]
    logits = {way: _join(rows[way]).reshape(len(labels), -1) for way in rows.column_names}
    return Predictions(labels, logits, int(unreadable.sum()))


def has_parts(output_dir: str | os.PathLike) -> bool:
    """Whether an evaluation with this folder has begun, and its results aren't complete."""
    return Path(output_dir, PARTS).is_dir()


def remove_parts(output_dir: str | os.PathLike) -> None:
    """Remove what [`predict_all_ways`] keeps, once the results are written."""
    RowParts(Path(output_dir, PARTS), {}).remove()


def _classify_together(
    classify: WayClassifier, dataset: Dataset, settings: EvaluationSettings, output_dir: str | os.PathLike
) -> list[pa.Table] | None:
    """Rows of logits by all processes, for the first one, by way of files."""
    facts = {"num_crops": str(settings.num_crops), "seed": str(settings.seed), "images": digest_images(dataset)}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    parts = RowParts(Path(output_dir, PARTS), facts | classify.facts())
    source, read, in_threads = _open(dataset, classify.read)
    passing = PassSettings(settings.batch_size, settings.num_workers, TITLE, settings.progress)
    compute_rows(parts, source, read, classify, classify.device, passing, in_threads)
    return list(parts.read(source.num_shards)) if join_processes(classify.device).is_main_process else None


def _classify_here(classify: WayClassifier, dataset: Dataset, settings: EvaluationSettings) -> list[pa.Table]:
    """The same by this process alone, in memory."""
    source, read, in_threads = _open(dataset, classify.read)
    batches = RowBatches(source, WrittenRows(), read, settings.batch_size, (0, 1), in_threads)
    passing = PassSettings(num_workers=settings.num_workers)
    tables = {}
    with tqdm(total=len(dataset), desc=TITLE, unit="image", disable=not settings.progress) as bar:
        for batch in load_batches(batches, count_workers(passing, classify.device), classify.device):
            if batch.names:
                tables[batch.first] = classify(batch)
                bar.update(len(batch.names))
    return [tables[first] for first in sorted(tables)]  # workers take turns


def _open(dataset: Dataset, read: Reader) -> tuple[PhotoSource, Reader, bool]:
    """The images as they are stored, or where a transform or a mode of somebody's own makes them as the data set gives
    them; what reads them, and whether threads may.
    """
    if gives_stored_images(dataset):
        return PhotoList(stored_images(dataset)), read, True
    return NumberedPhotos(len(dataset)), NumberReader(dataset, read), False


def _join(lists: pa.ChunkedArray) -> np.ndarray:
    """What the lists hold, one after the other."""
    return np.concatenate([chunk.flatten().to_numpy() for chunk in lists.chunks])


@contextlib.contextmanager
def _evaluating(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Models in evaluation mode; afterwards each is in its own again."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
