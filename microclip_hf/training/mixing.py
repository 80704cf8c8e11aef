"""The class mixture in a run: features of all images, before training and after it, and what the model gets of them.

N images, C classes, E joint embedding width.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import normalize
from torch.utils.data import Subset

from ..class_mixture import ClassMixture, balance_text, fit_class_mixture, log_mean_probability
from ..modeling_microclip import MicroCLIPForImageClassification
from .kept_rows import KeptRows
from .labeler import load_rows
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewCollator, WholeImages


# In the output folder.
FEATURES_DIR = "_features"
# Images whose features are in memory at once.
CHUNK = 8192
# Training is taken back where it costs more than this share of the images on which the mixture, by their features
# alone, agrees with the texts that the run began with.
MAX_AGREEMENT_LOSS = 0.06
# The first mixture's probabilities hold the last one to at least this, so that no class is ruled out for an image.
MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class FeaturePass:
    """One pass over all images: their features, and the text classifier of its time."""

    kept: KeptRows  # (N, 2 E), [CLS] and then [FG], means over an image and its crops
    head: torch.Tensor  # (C, E), of both heads, mixed as in the pseudo-labels, times the logit scale
    log_mean: torch.Tensor  # (C,), log of the mean probability that it gives each class
    classifier: torch.Tensor  # (C, E), of the learnable head alone

    def log_probabilities(self, cls_embeds: torch.Tensor) -> torch.Tensor:
        """What the texts say of images, unit embeddings `(n, E)` to `(n, C)`."""
        return balance_text(cls_embeds @ self.head.T, self.log_mean)


@dataclass(frozen=True)
class MixtureLabels:
    """What a mixture says of all images, the same in every process."""

    labels: torch.Tensor  # (N,), -1 where the image can't be read
    confidences: torch.Tensor  # (N,), the labels' probabilities
    agreement: float  # share of all images that their features alone label as the texts of the first pass do


class Mixer:
    """Fits mixtures to the images of a data set; all processes call each method."""

    def __init__(self, args: MicroCLIPTrainingArguments, accelerator: Accelerator, fusion_ratio: float) -> None:
        self.args = args
        self.accelerator = accelerator
        self.fusion_ratio = fusion_ratio
        self.reset()

    def reset(self) -> None:
        """Forget all passes."""
        self.passes: list[FeaturePass] = []
        self.first: ClassMixture | None = None  # fitted to the first pass

    def encode(
        self,
        model: MicroCLIPForImageClassification,
        images: WholeImages,
        collator: ViewCollator,
        encode: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> None:
        """One more pass, over the images as prediction takes them and their crops, by `encode`, from a batch of these
        to both embeddings `(B, 2, E)`. What an interrupted run with the same weights and images has left isn't
        computed again.
        """
        accelerator = self.accelerator
        folder = os.path.join(self.args.output_dir, FEATURES_DIR, str(len(self.passes)))
        shape = (len(images), 2 * model.config.clip_config.projection_dim)
        facts = {"images": len(images), "weights": _digest(model)}
        facts |= {name: getattr(self.args, name) for name in ("num_crops", "crop_ratio", "seed")}
        kept = KeptRows(folder, shape, facts, np.float16)
        if accelerator.is_local_main_process:
            kept.remove_others()
        accelerator.wait_for_everyone()

        def load(missing: list[int]) -> Iterable[dict[str, torch.Tensor]]:
            return load_rows(Subset(images, missing), collator, self.args, accelerator, "Features of the images")

        # A run that finds the features goes on with the same random numbers.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            kept.fill(load, lambda batch: encode(batch).flatten(1), accelerator)
        scale = float(model.logit_scale)
        classifier = scale * normalize(_whole(model.classifier.weight.detach()).float(), dim=-1)
        prior_head = scale * normalize(model.prior_head.weight.float(), dim=-1)
        head = self.args.prior_ratio * prior_head + (1 - self.args.prior_ratio) * classifier
        log_mean = log_mean_probability(
            lambda: (cls_embeds @ head.T for _, cls_embeds, _ in self._read(kept)), self._sum
        )
        self.passes.append(FeaturePass(kept, head, log_mean, classifier))

    def fit(self, frequencies: torch.Tensor | None = None) -> ClassMixture:
        """A mixture over the features of the last pass, held to the texts; after the first pass, to what the first
        mixture made of them, whose probabilities then count once.
        """
        mixture = fit_class_mixture(
            lambda: ((fused, evidence) for _, fused, evidence in self._read_all()),
            self.passes[-1].classifier,
            **({} if self.first is None else {"text_weight": 1.0}),
            frequencies=frequencies,
            reduce=self._sum,
        )
        self.first = self.first or mixture
        return mixture

    @torch.no_grad()
    def label(self, mixture: ClassMixture) -> MixtureLabels:
        """What a mixture over the features of the last pass says of all images."""
        first = self.passes[0]
        num_images = first.kept.shape[0]
        agreed = torch.zeros(2, device=self.accelerator.device)
        known = torch.zeros(2, num_images, dtype=torch.float64, device=self.accelerator.device)
        is_first = len(self.passes) == 1
        for (index, fused, evidence), (_, cls_embeds, _) in zip(
            self._read_all(as_first=is_first), self._read(first.kept), strict=True
        ):
            confidences, labels = mixture.probabilities(fused, evidence).max(-1)
            is_agreed = mixture.scores(fused).argmax(-1) == first.log_probabilities(cls_embeds).argmax(-1)
            agreed += agreed.new_tensor([is_agreed.sum(), len(is_agreed)])
            known[:, index] = torch.stack([labels + 1, confidences]).to(known.dtype)
        labels, confidences = self._sum(known)
        num_agreed, num_readable = self._sum(agreed).tolist()
        return MixtureLabels(labels.long() - 1, confidences.float(), num_agreed / num_readable)

    def _read_all(self, as_first: bool | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of the last pass the index (n,) and fused features (n, E), and log probabilities (n, C) to hold them to."""
        first = self.passes[0]
        as_first = self.first is None if as_first is None else as_first
        for own, of_first in zip(self._read(self.passes[-1].kept), self._read(first.kept), strict=True):
            index, _, fused = own
            _, cls_embeds, first_fused = of_first
            evidence = first.log_probabilities(cls_embeds)
            if not as_first:
                evidence = self.first.probabilities(first_fused, evidence).clamp(min=MIN_PROBABILITY).log()
            yield index, fused, evidence

    def _read(self, kept: KeptRows) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The index (n,), unit [CLS] and fused features (n, E) of this process's share of the images that can be read;
        at least once, perhaps of none.
        """
        num_images = kept.shape[0]
        place = self.accelerator.process_index
        count = self.accelerator.num_processes
        first = num_images * place // count
        stop = num_images * (place + 1) // count
        for start in range(first, max(stop, first + 1), CHUNK):
            rows = torch.from_numpy(kept.read(slice(start, min(start + CHUNK, stop))))
            is_readable = ~rows[:, 0].isnan()
            index = start + is_readable.nonzero().flatten()
            cls_embeds, fg_embeds = rows[is_readable].to(self.accelerator.device).float().chunk(2, -1)
            fused = self.fusion_ratio * cls_embeds + (1 - self.fusion_ratio) * fg_embeds
            yield index.to(self.accelerator.device), normalize(cls_embeds, dim=-1), fused

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


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _digest(model: MicroCLIPForImageClassification) -> str:
    """SHA-256 of what features depend on, the same in every process."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if name.startswith(("clip.vision_model.", "clip.visual_projection.", "fg_pooling.")):
            digest.update(name.encode() + _whole(weight).float().cpu().numpy().tobytes())
    return digest.hexdigest()
