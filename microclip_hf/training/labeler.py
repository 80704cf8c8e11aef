"""Views in, pseudo-labels out: dynamic knowledge aggregation with a model's current weights (arXiv:2510.02270, 3.3).

B images, K crops, C classes, S input size in pixels.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..configuration_microclip import MicroCLIPConfig
from ..modeling_microclip import MicroCLIPForImageClassification, MicroCLIPOutput
from ..preparation import Preparation
from ..pseudo_labels import aggregate_scores, align_distribution, composite_embeds, fuse_embeds
from .class_means import log_sum
from .image_passes import first_views, pass_settings
from .kept_rows import KeptRows
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewDataset


# In the output folder.
PRIOR_DIR = "_prior"
# Images are labelled a few at a time: so many that the largest activations of a layer have this size in bytes. On a
# CPU it stays below the 32 MiB from which on glibc maps, and Linux clears, new pages for each tensor; with more images
# a small CLIP's activations would leave the cache.
CPU_CHUNK_BYTES = 24 * 2**20
CPU_CHUNK_IMAGES = 32
CHUNK_BYTES = 2**29
# The running means of distribution alignment are plain means of so many batches, then the latest counts 1 / 32.
ALIGNED_BATCHES = 32


@dataclass(frozen=True)
class PseudoLabels:
    """What a batch is taught."""

    labels: torch.Tensor  # (batch_size,), int64, class indices
    confidences: torch.Tensor  # (batch_size,), their probabilities
    heads_agree: torch.Tensor  # (batch_size,), bool, whether both heads would say the same


class HeadMeans:
    """Running means of both heads' class probabilities, by which distribution alignment divides."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.log_means: torch.Tensor | None = None  # (2, C), of the prior and of the fused scores

    def align(self, logits: torch.Tensor, weight: float, log_frequencies: torch.Tensor | None = None) -> torch.Tensor:
        """Both heads' probabilities `(2, B, C)` by [`align_distribution`]; the batch, of all processes, counts in."""
        log_sums = torch.stack([log_sum(head_logits) for head_logits in logits])
        parts = self.accelerator.gather(log_sums.unsqueeze(0))
        log_batch_means = parts[..., :-1].logsumexp(0) - parts[..., -1].sum(0).log().unsqueeze(-1)
        probabilities, log_means = align_distribution(logits, log_batch_means, self.log_means, weight, log_frequencies)
        if self.log_means is not None:  # an overflow in half precision isn't remembered
            log_means = torch.where(log_means.isfinite().all(), log_means, self.log_means)
        self.log_means = log_means
        return probabilities

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        return {} if self.log_means is None else {"log_head_means": self.log_means}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint, of whose tensors the other ones are passed over."""
        log_means = state.get("log_head_means")
        self.log_means = None if log_means is None else log_means.to(self.accelerator.device)


class PseudoLabeler:
    """Labels batches of views. The model is handed in each time: what a Trainer wraps, it may also replace."""

    def __init__(
        self,
        config: MicroCLIPConfig,
        args: MicroCLIPTrainingArguments,
        accelerator: Accelerator,
        preparation: Preparation,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.head_means = HeadMeans(accelerator)
        self.frequencies: torch.Tensor | None = None  # (C,), of the classes, none where all are equal
        self.chunk_size = _chunk_size(config, args.device)
        self._pixel_mean = torch.tensor(preparation.mean, device=args.device).view(-1, 1, 1)
        self._pixel_std = torch.tensor(preparation.std, device=args.device).view(-1, 1, 1)

    @torch.no_grad()
    def label(
        self, model: MicroCLIPForImageClassification, views: Mapping[str, torch.Tensor], batch_number: int
    ) -> PseudoLabels:
        """Label a batch of uint8 views: `weak` (B, 3, S, S), and `crops` (B, K, 3, S, S) if there are any.

        In place of crops the prior may be there, `prior_scores` (B, C), float32.

        Args:
            model ([`MicroCLIPForImageClassification`]): unwrapped, so that what is computed here runs under autocast
                only where `autocast_pseudo_labels` asks for it.
            batch_number (`int`): counted from 1 over the run; so many batches the running means are made of.
        """
        embeds = self.encode_views(lambda pixels: both_embeds(model.encode_image(pixels)), views["weak"])
        cls_embeds, fg_embeds = embeds.unbind(1)
        prior_scores = views.get("prior_scores")
        if prior_scores is None:
            prior_scores = self.prior_scores(model, views.get("crops"), cls_embeds)
        fused_scores = model.classifier(fuse_embeds(cls_embeds, fg_embeds, self.args.label_fusion_ratio))
        if self.args.distribution_alignment:
            logits = model.logit_scale * torch.stack([prior_scores, fused_scores])
            prior_scores, fused_scores = self._align(model, logits, batch_number)
        scores = aggregate_scores(prior_scores, fused_scores, self.args.prior_ratio)
        # Aligned scores are probabilities already, others are cosines.
        probabilities = scores if self.args.distribution_alignment else (model.logit_scale * scores).softmax(-1)
        return PseudoLabels(
            labels=scores.argmax(-1),
            confidences=probabilities.amax(-1),
            heads_agree=prior_scores.argmax(-1) == fused_scores.argmax(-1),
        )

    def prior_scores(
        self, model: MicroCLIPForImageClassification, crops: torch.Tensor | None, cls_embeds: torch.Tensor
    ) -> torch.Tensor:
        """The multi-view prior: cosines `(B, C)` of the composite with the frozen head, made of the weak views' [CLS]
        embeddings and, if there are any, the uint8 crops `(B, K, 3, S, S)`.
        """
        crop_embeds = cls_embeds.unsqueeze(1)[:, :0]
        if crops is not None and crops.shape[1] > 0:
            crop_embeds = self.encode_views(model.coarse_embeds, crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        return model.prior_head(composite_embeds(crop_embeds, cls_embeds))

    def keep_prior(
        self,
        model: MicroCLIPForImageClassification,
        dataset: ViewDataset,
        is_fresh: bool,
    ) -> None:
        """From now on a data set's examples hold the prior of the present weights, from a pass over all images. Where
        a run begins afresh (`is_fresh`), the prior of an earlier one doesn't count.
        """
        args = self.args
        accelerator = self.accelerator
        settings = {name: getattr(args, name) for name in ("num_crops", "crop_ratio", "seed")}
        facts = {"images": len(dataset), "classes": model.num_labels, **settings}
        kept = KeptRows(os.path.join(args.output_dir, PRIOR_DIR), model.num_labels, facts)
        if is_fresh and accelerator.is_local_main_process:
            kept.remove()
        accelerator.wait_for_everyone()
        dataset.kept_prior = None
        dataset.set_epoch(0)
        images = first_views(dataset)
        # A run that finds the file goes on with the same random numbers.
        with torch.random.fork_rng(devices=[]):
            score = functools.partial(self._score_crops, model)
            kept.fill(images, score, accelerator, pass_settings(args, "Multi-view prior"))
        dataset.kept_prior = kept

    def encode_views(self, encode: Callable[[torch.Tensor], torch.Tensor], views: torch.Tensor) -> torch.Tensor:
        """Embeddings of uint8 views `(n, 3, S, S)`, a few at a time; `encode` takes pixel values."""
        return self._encode_parts(encode, map(self.normalize, views.split(self.chunk_size)))

    def encode_pixels(
        self, encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """The same of pixel values `(n, 3, S, S)`, as the image processor makes them."""
        return self._encode_parts(encode, pixel_values.split(self.chunk_size))

    def _encode_parts(
        self, encode: Callable[[torch.Tensor], torch.Tensor], parts: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        args = self.args
        if args.torch_compile:
            encode = torch.compile(encode, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        with self.accelerator.autocast() if args.autocast_pseudo_labels else contextlib.nullcontext():
            return torch.cat([encode(part) for part in parts])

    def normalize(self, views: torch.Tensor) -> torch.Tensor:
        """Normalised float32 pixel values of uint8 views `(B, 3, S, S)` on the training device; others are refused."""
        if views.dtype != torch.uint8:
            raise ValueError(f"Views are {views.dtype}; pass them as uint8, from 0 to 255, before normalisation.")
        return (views.float() / 255 - self._pixel_mean) / self._pixel_std

    @torch.no_grad()
    def _score_crops(self, model: MicroCLIPForImageClassification, views: Mapping[str, torch.Tensor]) -> torch.Tensor:
        cls_embeds = self.encode_views(model.coarse_embeds, views["weak"])
        return self.prior_scores(model, views["crops"], cls_embeds)

    def _align(self, model: MicroCLIPForImageClassification, logits: torch.Tensor, batch_number: int) -> torch.Tensor:
        """Aligned probabilities of both heads; the fused head's mean is kept in the model, for its predictions."""
        num_averaged = ALIGNED_BATCHES * self.args.gradient_accumulation_steps
        log_frequencies = None if self.frequencies is None else self.frequencies.log()
        probabilities = self.head_means.align(logits, 1 / min(batch_number, num_averaged), log_frequencies)
        log_target = -math.log(model.num_labels) if log_frequencies is None else log_frequencies
        model.logit_adjustment.bias.copy_(self.head_means.log_means[1] - log_target)
        return probabilities


def both_embeds(output: MicroCLIPOutput) -> torch.Tensor:
    """[CLS] and [FG] embeddings, `(batch_size, 2, embed_dim)`."""
    return torch.stack([output.cls_embeds, output.fg_embeds], 1)


def _chunk_size(config: MicroCLIPConfig, device: torch.device) -> int:
    """How many images to encode at a time, without gradient."""
    vision = config.clip_config.vision_config
    num_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    image_bytes = 4 * num_tokens * vision.intermediate_size
    if device.type == "cpu":
        return min(max(1, CPU_CHUNK_BYTES // image_bytes), CPU_CHUNK_IMAGES)
    return max(1, CHUNK_BYTES // image_bytes)
