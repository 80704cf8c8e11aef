"""The class mixture in a run: features of all images, before training and after it, and what the model gets of them.

N images, C classes, E joint embedding width.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import normalize

from ..class_mixture import ClassMixture, balance_text, fit_class_mixture, log_mean_probability
from ..images import UNREADABLE, decode, to_rgb
from ..modeling_microclip import MicroCLIPForImageClassification
from ..passes.photo_batches import PREPARATION
from ..saliency import check_finite
from .checks import check_enough, image_facts
from .image_passes import open_stream, pass_settings, whole_images
from .kept_rows import KeptRows
from .labeler import PseudoLabeler, both_embeds
from .sharding import splits_models
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewDataset, ViewStream


# In the output folder.
FEATURES_DIR = "_features"
# Of the bars of a run that trains, by the files in that folder.
TITLES = {"first": "Features before training", "last": "Features after training"}
# So many images, from all over a data set, stand for it, where their files have no names or others' names.
NUM_SAMPLED = 16
# Of a stream no more shards are opened for that: each may be a file on the Hub.
MAX_SHARDS_SAMPLED = 64
# Images whose features are in memory at once.
CHUNK = 8192
# Training is taken back where it costs more than this share of the images on which the mixture, by their features
# alone, agrees with the texts that the run began with.
MAX_AGREEMENT_LOSS = 0.06
# The first mixture's probabilities hold the last one to at least this, so that no class is ruled out for an image.
MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class FittedMixture:
    """A mixture, and what it says of all images, the same in every process."""

    mixture: ClassMixture
    counts: torch.Tensor  # (C,), images of each label, by features and texts
    labels: torch.Tensor | None  # (N,), these, -1 where the image can't be read; none of a stream
    confidences: torch.Tensor | None  # (N,), the labels' probabilities
    agreement: float  # share of all images that their features alone label as the texts of the run's beginning do


# Index (n,) and fused features (n, E) of some images; log probabilities (n, C) that their mixture is held to, and
# those by the texts of the run's beginning.
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Mixer:
    """Fits a mixture to the images of a data set, and another one after training; all processes call each method."""

    def __init__(
        self, args: MicroCLIPTrainingArguments, accelerator: Accelerator, labeler: PseudoLabeler, fusion_ratio: float
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.labeler = labeler
        self.fusion_ratio = fusion_ratio
        self.first: FittedMixture | None = None
        self.num_images: int | None = None  # N, once that is known
        self._is_stream = False
        self._kept: KeptRows | None = None  # features before training, (N, 2 E), [CLS] and then [FG]
        self._head: torch.Tensor | None = None  # (C, E), both heads of then, mixed as in pseudo-labels
        # (C,), log of the mean probability that it gives each class, less the log frequencies
        self._log_mean: torch.Tensor | None = None

    def fit_first(
        self,
        model: MicroCLIPForImageClassification,
        dataset: ViewDataset | ViewStream,
        frequencies: torch.Tensor | None = None,
    ) -> FittedMixture:
        """The mixture of the weights that training starts with, held to what both heads, mixed as in the
        pseudo-labels, say of [CLS].

        Texts are balanced to the `frequencies`, (C,), or where these aren't known, as if all were equal. (To balance
        them to those that the mixture has found, and fit it again, helps where few classes are there, but costs more
        where frequencies are as in most data.)
        """
        self._is_stream = isinstance(dataset, ViewStream)
        self._kept = self._keep_features(model, dataset, "first")
        self.num_images = self._kept.num_rows
        if self.args.class_mixture:
            check_enough(self.num_images, model.num_labels)
        classifier = _classifier_of(model)
        prior_head = float(model.logit_scale) * normalize(model.prior_head.weight.float(), dim=-1)
        self._head = self.args.prior_ratio * prior_head + (1 - self.args.prior_ratio) * classifier
        log_mean = log_mean_probability(
            lambda: (cls_embeds @ self._head.T for _, ((cls_embeds, _),) in self._read(self._kept)), self._sum
        )
        self._log_mean = log_mean if frequencies is None else log_mean - frequencies.log()
        mixture = self._fit(self._first_rows, classifier, frequencies)
        self.first = self._label(mixture, self._first_rows)
        return self.first

    def fit_last(
        self,
        model: MicroCLIPForImageClassification,
        dataset: ViewDataset,
        frequencies: torch.Tensor | None = None,
    ) -> FittedMixture:
        """The mixture of the present weights, held to what the first one made of its features and texts."""
        kept = self._keep_features(model, dataset, "last")
        rows = partial(self._last_rows, kept)
        # The first mixture has weighed the texts already.
        mixture = self._fit(rows, _classifier_of(model), frequencies, text_weight=1.0)
        return self._label(mixture, rows)

    def _keep_features(
        self, model: MicroCLIPForImageClassification, dataset: ViewDataset | ViewStream, name: str
    ) -> KeptRows:
        """One pass over the images as prediction takes them and their crops, whose embeddings are averaged. What an
        interrupted run with the same weights and images has left isn't computed again.
        """
        args = self.args
        accelerator = self.accelerator
        facts = {name: getattr(args, name) for name in ("num_crops", "crop_ratio", "seed")}
        facts |= {"weights": _digest(model), "settings": _digest_settings(model), "sample": _digest_sample(dataset)}
        facts |= image_facts(dataset)
        num_columns = 2 * model.config.clip_config.projection_dim
        kept = KeptRows(os.path.join(args.output_dir, FEATURES_DIR, name), num_columns, facts, np.float16)
        if accelerator.is_local_main_process:
            kept.remove_others()
        accelerator.wait_for_everyone()
        settings = replace(dataset.settings, num_crops=args.num_crops)
        images = whole_images(dataset, model.image_processor, settings, splits_models(accelerator))
        title = "Features of the images" if args.trains_nothing else TITLES[name]
        was_training = model.training
        model.eval()
        # A run that finds the features goes on with the same random numbers.
        with torch.random.fork_rng(devices=[]):
            kept.fill(images, partial(self._average_views, model), accelerator, pass_settings(args, title))
        model.train(was_training)
        dataset.tell_unreadable(kept, accelerator)
        return kept

    @torch.no_grad()
    def _average_views(
        self, model: MicroCLIPForImageClassification, batch: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """[CLS] and [FG] embeddings `(B, 2 E)`, means over an image and its crops."""

        def encode(pixel_values: torch.Tensor) -> torch.Tensor:
            return both_embeds(model.encode_image(pixel_values))

        embeds = self.labeler.encode_pixels(encode, batch["pixel_values"]).unsqueeze(1)
        if "crops" in batch:
            crops = batch["crops"]
            crop_embeds = self.labeler.encode_views(encode, crops.flatten(0, 1))
            embeds = torch.cat([embeds, crop_embeds.unflatten(0, crops.shape[:2])], 1)
        # What isn't finite would pass for an image that can't be read.
        check_finite(embeds, "The features of the images", "Check the model's weights.")
        return embeds.mean(1).flatten(1)

    def _fit(
        self,
        rows: Callable[[], Iterator[Rows]],
        classifier: torch.Tensor,
        frequencies: torch.Tensor | None,
        **settings: float,
    ) -> ClassMixture:
        return fit_class_mixture(
            lambda: ((fused, evidence) for _, fused, evidence, _ in rows()),
            classifier,
            frequencies=frequencies,
            reduce=self._sum,
            **settings,
        )

    @torch.no_grad()
    def _label(self, mixture: ClassMixture, rows: Callable[[], Iterator[Rows]]) -> FittedMixture:
        device = self.accelerator.device
        counts = torch.zeros(len(mixture.bias), dtype=torch.int64, device=device)
        num_agreed = torch.zeros((), dtype=torch.int64, device=device)
        # Labels from 1 on, and confidences; of a stream of any length none are kept.
        known = torch.zeros(2, 0 if self._is_stream else self.num_images, device=device)
        for index, fused, evidence, texts in rows():
            confidences, labels = mixture.probabilities(fused, evidence).max(-1)
            num_agreed += (mixture.scores(fused).argmax(-1) == texts.argmax(-1)).sum()
            counts += labels.bincount(minlength=len(counts))
            if not self._is_stream:
                known[:, index] = torch.stack([labels + 1, confidences])
        counts = self._sum(counts)
        agreement = self._sum(num_agreed).item() / counts.sum().item()
        if self._is_stream:
            return FittedMixture(mixture, counts, None, None, agreement)
        labels, confidences = self._sum(known)
        return FittedMixture(mixture, counts, labels.long() - 1, confidences, agreement)

    def _first_rows(self) -> Iterator[Rows]:
        for index, ((cls_embeds, fused),) in self._read(self._kept):
            texts = balance_text(cls_embeds @ self._head.T, self._log_mean)
            yield index, fused, texts, texts

    def _last_rows(self, kept: KeptRows) -> Iterator[Rows]:
        for index, ((first_cls_embeds, first_fused), (_, fused)) in self._read(self._kept, kept):
            texts = balance_text(first_cls_embeds @ self._head.T, self._log_mean)
            evidence = self.first.mixture.probabilities(first_fused, texts).clamp(min=MIN_PROBABILITY).log()
            yield index, fused, evidence, texts

    def _read(self, *kept: KeptRows) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]]:
        """CHUNK by CHUNK of this process's share of the images, the index (n,) of those that are in all files, and
        from each file their unit [CLS] and fused features (n, E); at least once, perhaps of none.
        """
        num_images = kept[0].num_rows
        place = self.accelerator.process_index
        count = self.accelerator.num_processes
        first = num_images * place // count
        stop = num_images * (place + 1) // count
        for start in range(first, max(stop, first + 1), CHUNK):
            rows = torch.stack([torch.from_numpy(one.read(slice(start, min(start + CHUNK, stop)))) for one in kept])
            is_readable = ~rows[..., 0].isnan().any(0)
            index = start + is_readable.nonzero().flatten()
            yield index.to(self.accelerator.device), [self._fuse(part) for part in rows[:, is_readable]]

    def _fuse(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cls_embeds, fg_embeds = rows.to(self.accelerator.device).float().chunk(2, -1)
        fused = self.fusion_ratio * cls_embeds + (1 - self.fusion_ratio) * fg_embeds
        return normalize(cls_embeds, dim=-1), fused

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")


@torch.no_grad()
def merge_mixture(model: MicroCLIPForImageClassification, mixture: ClassMixture) -> None:
    """Have a model predict what a mixture over its fused features says, `softmax(h . w_c + b_c)`.

    Logits are `s h . unit(W_c) * scale_c - bias_c`, with the logit scale s. So W is the mixture's weight w, the scale
    is `||w_c|| / s`, and the bias is -b.
    """
    adjustment = model.logit_adjustment
    set_weight(model.classifier.weight, normalize(mixture.weight, dim=-1))
    adjustment.scale.copy_(mixture.weight.norm(dim=-1) / model.logit_scale)
    adjustment.bias.copy_(-mixture.bias)


@torch.no_grad()
def set_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole weight into a parameter, which may be split over processes."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def _classifier_of(model: MicroCLIPForImageClassification) -> torch.Tensor:
    """The learnable head's linear weights (C, E), the logit scale included."""
    return float(model.logit_scale) * normalize(_whole(model.classifier.weight.detach()).float(), dim=-1)


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _digest(model: MicroCLIPForImageClassification) -> str:
    """SHA-256 of what features depend on, the same in every process."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if name.startswith(("clip.vision_model.", "clip.visual_projection.", "fg_pooling.")):
            digest.update(name.encode() + _whole(weight).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest_settings(model: MicroCLIPForImageClassification) -> str:
    """SHA-256 of what else features depend on: the architecture, and how images are prepared."""
    architecture = {name: vars(model.config)[name] for name in model.config.architecture_names()}
    text = json.dumps([architecture, model.image_processor.to_dict(), PREPARATION], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_sample(dataset: ViewDataset | ViewStream) -> str:
    """SHA-256 of some images' pixels, of a stream the first ones of its shards and the number of these."""
    digest = hashlib.sha256()
    if isinstance(dataset, ViewStream):
        source = open_stream(dataset)
        digest.update(str(source.num_shards).encode())
        shards = range(0, source.num_shards, -(-source.num_shards // MAX_SHARDS_SAMPLED))
        num_each = -(-NUM_SAMPLED // len(shards))
        photos = (photo for shard in shards for photo in source.open(shard, 0).take(0, num_each))
        fetches = (lambda photo=photo: photo.image for photo in photos)
    else:
        indices = range(0, len(dataset), max(1, len(dataset) // NUM_SAMPLED))
        fetches = (lambda index=index: dataset.dataset[index]["image"] for index in indices)
    for fetch in fetches:
        with contextlib.suppress(*UNREADABLE):
            digest.update(to_rgb(decode(fetch())).tobytes())
    return digest.hexdigest()
