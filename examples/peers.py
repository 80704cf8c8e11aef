"""
The methods that microCLIP is compared with, on the same CLIP, texts and views.

What isn't adapted is a function from a [`Task`] to scores of its test images. What adapts is a trainer: microCLIP's,
with other pseudo-labels and another loss, so that views, optimiser and schedule are the same for all.
One process and one device at most. Symbols as in the paper: g is the [CLS] feature, W a head, s the logit scale, d a
description's feature; unit norm all.
"""

import collections
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from gaussian_peers import Gaussians, fit_stata, fit_transclip
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer
from microclip_hf.images import crop_box, cut_squares, cut_strip, to_rgb
from microclip_hf.pseudo_labels import composite_embeds
from microclip_hf.text_heads import DEFAULT_TEMPLATES, encode_texts, match_descriptions, stand_in
from microclip_hf.training.class_means import ClassMeans


BATCH_SIZE = 64


@dataclass
class Task:
    """Images to adapt to, images to measure on, and what is said about the classes.

    Args:
        clip (`str`): a CLIP, Hub id or folder.
        class_names (`list[str]`): the C classes.
        train (`Dataset`): with a column `image`; labels never influence a method.
        test (`Dataset`): with the columns `image` and `label`.
        descriptions (`dict[str, list[str]]`, *optional*): of each class.
        templates (`list[str]`): prompts with `{}`.
        seed (`int`): of every draw.
    """

    clip: str
    class_names: list[str]
    train: Dataset
    test: Dataset
    descriptions: dict[str, list[str]] | None
    templates: list[str] = field(default_factory=lambda: list(DEFAULT_TEMPLATES))
    seed: int = 0

    def build(self, **config: Any) -> MicroCLIPForImageClassification:
        """CLIP with both heads, of which all but microCLIP use only the descriptions' mean.

        Args:
            config: architecture; `prior_weighting` is "uniform" unless given, `keep_text_model` keeps the text tower.
        """
        texts = {"templates": self.templates, "descriptions": self.descriptions}
        config = {"prior_weighting": "uniform", **config}
        return MicroCLIPForImageClassification.from_clip(self.clip, self.class_names, **texts, **config)


@torch.no_grad()
def encode_images(dataset: Dataset, model: MicroCLIPForImageClassification) -> torch.Tensor:
    """The images' g, `(num_images, E)`, on the CPU."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cat([model.coarse_embeds(pixel_values) for pixel_values in load_images(dataset, model)]).cpu()


def load_images(dataset: Dataset, model: MicroCLIPForImageClassification) -> Iterator[torch.Tensor]:
    """Images as the model takes them, a few at a time."""
    for start in range(0, len(dataset), BATCH_SIZE):
        images = [cut_strip(to_rgb(image)) for image in dataset[start : start + BATCH_SIZE]["image"]]
        yield model.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)


def encode_names(model: MicroCLIPForImageClassification, names: list[str], templates: list[str]) -> torch.Tensor:
    """Raw text features of every name in every template, `(C, num_templates, E)`."""
    prompts = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
    return encode_texts(model.clip, model.tokenizer, prompts).unflatten(0, (len(names), -1))


def encode_descriptions(task: Task, model: MicroCLIPForImageClassification) -> list[torch.Tensor]:
    """Text features of each class's descriptions, or what stands in where it has none, `(n, E)` each, raw or unit."""
    names = encode_names(model, task.class_names, task.templates)
    described = match_descriptions(task.class_names, task.descriptions)
    features = [
        None if sentences is None else encode_texts(model.clip, model.tokenizer, sentences) for sentences in described
    ]
    return stand_in(names, features)


# ---------------------------------------------------------------------------------------------- nothing is adapted


@torch.no_grad()
def zero_shot(task: Task, templates: list[str] | None = None) -> torch.Tensor:
    """`g . t_c`, the names in templates (arXiv:2103.00020); scores `(num_test, C)`, as of all functions here."""
    model = task.build(keep_text_model=True)
    features = encode_names(model, task.class_names, templates or task.templates)
    return encode_images(task.test, model) @ normalize(features.mean(1), dim=-1).T


@torch.no_grad()
def cupl(task: Task) -> torch.Tensor:
    """`g . unit(mean_i d_ci)`, the mean of the descriptions (CuPL, arXiv:2209.03320)."""
    model = task.build()
    return encode_images(task.test, model) @ normalize(model.classifier.weight, dim=-1).T.cpu()


