"""Self-training without labels (arXiv:2510.02270, sections 3.3 and 3.4) on transformers' Trainer."""

import contextlib
import functools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BaseImageProcessor, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    get_last_checkpoint,
    has_length,
    sort_checkpoints,
)
from transformers.utils import CONFIG_NAME

from ..configuration_microclip import MicroCLIPConfig, default_image_processor
from ..data.eval_datasets import EvalDatasets
from ..data.image_columns import as_images, describe_unreadable, undecoded
from ..data.labels import align_or_leave_out
from ..files import check_writable
from ..hub.model_card import CARD, PICTURE, CardFacts, keep_card, split_results, write_model_card
from ..hub.push import check_repository, push_folder
from ..metrics import compute_metrics
from ..modeling_microclip import MicroCLIPForImageClassification, MicroCLIPOutput
from ..plots import plot_adaptation
from ..preparation import Preparation
from ..pseudo_labels import aggregate_scores, align_distribution, composite_embeds, fairness_loss, fuse_embeds
from ..saliency import NonFiniteError
from .checks import STATE_NAME, check_checkpoint, check_room, check_training, image_facts
from .diagnostics import Diagnostics
from .kept_prior import KeptPrior
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewCollator, ViewDataset, ViewSettings, ViewStream, first_example, holds_views


# Where files are written before they get their final name.
INCOMPLETE = "_incomplete"
# In the output folder: the multi-view prior, where it isn't computed at every step.
PRIOR_DIR = "_prior"
# Images are labelled a few at a time: so many that the largest activations of a layer have this size in bytes. On a
# CPU it stays below the 32 MiB from which on glibc maps, and Linux clears, new pages for each tensor; with more images
# a small CLIP's activations would leave the cache.
CPU_CHUNK_BYTES, CHUNK_BYTES = 24 * 2**20, 2**29
CPU_CHUNK_IMAGES = 32
# The running means of distribution alignment are plain means of so many batches, then the latest counts 1 / 32.
ALIGNED_BATCHES = 32


