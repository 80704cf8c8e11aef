"""Every way in which a microCLIP and its CLIP can classify images, in one pass over the images."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, default_collate
from transformers import BaseImageProcessor
from transformers.utils.logging import tqdm

from ..data.image_columns import describe_unreadable
from ..images import CROP_RATIO, NUM_CROPS, UNREADABLE, crop_box, cut_squares, cut_strip, decode, to_rgb
from ..modeling_microclip import MicroCLIPForImageClassification, MicroCLIPOutput
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


@dataclass(frozen=True)
class PlainCLIP:
    """A CLIP that classifies by its own image features, which are the `coarse_embeds` of `model`.

    Args:
        heads (`dict[str, torch.Tensor]`): by the name of a way, class vectors of shape `(num_classes, embed_dim)`.
    """

    model: MicroCLIPForImageClassification
    heads: dict[str, torch.Tensor]


@dataclass(frozen=True)
class EvaluationSettings:
    """How images are read and cropped.

    Args:
        num_crops (`int`): crops of each image; 0 leaves the way `multi_crop` out.
        seed (`int`): with the index of an image it seeds the crops.
        num_workers (`int`): processes that read images; 0 reads them in this one.
        progress (`bool`): whether to show a progress bar.
    """

    num_crops: int = NUM_CROPS
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 0
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


def predict_all_ways(
    model: MicroCLIPForImageClassification | None,
    dataset: Dataset,
    plain: PlainCLIP | None = None,
    settings: EvaluationSettings | None = None,
) -> Predictions:
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

    Raises:
        ValueError: if no image can be read, or an image processor isn't as [`Preparation`] expects.
    """
    settings = settings or EvaluationSettings()
    models = [] if model is None else [model]
    if plain is not None and plain.model is not model:
        models.append(plain.model)
    size = models[0].config.clip_config.vision_config.image_size
    images = PreparedImages(dataset, [each.image_processor for each in models], size, settings)
    labels = []
    logits = {way: [] for way in WAYS}
    unreadable = torch.zeros(len(dataset), dtype=torch.bool)
    # Not stacked yet, since unreadable images leave gaps. A generator of its own, since a run's random numbers mustn't
    # depend on what was measured before.
    reading = {"num_workers": settings.num_workers, "generator": torch.Generator()}
    loader = DataLoader(images, settings.batch_size, collate_fn=list, **reading)
    progress = tqdm(total=len(dataset), desc="Evaluating", unit="image", disable=not settings.progress)
    with _evaluating(models), progress as bar:
        for batch in loader:
            readable = [example for example in batch if "label" in example]
            unreadable[[example["index"] for example in batch if "label" not in example]] = True
            if readable:
                labels += [example["label"] for example in readable]
                for way, values in _classify(model, plain, default_collate(readable)).items():
                    logits[way].append(values.cpu().numpy())
            bar.update(len(batch))
    if not labels:
        raise ValueError(f"{describe_unreadable(dataset, unreadable)}, so nothing can be measured.")
    if unreadable.any():
        warnings.warn(f"{describe_unreadable(dataset, unreadable)} and are left out.", stacklevel=2)
    joined = {way: np.concatenate(parts) for way, parts in logits.items() if parts}
    return Predictions(np.array(labels), joined, int(unreadable.sum()))


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


class PreparedImages(torch.utils.data.Dataset):
    """Images as models take them: `index`, and if it can be read `label`, `crops` `(num_crops, 3, size, size)` and
    `pixel_values`, a list with an item for each of the `processors`, or one for both where they prepare alike.
    """

    def __init__(
        self, dataset: Dataset, processors: list[BaseImageProcessor], size: int, settings: EvaluationSettings
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.settings = settings
        # Most CLIPs prepare images as the model does; then they are prepared once.
        same = processors[0].to_dict() == processors[-1].to_dict()
        self.processors = processors[:1] if same else processors
        self.preparation = Preparation.of(processors[0], size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self.dataset[index]
            image = to_rgb(decode(example["image"]))
        except UNREADABLE:
            return {"index": index}
        # By the index, so that neither the batches nor the number of workers change an image's crops.
        rng = np.random.default_rng((self.settings.seed, index))
        boxes = [crop_box(*image.size, CROP_RATIO, rng) for _ in range(self.settings.num_crops)]
        middle = cut_strip(image)
        prepared = [processor(middle, return_tensors="pt")["pixel_values"][0] for processor in self.processors]
        crops = torch.from_numpy(cut_squares(image, boxes, self.size, resample=self.preparation.resample))
        return {"index": index, "label": example["label"], "pixel_values": prepared, "crops": self._normalize(crops)}

    def _normalize(self, crops: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.preparation.mean).view(-1, 1, 1)
        std = torch.tensor(self.preparation.std).view(-1, 1, 1)
        return (crops / 255 - mean) / std


@torch.no_grad()
def _classify(
    model: MicroCLIPForImageClassification | None, plain: PlainCLIP | None, batch: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Logits `(batch_size, num_classes)` of each way; of a batch of [`PreparedImages`], those that can be read."""
    device = plain.model.device if model is None else model.device
    pixel_values = [images.to(device) for images in batch["pixel_values"]]
    logits = {}
    if model is not None:
        output = model(pixel_values[0])
        logits = {
            # Adjusted as the fused ones, which are their weighted mean, so that the ways can be compared.
            "cls": model.logit_adjustment(output.cls_logits),
            "fg": model.logit_adjustment(output.fg_logits),
            "fused": output.logits,
        }
    if model is not None and batch["crops"].shape[1] > 0:
        logits["multi_crop"] = _multi_crop_logits(model, batch["crops"].to(model.device), output)
    if plain is not None:
        is_same = plain.model is model
        cls_embeds = output.cls_embeds if is_same else plain.model.coarse_embeds(pixel_values[-1])
        for way, head in plain.heads.items():
            cosines = cls_embeds @ normalize(head.to(cls_embeds), dim=-1).T
            logits[way] = plain.model.logit_scale * cosines
    return logits


def _multi_crop_logits(
    model: MicroCLIPForImageClassification, crops: torch.Tensor, output: MicroCLIPOutput
) -> torch.Tensor:
    # A forward pass for each crop: all at once would need K times the memory of the batch.
    crop_embeds = torch.stack([model.coarse_embeds(images) for images in crops.unbind(1)], 1)
    return model.logit_scale * model.prior_head(composite_embeds(crop_embeds, output.cls_embeds))