@torch.no_grad()
def wca(
    task: Task,
    num_crops: int = 32,
    crop_ratio: tuple[float, float] = (0.5, 0.9),
    image_scale: float = 4.0,
    text_scale: float = 2.0,
) -> torch.Tensor:
    """Crops of the image against descriptions, `sum_k sum_i w_k v_i z_k . d_ci` (WCA, arXiv:2406.02915).

    `w = softmax_k(e^image_scale z_k . g)`, `v = softmax_i(e^text_scale d_ci . t_c)`.
    """
    model = task.build(keep_text_model=True)
    names = normalize(encode_names(model, task.class_names, task.templates).mean(1), dim=-1)
    head = []
    for name, own in zip(names, encode_descriptions(task, model), strict=True):
        own = normalize(own, dim=-1)
        head.append((np.exp(text_scale) * own @ name).softmax(0) @ own)
    rng = np.random.default_rng(task.seed)
    size = model.config.clip_config.vision_config.image_size
    scores = []
    for example, own in zip(task.test, encode_images(task.test, model), strict=True):
        image = to_rgb(example["image"])
        boxes = [crop_box(*image.size, crop_ratio, rng) for _ in range(num_crops)]
        views = list(torch.from_numpy(cut_squares(image, boxes, size)))
        pixel_values = model.image_processor(views, return_tensors="pt")["pixel_values"].to(model.device)
        crops = model.coarse_embeds(pixel_values).cpu()
        scores.append((np.exp(image_scale) * crops @ own).softmax(0) @ crops @ torch.stack(head).T)
    return torch.stack(scores)


def transclip(task: Task, **settings: Any) -> torch.Tensor:
    """Gaussians of one variance, which start at confident images (TransCLIP's zero-shot form, [`fit_transclip`])."""
    return _classify_by_gaussians(task, partial(fit_transclip, **settings))


def stata(task: Task, **settings: Any) -> torch.Tensor:
    """Gaussians that texts hold (StatA, [`fit_stata`])."""
    return _classify_by_gaussians(task, partial(fit_stata, **settings))


@torch.no_grad()
def _classify_by_gaussians(task: Task, fit: Callable[[torch.Tensor, torch.Tensor, float], Gaussians]) -> torch.Tensor:
    """Fitted to the training images and the mean of the descriptions; no test image knows of another."""
    model = task.build()
    scale, head = float(model.logit_scale), normalize(model.classifier.weight, dim=-1)
    gaussians = fit(encode_images(task.train, model), head, scale)
    features = encode_images(task.test, model)
    return (scale * features @ head.T).log_softmax(-1) + gaussians.scores(features)


# ------------------------------------------------------------------------------------------------------- self-training


class SelfTraining(MicroCLIPTrainer):
    """The student learns what the same weights say of the weak view, [CLS] alone (microCLIP's own baseline)."""

    config = {"fusion_ratio": 1.0, "fg_pooling": "mean"}
    uses_crops = False
    needs_task = False

    @torch.no_grad()
    def refine_pseudo_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model = self.model
        return model.classifier(self.encode_views(model.coarse_embeds, inputs["weak"])).argmax(-1)