class MicroCLIPTrainer(Trainer):
    r"""
    Adapts a [`MicroCLIPForImageClassification`] to images without labels; pseudo-labels are refined at every step.

    Args:
        model ([`MicroCLIPForImageClassification`]): from [`~MicroCLIPForImageClassification.from_clip`]; what isn't
            adapted is frozen.
        args ([`MicroCLIPTrainingArguments`]): settings, default `MicroCLIPTrainingArguments()`.
        train_dataset: items with a PIL `image`, or with the views themselves: `weak` and `strong` (3, S, S) and
            `crops` (K, 3, S, S), uint8. A `label` never influences training. It may be a stream, which is read as
            often as `max_steps` ask for, by the first of several processes for all, and has no epochs: the fairness
            mean runs on. With a `data_collator` of one's own, whatever that turns into batches of views.
        eval_dataset: items with `image` or `pixel_values`, and `label` to measure by. Images of a data set of
            `datasets` that can't be read are left out, with a warning; so are those of `evaluate` and `predict`.
        processing_class (`BaseImageProcessor`, *optional*): becomes the model's `image_processor`, is saved with it
            and used in evaluation; its filter resizes the views, and its mean and std normalise them. Default: the
            model's `image_processor`; without any, CLIP's own.
        data_collator, kwargs: as in [`~transformers.Trainer`].

    Raises:
        TypeError: if the model, the arguments or the image processor are of another class, or the training data is
            several data sets.
        ValueError: if the image processor gives other pixels than views can be made of (see [`Preparation`]), the
            training data has neither images nor views, or is a stream without `max_steps`; in training, if more images
            than `max_corrupt_share` can't be read.
    """

    # The loss is a mean over the batch: under gradient accumulation the Trainer divides it.
    loss_is_scaled_for_ga = False
    _processing_class: BaseImageProcessor | None = None

    def __init__(
        self,
        model: MicroCLIPForImageClassification,
        args: MicroCLIPTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, MicroCLIPForImageClassification):
            raise TypeError(
                f"model is a {type(model).__name__}; pass a MicroCLIPForImageClassification, for example from "
                "MicroCLIPForImageClassification.from_clip(clip, class_names)."
            )
        args = args if args is not None else MicroCLIPTrainingArguments()
        if not isinstance(args, MicroCLIPTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}; pass MicroCLIPTrainingArguments.")
        if not model.prior_head.weight.any():
            warnings.warn(
                "prior_head is all zeros: no text has built it. Use from_clip(clip, class_names).", stacklevel=2
            )
        model.float()  # steps of 1e-4 vanish in half precision; bf16=True and fp16=True train under autocast
        model.freeze_for_adaptation()
        processing_class = processing_class or model.image_processor or default_image_processor(model.config)
        if not isinstance(processing_class, BaseImageProcessor):
            raise TypeError(f"processing_class is a {type(processing_class).__name__}; pass an image processor.")
        self._preparation = Preparation.of(processing_class, model.config.clip_config.vision_config.image_size)
        model.image_processor = processing_class
        is_main = args.process_index == 0
        self.eval_datasets = EvalDatasets(_class_names(model.config), is_main, is_main and not args.disable_tqdm)
        eval_dataset = self.eval_datasets.align(eval_dataset)
        if train_dataset is not None:
            check_training(model, args, train_dataset)
        if train_dataset is not None and data_collator is None:
            train_dataset = _with_views(train_dataset, model, args, self._preparation)
        if train_dataset is not None and args.prior_refresh != "step" and not isinstance(train_dataset, ViewDataset):
            raise ValueError(
                f"prior_refresh='{args.prior_refresh}' keeps a prior for each image, which a stream, views or a "
                f"data_collator of one's own don't allow (train_dataset is a {type(train_dataset).__name__}). Pass "
                "images that can be counted, or use prior_refresh='step'."
            )
        kwargs.setdefault("compute_metrics", compute_metrics)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator if data_collator is not None else ViewCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # These can't split a number, and it's frozen; a buffer is saved as a parameter is.
            scale = model.clip.logit_scale.detach()
            del model.clip.logit_scale
            model.clip.register_buffer("logit_scale", scale)
            # They split the model along with its optimiser; until training each process evaluates with all of it.
            self.deepspeed = self.accelerator.prepare_model(model.to(self.args.device), evaluation_mode=True)
        self.card_facts = CardFacts(base_model=model.clip.config._name_or_path or None)
        self.add_callback(_EpochCallback(self))
        self._pixel_mean = torch.tensor(self._preparation.mean, device=self.args.device).view(-1, 1, 1)
        self._pixel_std = torch.tensor(self._preparation.std, device=self.args.device).view(-1, 1, 1)
        self._chunk_size = _chunk_size(model.config, self.args.device)
        self.diagnostics = Diagnostics(model.num_labels)
        self._confidences: torch.Tensor | None = None  # of the batch's pseudo-labels
        self._log_class_mean: torch.Tensor | None = None
        self._log_head_means: torch.Tensor | None = None  # (2, C), of the prior and the fused probabilities
        self._epoch: int | None = None
        self._checkpoint: str | None = None
        self._card: bytes | None = None  # as this Trainer wrote it
        # As the texts made it: a copy, since a checkpoint is loaded into the model's own, and FSDP may split that.
        self._prior_head = model.prior_head.weight.detach().cpu().clone()
        self._prior_batches: torch.utils.data.DataLoader | None = None
        self._num_unreadable = 0
        # Of the current optimiser step: log sums of class probabilities and the number of images of each part, where
        # it is accumulated, and the part that comes next.
        self._parts: torch.Tensor | None = None
        self._next_part = 0

    @property
    def processing_class(self) -> BaseImageProcessor:
        """The image processor, which the views and the evaluation agree with; chosen when the Trainer is made."""
        return self._processing_class

    @processing_class.setter
    def processing_class(self, processor: BaseImageProcessor) -> None:
        if self._processing_class not in (None, processor):
            raise ValueError(
                "Views are made for the image processor that the Trainer began with; pass another one as "
                "MicroCLIPTrainer(processing_class=...)."
            )
        self._processing_class = processor

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in the base class; `True` continues from the newest checkpoint in `output_dir`.

        Raises:
            ValueError: see [`check_run`]; if there is no checkpoint to continue from; if training diverges.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint to resume from in {self.args.output_dir}.")
        self._checkpoint = checkpoint or None
        self.check_run(self._checkpoint)
        if self.args.prior_refresh != "step":
            folder = os.path.join(self.args.output_dir, PRIOR_DIR)
            settings = {name: getattr(self.args, name) for name in ("num_crops", "crop_ratio", "seed")}
            shape = (len(self.train_dataset), self.model.num_labels)
            self.train_dataset.kept_prior = KeptPrior(folder, shape, settings)
            if self._checkpoint is None and self.is_local_process_zero():
                self.train_dataset.kept_prior.remove(from_epoch=0)
        if self.args.prior_refresh == "never":  # before a checkpoint brings adapted weights
            self._keep_prior(0)
        try:
            return super().train(self._checkpoint, **kwargs)
        except (NonFiniteError, RuntimeError) as error:
            # On a GPU the check is an assertion of the device's.
            if not isinstance(error, NonFiniteError) and "device-side assert" not in str(error):
                raise
            raise ValueError(
                f"Training diverged: {error} Start again with a lower learning_rate; it is {self.args.learning_rate}."
            ) from error

    def check_run(self, checkpoint: str | None = None) -> None:
        """What [`train`] would refuse, so that it is known before any other work.

        Args:
            checkpoint (`str`, *optional*): where the run is to go on from.

        Raises:
            ValueError: if `output_dir` can't be written or has no room for the checkpoints, or the checkpoint is of
                other classes, texts, images or architecture.
        """
        if self.args.max_steps <= 0 and not 0 < self.args.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs is {self.args.num_train_epochs}; it must be more than 0, and finite.")
        check_writable(self.args.output_dir)
        num_images = len(self.train_dataset) if has_length(self.train_dataset) else None
        check_room(self.accelerator.unwrap_model(self.model), self.args, num_images, checkpoint)
        if checkpoint is not None:
            check_checkpoint(checkpoint, self.model.config, self._prior_head, self._image_facts)

    @functools.cached_property
    def _image_facts(self) -> dict[str, str]:
        return image_facts(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]:
        """As in the base class; where gradients are accumulated, fairness needs the class mean of all batches first.

        That is one more forward of the student without gradient, as much as encoding one crop.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._parts, self._next_part = None, 0
        if len(batches) > 1:
            parts = []
            self.model_wrapped.train()
            with torch.no_grad():
                for batch in batches:
                    pixel_values = self.normalize(batch["strong"].to(device))
                    parts.append(_log_sum(self.model_wrapped(pixel_values=pixel_values)["logits"]))
            self._parts = self.accelerator.gather(torch.stack(parts))
        return batches, num_items

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The student's loss: cross-entropy with the pseudo-labels on the strong view, plus fairness.

        In evaluation, batches hold `pixel_values`, and `labels` to measure the loss by.

        Raises:
            ValueError: if a training batch has no views; labels never train.
        """
        if "weak" not in inputs:
            if model.training:
                raise ValueError(
                    f"A training batch holds {', '.join(map(repr, inputs))}; expected the views 'weak', 'strong' and "
                    "'crops'. Let train_dataset hold an 'image' column, or the views."
                )
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training:
            raise ValueError(
                "An evaluation batch holds views; evaluate a data set with an 'image' or 'pixel_values' column."
            )
        pseudo_labels = self.refine_pseudo_labels(inputs)
        outputs = model(pixel_values=self.normalize(inputs["strong"]))
        logits = outputs["logits"].float()
        student_loss = cross_entropy(logits, pseudo_labels)
        fairness, share = self._fairness(logits)
        self.diagnostics.record(
            cross_entropy=student_loss.expand(len(logits)),
            fairness=fairness.expand(len(logits)),
            student_agreement=logits.argmax(-1) == pseudo_labels,
        )
        if "labels" in inputs:
            correct = (pseudo_labels == inputs["labels"]).float()
            self.diagnostics.record(inputs["labels"] >= 0, pseudo_label_accuracy=correct)
        self.diagnostics.record_labels(pseudo_labels, inputs.get("index"), self._confidences)
        loss = share * student_loss + self.args.fairness_weight * fairness
        return (loss, outputs) if return_outputs else loss

    def _fairness(self, logits: torch.Tensor) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Fairness of the whole batch, and by how much a mean over this part of it counts in the mean over parts.

        The base class takes the mean of losses over accumulation steps, and of gradients over processes.
        """
        parts, accelerator, step = self._parts, self.accelerator, self._next_part
        own = accelerator.process_index
        last = True
        if parts is None and accelerator.num_processes > 1:
            parts = accelerator.gather(_log_sum(logits.detach()).unsqueeze(0))
        elif parts is not None:
            steps = len(parts) // accelerator.num_processes
            own, last, self._next_part = own * steps + step, step == steps - 1, step + 1
        if parts is None:
            fairness, log_class_mean = fairness_loss(logits.log_softmax(-1), self._log_class_mean)
            self._remember(log_class_mean)
            return fairness, 1.0
        num_images = parts[:, -1].sum()
        rest = torch.cat([parts[:own], parts[own + 1 :]])[:, :-1].logsumexp(0)
        fairness, log_class_mean = fairness_loss(logits.log_softmax(-1), self._log_class_mean, rest, num_images)
        if last:
            self._remember(log_class_mean)
        value = fairness.detach()
        return value + len(parts) * (fairness - value), len(logits) * len(parts) / num_images

    def _remember(self, log_class_mean: torch.Tensor) -> None:
        """The running mean for the next step; after an overflow, whose step fp16 skips, the one before stays."""
        finite = log_class_mean.isfinite().all()
        if self._log_class_mean is not None:
            self._log_class_mean = torch.where(finite, log_class_mean, self._log_class_mean)
        elif finite:  # the host waits for the device once an epoch
            self._log_class_mean = log_class_mean

    @torch.no_grad()
    def refine_pseudo_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Label the images with the current weights: dynamic knowledge aggregation.

        Args:
            inputs: `weak` (B, 3, S, S) and `crops` (B, K, 3, S, S), uint8; without `crops`, K = 0. In place of crops
                the prior may be there, `prior_scores` (B, C), float32.

        Returns:
            `torch.LongTensor` of shape `(batch_size,)`.
        """
        # The model's forward runs under autocast; these methods of the unwrapped model only where it is asked for.
        model = self.accelerator.unwrap_model(self.model)
        weak = self.encode_views(lambda pixels: _both_embeds(model.encode_image(pixels)), inputs["weak"])
        cls_embeds, fg_embeds = weak.unbind(1)
        prior_scores = inputs.get("prior_scores")
        if prior_scores is None:
            prior_scores = self._prior_scores(model, inputs.get("crops"), cls_embeds)
        fused_scores = model.classifier(fuse_embeds(cls_embeds, fg_embeds, self.args.label_fusion_ratio))
        if self.args.distribution_alignment:
            prior_scores, fused_scores = self._align_heads(
                model.logit_scale * torch.stack([prior_scores, fused_scores])
            )
        scores = aggregate_scores(prior_scores, fused_scores, self.args.prior_ratio)
        probabilities = scores if self.args.distribution_alignment else (model.logit_scale * scores).softmax(-1)
        self._confidences = probabilities.amax(-1)
        self.diagnostics.record(
            pseudo_label_confidence=self._confidences,
            head_agreement=prior_scores.argmax(-1) == fused_scores.argmax(-1),
        )
        return scores.argmax(-1)

    def _align_heads(self, logits: torch.Tensor) -> torch.Tensor:
        """Aligned probabilities of logits `(2, batch_size, C)`, and the running mean for the next batch."""
        parts = self.accelerator.gather(torch.stack([_log_sum(own) for own in logits]).unsqueeze(0))
        log_batch_mean = parts[..., :-1].logsumexp(0) - parts[..., -1].sum(0).log().unsqueeze(-1)
        steps = self.args.gradient_accumulation_steps
        seen = self.state.global_step * steps + self._next_part + 1
        weight = 1 / min(seen, ALIGNED_BATCHES * steps)
        probabilities, means = align_distribution(logits, log_batch_mean, self._log_head_means, weight)
        if self._log_head_means is not None:  # an overflow in half precision isn't remembered
            means = torch.where(means.isfinite().all(), means, self._log_head_means)
        self._log_head_means = means
        model = self.accelerator.unwrap_model(self.model)
        model.logit_adjustment.bias.copy_(self._log_head_means[1] + math.log(model.num_labels))
        return probabilities

    def _prior_scores(
        self, model: MicroCLIPForImageClassification, crops: torch.Tensor | None, cls_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Cosines of the multi-view composite with the frozen head, `(batch_size, num_labels)`."""
        crop_embeds = cls_embeds.unsqueeze(1)[:, :0]
        if crops is not None and crops.shape[1] > 0:
            crop_embeds = self.encode_views(model.coarse_embeds, crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        return model.prior_head(composite_embeds(crop_embeds, cls_embeds))

    def encode_views(self, encode: Callable[[torch.Tensor], torch.Tensor], views: torch.Tensor) -> torch.Tensor:
        """Embeddings of uint8 views `(n, 3, S, S)`, a few at a time."""
        if (args := self.args).torch_compile:
            encode = torch.compile(encode, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        with self.accelerator.autocast() if self.args.autocast_pseudo_labels else contextlib.nullcontext():
            return torch.cat([encode(self.normalize(chunk)) for chunk in views.split(self._chunk_size)])

    @torch.no_grad()
    def _keep_prior(self, epoch: int) -> None:
        """From now on training batches hold the prior of the present weights, from a pass over all images."""
        kept, model = self.train_dataset.kept_prior, self.accelerator.unwrap_model(self.model)
        self.accelerator.wait_for_everyone()
        exists = torch.tensor(int(kept.exists(epoch)), device=self.args.device)
        if self.accelerator.reduce(exists, "sum") < self.accelerator.num_processes:  # disks may differ
            for has_turn in self._turns():
                if has_turn:
                    kept.create()
            self.train_dataset.set_epoch(epoch)
            self.train_dataset.replace_crops()
            with torch.random.fork_rng(devices=[]):  # a run that finds the file goes on with the same random numbers
                for batch in self._all_batches(epoch):
                    cls_embeds = self.encode_views(model.coarse_embeds, batch["weak"])
                    scores = self._prior_scores(model, batch["crops"], cls_embeds)
                    index, scores = self.accelerator.gather((batch["index"], scores))
                    if self.is_local_process_zero():
                        kept.write(index.cpu().numpy(), scores.cpu().numpy())
            for has_turn in self._turns():
                if has_turn:
                    kept.finish(epoch)
        self.train_dataset.replace_crops(epoch)

    def _all_batches(self, epoch: int) -> tqdm:
        """The images in their order, shared out among processes; the last batch too, whatever training does."""
        if self._prior_batches is None:
            size, workers = self.args.eval_batch_size, self.args.dataloader_num_workers
            batches = torch.utils.data.DataLoader(
                self.train_dataset, size, collate_fn=self.data_collator, num_workers=workers
            )
            self._prior_batches = self.accelerator.prepare_data_loader(batches)
        self._prior_batches.set_epoch(epoch)  # it would begin with the views of epoch 0
        return tqdm(self._prior_batches, "Multi-view prior", disable=not self.is_world_process_zero())

    def _turns(self) -> Iterator[bool]:
        """Who writes files: the first process of all, then the first of each machine, whose disk may be its own."""
        for has_turn in (self.is_world_process_zero(), self.is_local_process_zero()):
            self.accelerator.wait_for_everyone()
            yield has_turn
        self.accelerator.wait_for_everyone()

    def normalize(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 views `(batch_size, 3, S, S)` on the training device to normalised float32 pixel values.

        Raises:
            ValueError: if the views aren't uint8.
        """
        if views.dtype != torch.uint8:
            raise ValueError(f"Views are {views.dtype}; pass them as uint8, from 0 to 255, before normalisation.")
        return (views.float() / 255 - self._pixel_mean) / self._pixel_std

    def start_training(self) -> None:
        """Start afresh, or where the checkpoint left off."""
        if isinstance(self.model, FSDPModule):
            self._prepare_sharded_model()
        self.diagnostics = Diagnostics(self.model.config.num_labels)
        self._log_class_mean = self._log_head_means = self._epoch = self._parts = None
        if self.is_local_process_zero():
            shutil.rmtree(os.path.join(self.args.output_dir, INCOMPLETE), ignore_errors=True)
        if self._checkpoint is None:
            self.accelerator.unwrap_model(self.model).logit_adjustment.bias.zero_()
            return
        if not os.path.exists(file := os.path.join(self._checkpoint, STATE_NAME)):
            warnings.warn(
                f"{self._checkpoint} has no {STATE_NAME}; the run goes on a little differently.", stacklevel=2
            )
        else:
            state = load_file(file)
            self._epoch = state["epoch"].item()
            self.diagnostics.load_state_dict(state)
            if "log_class_mean" in state:
                self._log_class_mean = state["log_class_mean"].to(self.args.device)
            if self.args.distribution_alignment and "log_head_means" in state:
                self._log_head_means = state["log_head_means"].to(self.args.device)
            if self.args.prior_refresh == "epoch" and self.is_local_process_zero():
                self.train_dataset.kept_prior.remove(from_epoch=self._epoch + 1)

    def start_epoch(self, epoch: int) -> None:
        """New views, and the fairness mean starts afresh, unless a checkpoint of the same epoch brought it along."""
        if epoch != self._epoch:
            self._log_class_mean = None
        self._epoch = epoch
        if self.args.prior_refresh == "epoch":
            self._keep_prior(epoch)
        if isinstance(self.train_dataset, ViewDataset):
            self.train_dataset.set_epoch(epoch)

    def finish_epoch(self) -> None:
        """Bring labels up to date, and tell which images couldn't be read, over all processes, if any are new."""
        self._check_weights()
        self.diagnostics.flush(self.accelerator)
        if not isinstance(self.train_dataset, ViewDataset):
            return
        unreadable = self.train_dataset.unreadable.to(self.args.device, torch.int32)
        unreadable = self.accelerator.reduce(unreadable, "sum").bool().cpu()
        self.train_dataset.unreadable.copy_(unreadable)
        self.train_dataset.check_limit()
        if unreadable.sum() > self._num_unreadable and self.is_world_process_zero():
            found = describe_unreadable(self.train_dataset.dataset, unreadable)
            warnings.warn(f"{found}; others stood in for them.", stacklevel=2)
        self._num_unreadable = int(unreadable.sum())

    def _check_weights(self) -> None:
        """Weights that aren't finite are neither saved in place of good ones nor called a result; on all processes."""
        trained = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
        parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
        finite = torch.stack([part.isfinite().all().to(self.args.device) for part in parts]).all()
        if self.accelerator.reduce(finite.float(), "sum") < self.accelerator.num_processes:
            raise NonFiniteError(f"the weights hold NaN or infinite values after step {self.state.global_step}.")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in the base class, without images that can't be read, and with labels numbered as the classes are."""
        if eval_dataset is None or isinstance(eval_dataset, str):  # the Trainer's own, or one of them
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        return super().get_eval_dataloader(self.eval_datasets.prepare(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """As in the base class, without images that can't be read, and with labels numbered as the classes are."""
        return super().get_test_dataloader(self.eval_datasets.prepare(test_dataset))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in the base class; the loss is the mean over the images that have a label, and absent where none has."""
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        except NonFiniteError as error:  # in the images, since weights are looked at in training
            raise ValueError(str(error)) from error
        if output.predictions is None or output.label_ids is None or self.preprocess_logits_for_metrics is not None:
            return output
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        labels = torch.as_tensor(output.label_ids)
        known = labels >= 0
        name = f"{metric_key_prefix}_loss"
        output.metrics.pop(name, None)
        if known.any():
            output.metrics[name] = cross_entropy(torch.as_tensor(logits)[known].float(), labels[known]).item()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the base class; it never pushes, which `push_to_hub` does once all is there."""
        super().save_model(output_dir, _internal_call=True)

    def create_model_card(self, finetuned_from: str | None = None, **kwargs: Any) -> None:
        """Write the card and, where there is none yet, a picture of the curves; for the results see `card_facts`.

        A Trainer that has neither trained nor evaluated keeps the card that it finds; otherwise one that it didn't
        write itself is kept as `README.old.md`.

        Args:
            finetuned_from (`str`, *optional*): the CLIP that was adapted.
            kwargs: `dataset`, `license` and `language` as in [`CardFacts`]; the base class's other arguments have no
                part in this card.
        """
        card = Path(self.args.output_dir, CARD)
        if not self.is_world_process_zero() or (card.exists() and not self.state.log_history):
            return
        if card.exists() and card.read_bytes() != self._card:
            keep_card(self.args.output_dir)
        facts = {"base_model": finetuned_from, **kwargs}
        known = [field.name for field in fields(CardFacts) if facts.get(field.name) is not None]
        self.card_facts = replace(self.card_facts, **{name: facts[name] for name in known})
        evaluations = [entry for entry in self.state.log_history if "eval_accuracy" in entry]
        if evaluations:
            results = {name.replace("eval_", "adapted_", 1): value for name, value in evaluations[-1].items()}
            self.card_facts.results |= split_results(results)
        picture = os.path.join(self.args.output_dir, PICTURE)
        if self.state.log_history and not os.path.exists(picture):
            plot_adaptation(picture, self.state.log_history, self.card_facts.results)
        num_images = len(self.train_dataset) if has_length(self.train_dataset) else None
        write_model_card(self.model.config, self.args, self.card_facts, num_images)
        self._card = card.read_bytes()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the base class; a repository that exists is also checked, as it will be when pushing.

        Raises:
            RuntimeError: if the Hub refuses, can't be reached, or the repository holds something else.
        """
        wanted = {} if private is None else {"private": private}  # an argument that transformers 5.18 doesn't have
        private = self.args.hub_private_repo if private is None else private
        try:
            super().init_hf_repo(token, **wanted)
            if self.is_world_process_zero():
                check_repository(self.hub_model_id, private, self.args.hub_revision, token or self.args.hub_token)
        except Exception as error:
            name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            raise RuntimeError(
                f"The repository {name} on the Hub can't be used: {error}\nLog in with 'hf auth login', choose "
                "another --hub_model_id, or leave out --push_to_hub."
            ) from error

    def leave_group(self) -> None:
        """End what connects the processes of a run, as its last act.

        Gloo's threads end with the last reference to their group, and abort a process that exits before them.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the base class: the model, its code and card, and what training wrote beside them, in one commit.

        Checkpoints stay here, and so do the report and the labels of single images, which show and name the photos;
        see [`push_folder`].

        Args:
            commit_message, blocking, token, revision, private: see [`push_folder`].
            kwargs: passed to [`create_model_card`].

        Raises:
            RuntimeError: if the push fails. It says which command does it later; the Hub's repository is as before.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model()
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        folder, args = self.args.output_dir, self.args
        return push_folder(
            folder,
            self.hub_model_id or args.hub_model_id or os.path.basename(os.path.abspath(folder)),
            commit_message or "End of training",
            args.hub_private_repo if private is None else private,
            args.hub_revision if revision is None else revision,
            args.hub_token if token is None else token,
            blocking,
        )

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight decay applies to all trained parameters, LayerNorms included."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the base class, with the means of this period's training metrics."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):  # fp16 skips a step that overflows, and goes on
                self._check_weights()
            logs.update(self.diagnostics.summarize(self.accelerator))
        super().log(logs, *args, **kwargs)

    def _prepare_sharded_model(self) -> None:
        """What FSDP2, which by itself serves `forward` alone, has to know of the model."""
        for name in ("encode_image", "coarse_embeds"):
            register_fsdp_forward_method(self.model, name)
        # save_pretrained copies the code of the model's class, which now is one that FSDP2 made of ours.
        sharded, own = type(self.model), type(self.model).__bases__[-1]
        sharded.__module__, sharded.__name__ = own.__module__, own.__name__

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), INCOMPLETE)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in the base class, with self-training's state; a checkpoint has its final name once it is complete."""
        self._check_weights()
        self.diagnostics.flush(self.accelerator)
        incomplete = self._get_output_dir(trial)
        folder = os.path.join(incomplete, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            state = {"epoch": torch.tensor(self._epoch), **self.diagnostics.state_dict()}
            means = {"log_class_mean": self._log_class_mean, "log_head_means": self._log_head_means}
            state |= {name: mean for name, mean in means.items() if mean is not None}
            save_file(state, os.path.join(folder, STATE_NAME), metadata=self._image_facts)
        super()._save_checkpoint(model, trial)
        for has_turn in self._turns():
            if has_turn and os.path.exists(folder):
                self._finish_checkpoint(folder, os.path.dirname(incomplete))

    def _finish_checkpoint(self, folder: str, run_dir: str) -> None:
        final = os.path.join(run_dir, os.path.basename(folder))
        if os.path.exists(final):  # of an earlier life of this run
            os.replace(final, folder + "-earlier")
        os.replace(folder, final)
        if self.args.save_total_limit:  # moved before they are deleted: none is ever half there
            for old in sort_checkpoints(run_dir, use_mtime=True)[: -self.args.save_total_limit]:
                os.replace(old, os.path.join(os.path.dirname(folder), os.path.basename(old)))
        shutil.rmtree(os.path.dirname(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in the base class, each file complete under its final name, config.json last.

        Settings are saved as JSON: the Trainer's own file is a pickle that nothing reads back.
        """
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        incomplete = os.path.join(output_dir, INCOMPLETE)
        if self.args.should_save:
            shutil.rmtree(incomplete, ignore_errors=True)  # of a run that was killed
        super()._save(incomplete, state_dict)
        if not self.args.should_save:
            return
        os.remove(os.path.join(incomplete, TRAINING_ARGS_NAME))
        with open(os.path.join(incomplete, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())
        for name in sorted(os.listdir(incomplete), key=lambda name: name == CONFIG_NAME):
            os.replace(os.path.join(incomplete, name), os.path.join(output_dir, name))
        os.rmdir(incomplete)


class _EpochCallback(TrainerCallback):
    def __init__(self, trainer: MicroCLIPTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: MicroCLIPTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_training()

    def on_epoch_begin(
        self, args: MicroCLIPTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_epoch(int(state.epoch or 0))

    def on_epoch_end(
        self, args: MicroCLIPTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_epoch()


def _chunk_size(config: MicroCLIPConfig, device: torch.device) -> int:
    """How many images to encode at a time, without gradient."""
    vision = config.clip_config.vision_config
    num_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    image_bytes = 4 * num_tokens * vision.intermediate_size
    if device.type == "cpu":
        return min(max(1, CPU_CHUNK_BYTES // image_bytes), CPU_CHUNK_IMAGES)
    return max(1, CHUNK_BYTES // image_bytes)


def _both_embeds(output: MicroCLIPOutput) -> torch.Tensor:
    """[CLS] and [FG] embeddings, `(batch_size, 2, embed_dim)`."""
    return torch.stack([output.cls_embeds, output.fg_embeds], 1)


def _log_sum(logits: torch.Tensor) -> torch.Tensor:
    """Log of the sum of class probabilities, and the number of images: `(num_classes + 1,)`, float32."""
    log_sum = logits.float().log_softmax(-1).logsumexp(0)
    return torch.cat([log_sum, log_sum.new_tensor([len(logits)])])


def _class_names(config: MicroCLIPConfig) -> list[str] | None:
    """The classes in their order, which isn't label2id's once it was saved; `None` where they have no names."""
    class_names = [config.id2label[index] for index in range(config.num_labels)]
    return None if class_names[0] == "LABEL_0" else class_names


def _with_views(
    dataset: Any, model: MicroCLIPForImageClassification, args: MicroCLIPTrainingArguments, preparation: Preparation
) -> Any:
    """Training images as views, with labels to measure by where they are the model's classes."""
    if isinstance(dataset, dict):
        raise TypeError(
            f"train_dataset is a {type(dataset).__name__}; pass one data set, such as one split of a DatasetDict."
        )
    is_stream = isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset))
    if is_stream and args.max_steps <= 0:
        raise ValueError("train_dataset is a stream, whose end can't be known; set max_steps.")
    dataset = undecoded(as_images(dataset))
    if holds_views(first_example(dataset)):
        return dataset
    class_names = _class_names(model.config)
    if class_names is not None and isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        dataset = align_or_leave_out(dataset, class_names, "train_dataset")
    size = model.config.clip_config.vision_config.image_size
    settings = ViewSettings(
        size, args.num_crops, args.crop_ratio, args.seed, args.max_corrupt_share, preparation.resample
    )
    return (ViewStream if is_stream else ViewDataset)(dataset, settings)