class WCASelfTraining(MicroCLIPTrainer):
    """As [`SelfTraining`], with the crops' composite `m` in place of the weak view's `g`."""

    config = SelfTraining.config
    uses_crops = True
    needs_task = False

    @torch.no_grad()
    def refine_pseudo_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model, crops = self.model, inputs["crops"]
        cls_embeds = self.encode_views(model.coarse_embeds, inputs["weak"])
        crop_embeds = self.encode_views(model.coarse_embeds, crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        return model.classifier(composite_embeds(crop_embeds, cls_embeds)).argmax(-1)


class LaFTer(MicroCLIPTrainer):
    """A classifier trained on texts labels the images for a student with visual prompts (arXiv:2305.18287).

    Labels come from a frozen copy of CLIP with the text classifier as its head; the student starts as the same. The
    classifiers are heads of cosines times s here, as every method's. The published loss is the cross-entropy alone,
    `fairness_weight=0`.
    """

    config = SelfTraining.config
    uses_crops = False
    needs_task = True

    def __init__(self, *args: Any, task: Task, num_prompts: int = 16, text_steps: int = 300, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = train_text_classifier(task, text_steps, self.model.logit_scale)
        self.model.classifier.weight.data.copy_(head)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        embeddings = self.model.clip.vision_model.embeddings
        width = embeddings.embed_dim
        bound = (6 / (3 * embeddings.patch_size**2 + width)) ** 0.5
        generator = torch.Generator().manual_seed(task.seed)
        prompts = (2 * torch.rand(num_prompts, width, generator=generator) - 1) * bound
        embeddings.prompts = nn.Parameter(prompts.to(self.args.device))
        embeddings.register_forward_hook(self._insert_prompts)

    @staticmethod
    def _insert_prompts(module: nn.Module, args: tuple, tokens: torch.Tensor) -> torch.Tensor:
        prompts = module.prompts.expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)

    @torch.no_grad()
    def refine_pseudo_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.teacher.classifier(self.encode_views(self.teacher.coarse_embeds, inputs["weak"])).argmax(-1)


def train_text_classifier(task: Task, steps: int, scale: float) -> torch.Tensor:
    """LaFTer's first stage: a head that tells the classes' texts apart, though their features are noisy; `(C, E)`."""
    model = task.build(keep_text_model=True)
    names = encode_names(model, task.class_names, task.templates)
    texts = [torch.cat(own) for own in zip(encode_descriptions(task, model), names, strict=True)]
    labels = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
    features = normalize(torch.cat(texts), dim=-1)
    generator = torch.Generator().manual_seed(task.seed)
    head = nn.Parameter(torch.randn(len(texts), features.shape[1], generator=generator) * features.shape[1] ** -0.5)
    optimizer = torch.optim.AdamW([head], lr=1e-2)
    for _ in range(steps):
        noisy = features + 0.1 * torch.randn(features.shape, generator=generator)
        loss = cross_entropy(float(scale) * noisy @ normalize(head, dim=-1).T, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.detach()


class DPA(MicroCLIPTrainer):
    """Image prototypes and text prototypes label the images together (arXiv:2408.08855)."""

    config = SelfTraining.config
    uses_crops = False
    needs_task = False

    def __init__(self, *args: Any, image_ratio: float = 0.5, alignment_weight: float = 100.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_ratio, self.alignment_weight = image_ratio, alignment_weight
        self.batch_means: collections.deque[torch.Tensor] = collections.deque(maxlen=32)
        self.prototypes: torch.Tensor | None = None

    def start_epoch(self, epoch: int) -> None:
        """New image prototypes, of all images under the labels that they have now."""
        super().start_epoch(epoch)
        self.prototypes = self._build_prototypes()

    @torch.no_grad()
    def _build_prototypes(self) -> torch.Tensor:
        model = self.model
        sums = torch.zeros_like(model.classifier.weight)
        for batch in DataLoader(self.train_dataset, self.args.eval_batch_size, collate_fn=self.data_collator):
            cls_embeds = self.encode_views(model.coarse_embeds, batch["weak"].to(sums.device))
            sums.index_add_(0, self._label(cls_embeds, align=False)[0], cls_embeds)
        text = normalize(model.classifier.weight, dim=-1)
        return torch.where(sums.any(-1, keepdim=True), normalize(sums, dim=-1), text)

    def _label(self, cls_embeds: torch.Tensor, align: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and weights of the images, both `(batch_size,)`."""
        model, scale = self.model, self.model.logit_scale
        text = (scale * model.classifier(cls_embeds)).softmax(-1)
        aligned = text
        if align:
            self.batch_means.append(text.mean(0))
        if self.batch_means:
            mean = torch.stack(tuple(self.batch_means)).mean(0).clamp_min(1e-12)
            aligned = normalize(text / mean, p=1, dim=-1)
        image = aligned if self.prototypes is None else (scale * cls_embeds @ self.prototypes.T).softmax(-1)
        labels = (self.image_ratio * image + (1 - self.image_ratio) * aligned).argmax(-1)
        shares = [own.gather(1, labels[:, None])[:, 0] / own.amax(-1) for own in (text, image)]
        return labels, shares[0] * shares[1]

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Weighted cross-entropy, the batch's own fairness, and both kinds of prototypes aligned with each other."""
        if "weak" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            labels, weights = self._label(self.encode_views(self.model.coarse_embeds, inputs["weak"]))
        logits = model(pixel_values=self.normalize(inputs["strong"])).logits
        student_loss = (weights * cross_entropy(logits, labels, reduction="none")).mean()
        fairness = -logits.softmax(-1).mean(0).clamp_min(1e-12).log().mean()
        similarity = self.alignment_weight * self.model.classifier(self.prototypes)
        return student_loss + fairness + cross_entropy(similarity, torch.arange(len(similarity)).to(similarity.device))


class MicroCLIP(MicroCLIPTrainer):
    """microCLIP itself, and without what its ablation leaves out.

    Args:
        fits_last (`bool`): whether a mixture is fitted to what training has led to; if not, the student predicts.
        equal_in (`"alignment"` or `"fairness"`, *optional*): what takes classes to be equally frequent, whatever the
            mixture has found.
        args, kwargs: as in the base class.
    """

    config: ClassVar[dict[str, Any]] = {}
    uses_crops = True
    needs_task = False

    def __init__(self, *args: Any, fits_last: bool = True, equal_in: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fits_last = fits_last
        self.equal_in = equal_in

    def start_training(self) -> None:
        """As in the base class."""
        super().start_training()
        if self.equal_in == "alignment":
            self.labeler.frequencies = None
        elif self.equal_in == "fairness":
            self.class_means = ClassMeans(self.accelerator)

    def adopt_mixture(self, start: dict[str, torch.Tensor]) -> None:
        """As in the base class, unless the student predicts."""
        if self.fits_last:
            super().adopt_mixture(start)


ADAPTING: dict[str, type[MicroCLIPTrainer]] = {
    "self_training": SelfTraining,
    "wca_self_training": WCASelfTraining,
    "lafter": LaFTer,
    "dpa": DPA,
    "microclip": MicroCLIP,
}
TRAINING_FREE = {
    "zero_shot": zero_shot,
    "zero_shot_single": partial(zero_shot, templates=list(DEFAULT_TEMPLATES)),
    "cupl": cupl,
    "wca": wca,
    "transclip": transclip,
    "stata": stata,
}
