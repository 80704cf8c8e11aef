"""Self-training without labels (arXiv:2510.02270, sections 3.3 and 3.4) on transformers' Trainer."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint, has_length

from ..class_mixture import ClassMixture
from ..configuration_microclip import MicroCLIPConfig, default_image_processor
from ..data.class_frequencies import read_class_frequencies
from ..data.eval_datasets import EvalDatasets
from ..files import check_writable
from ..metrics import compute_metrics
from ..modeling_microclip import MicroCLIPForImageClassification
from ..preparation import Preparation
from ..saliency import NonFiniteError
from ..verdict import count_effective
from .attention import student_attention
from .checks import (
    check_checkpoint,
    check_countable,
    check_finite_weights,
    check_images,
    check_parts,
    check_room,
    check_training,
    fits_mixture,
    image_facts,
)
from .class_means import ClassMeans, log_sum
from .diagnostics import Diagnostics
from .epochs import EpochCallback
from .evaluating import EvaluatingTrainer
from .labeler import HeadMeans, PseudoLabeler
from .mixing import MAX_AGREEMENT_LOSS, Mixer, merge_mixture, set_weight
from .progress import ProgressBar
from .saving import load_state, remove_incomplete
from .sharding import make_splittable, release_whole_weights, serve_encoders
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewCollator, ViewDataset, ViewSettings, as_views


class MicroCLIPTrainer(EvaluatingTrainer):
    r"""
    Adapts a [`MicroCLIPForImageClassification`] to images without labels; pseudo-labels are refined at every step.

    Args:
        model ([`MicroCLIPForImageClassification`]): from [`~MicroCLIPForImageClassification.from_clip`]; what isn't
            adapted is frozen.
        args ([`MicroCLIPTrainingArguments`], *optional*): settings, default `MicroCLIPTrainingArguments()`.
        train_dataset: items with a PIL `image`, or with the views themselves: `weak` and `strong` (3, S, S) and
            `crops` (K, 3, S, S), uint8. A `label` never influences training. A stream is read as often as `max_steps`
            ask for, by the first of several processes for all, and has no epochs: the fairness mean runs on. Where
            nothing is trained, a stream of `datasets` is read once, by all processes in shares. With a
            `data_collator` of one's own, whatever that turns into batches of views.
        eval_dataset: items with `image` or `pixel_values`, and `label` to measure by. Here and in `evaluate` and
            `predict`, images of a data set of `datasets` that can't be read are left out, with a warning.
        processing_class (`BaseImageProcessor`, *optional*): becomes the model's `image_processor`, is saved with it
            and used in evaluation, and gives the views its filter, mean and std. Default: the model's own; without
            any, CLIP's.
        data_collator, kwargs: as in [`~transformers.Trainer`].

    Raises:
        TypeError: if an argument is of another class, or the training data is several data sets.
        ValueError: if the image processor gives other pixels than views can be made of (see [`Preparation`]), the
            training data has neither images nor views, or is a stream to train on without `max_steps`; in training, if
            more images than `max_corrupt_share` can't be read.
    """

    # The loss is a mean over the batch: under gradient accumulation the Trainer divides it.
    loss_is_scaled_for_ga = False

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
        args = args if args is not None else MicroCLIPTrainingArguments()
        check_parts(model, args)

        # Model
        model.float()  # steps of 1e-4 vanish in half precision; bf16=True and fp16=True train under autocast
        model.freeze_for_adaptation()
        processing_class = processing_class or model.image_processor or default_image_processor(model.config)
        if not isinstance(processing_class, BaseImageProcessor):
            raise TypeError(f"processing_class is a {type(processing_class).__name__}; pass an image processor.")
        size = model.config.clip_config.vision_config.image_size
        preparation = Preparation.of(processing_class, size)
        model.image_processor = processing_class

        # Data
        class_names = _class_names(model.config)
        is_main = args.process_index == 0
        eval_datasets = EvalDatasets(class_names, is_main, is_main and not args.disable_tqdm)
        if train_dataset is not None:
            check_training(model, args, train_dataset)
            if data_collator is None:
                check_images(train_dataset, args)
                # Labels that are made once need no crops at each step.
                num_crops = args.num_crops if args.label_refresh == "step" else 0
                settings = ViewSettings(
                    size, num_crops, args.crop_ratio, args.seed, args.max_corrupt_share, preparation.resample
                )
                train_dataset = as_views(train_dataset, settings, class_names)
            check_countable(train_dataset, args, model.num_labels)

        # Trainer
        kwargs.setdefault("compute_metrics", compute_metrics)
        super().__init__(
            eval_datasets,
            eval_dataset,
            model=model,
            args=args,
            data_collator=data_collator if data_collator is not None else ViewCollator(processing_class),
            # The Trainer refuses a stream without `max_steps`, also where it has nothing to train.
            train_dataset=None if args.trains_nothing else train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.train_dataset = train_dataset
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            make_splittable(model)
            # They split the model along with its optimiser; until training each process evaluates with all of it.
            self.deepspeed = self.accelerator.prepare_model(model.to(self.args.device), evaluation_mode=True)
        self.add_callback(EpochCallback(self))
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:  # not a notebook's table, nor somebody's own
                self.remove_callback(callback)
                self.add_callback(ProgressBar)

        # Self-training
        self.labeler = PseudoLabeler(model.config, self.args, self.accelerator, preparation)
        self.class_means = ClassMeans(self.accelerator)
        self.diagnostics = Diagnostics(model.num_labels)
        self._known_frequencies = self._read_frequencies(class_names)
        # (C,), none where all are equal
        self.class_frequencies = None if self.args.class_frequencies == "equal" else self._known_frequencies
        self.mixer = Mixer(self.args, self.accelerator, self.labeler, model.config.fusion_ratio)
        self.mixture: ClassMixture | None = None  # by which the model predicts, once it does
        self._confidences: torch.Tensor | None = None  # of the latest pseudo-labels, where they are known
        self._checkpoint: str | None = None
        # As the texts made it: a copy, since a checkpoint is loaded into the model's own, and FSDP may split that.
        self._prior_head = model.prior_head.weight.detach().cpu().clone()

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
        if self.args.prior_refresh == "never":  # before a checkpoint brings adapted weights
            is_fresh = self._checkpoint is None
            self.labeler.keep_prior(self._unwrapped_model, self.train_dataset, is_fresh)
        if fits_mixture(self.args):
            fitted = self.mixer.fit_first(self._unwrapped_model, self.train_dataset, self._known_frequencies)
            if self.args.class_frequencies == "estimated":
                self.class_frequencies = fitted.mixture.frequencies
        start = {}
        if self.args.class_mixture:  # as training can be taken back
            start = {name: weight.detach().cpu().clone() for name, weight in self._trained_weights()}
        try:
            output = super().train(self._checkpoint, **kwargs)
        except (NonFiniteError, RuntimeError) as error:
            # On a GPU the check is an assertion of the device's.
            if not isinstance(error, NonFiniteError) and "device-side assert" not in str(error):
                raise
            raise ValueError(
                f"Training diverged: {error} Start again with a lower learning_rate; it is {self.args.learning_rate}."
            ) from error
        if self.args.class_mixture:
            self.adopt_mixture(start)
        return output

    def check_run(self, checkpoint: str | None = None) -> None:
        """What [`train`] would refuse of a run, or of one that goes on from a checkpoint, known before any other work.

        Raises:
            ValueError: if `output_dir` can't be written or has no room for the checkpoints, or the checkpoint is of
                other classes, texts, images or architecture.
        """
        if self.args.max_steps <= 0 and not 0 <= self.args.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs is {self.args.num_train_epochs}; it must be 0 or more, and finite.")
        check_writable(self.args.output_dir)
        check_room(self._unwrapped_model, self.args, self.num_images, checkpoint)
        if checkpoint is not None:
            check_checkpoint(checkpoint, self.model.config, self._prior_head, self.image_facts)

    @property
    def num_images(self) -> int | None:
        """See the base class; of a stream it is known after a pass over it."""
        return self.mixer.num_images if super().num_images is None else super().num_images

    def get_train_dataloader(self) -> DataLoader:
        """As in the base class; where nothing is trained, one stands in for that of a stream, which has no length."""
        if self.args.trains_nothing and not has_length(self.train_dataset):
            return DataLoader([None])
        return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]:
        """As in the base class; where gradients are accumulated, fairness needs the class mean of all batches first.
        That is one more forward of the student without gradient, as much as encoding one crop.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        log_sums = None
        if len(batches) > 1:
            self.model_wrapped.train()
            log_sums = [log_sum(self._predict_strong(batch["strong"].to(device))) for batch in batches]
        self.class_means.start_batch(log_sums)
        return batches, num_items

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The student's loss: cross-entropy with the pseudo-labels on the strong view, plus fairness.

        In evaluation, batches hold `pixel_values`, and `labels` to measure the loss by. Labels never train: a training
        batch without views is an error.
        """
        if not model.training:
            if "weak" in inputs:
                raise ValueError(
                    "An evaluation batch holds views; evaluate a data set with an 'image' or 'pixel_values' column."
                )
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if "weak" not in inputs:
            raise ValueError(
                f"A training batch holds {', '.join(map(repr, inputs))}; expected the views 'weak', 'strong' and "
                "'crops'. Let train_dataset hold an 'image' column, or the views."
            )
        pseudo_labels = self.refine_pseudo_labels(inputs)
        with student_attention(self):
            outputs = model(pixel_values=self.normalize(inputs["strong"]))
        logits = outputs["logits"].float()
        student_loss = cross_entropy(logits, pseudo_labels)
        fairness, share = self.class_means.fairness(logits)
        loss = share * student_loss + self.args.fairness_weight * fairness
        self.diagnostics.record(
            cross_entropy=student_loss.expand(len(logits)), student_agreement=logits.argmax(-1) == pseudo_labels
        )
        if self.args.fairness_weight > 0:
            self.diagnostics.record(fairness=fairness.expand(len(logits)))
        self.diagnostics.record_labels(pseudo_labels, inputs.get("index"), self._confidences)
        if "labels" in inputs:
            is_right = (pseudo_labels == inputs["labels"]).float()
            self.diagnostics.record(inputs["labels"] >= 0, pseudo_label_accuracy=is_right)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def refine_pseudo_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Label a batch with the current weights, see [`PseudoLabeler.label`]; other rules override this method.

        Returns:
            `torch.LongTensor` of shape `(batch_size,)`.
        """
        if self.args.label_refresh == "never":
            index = inputs["index"]
            self._confidences = self.mixer.first.confidences[index]
            self.diagnostics.record(pseudo_label_confidence=self._confidences)
            return self.mixer.first.labels[index]
        steps = self.args.gradient_accumulation_steps
        batch_number = self.state.global_step * steps + self.class_means.next_part + 1
        pseudo_labels = self.labeler.label(self._unwrapped_model, inputs, batch_number)
        self.diagnostics.record(
            pseudo_label_confidence=pseudo_labels.confidences, head_agreement=pseudo_labels.heads_agree
        )
        self._confidences = pseudo_labels.confidences
        return pseudo_labels.labels

    def encode_views(self, encode: Callable[[torch.Tensor], torch.Tensor], views: torch.Tensor) -> torch.Tensor:
        """See [`PseudoLabeler.encode_views`]."""
        return self.labeler.encode_views(encode, views)

    def normalize(self, views: torch.Tensor) -> torch.Tensor:
        """See [`PseudoLabeler.normalize`]."""
        return self.labeler.normalize(views)

    def start_training(self) -> None:
        """Start afresh, or where the checkpoint left off."""
        serve_encoders(self.model)
        self.diagnostics = Diagnostics(self.model.config.num_labels)
        self.class_means = ClassMeans(self.accelerator, self.class_frequencies)
        self.labeler.frequencies = self.class_frequencies
        self.labeler.head_means = HeadMeans(self.accelerator)
        if self.is_local_process_zero():
            remove_incomplete(self.args.output_dir)
        if self._checkpoint is None:
            self._unwrapped_model.logit_adjustment.reset()
            return
        state = load_state(self._checkpoint)
        if state is not None:
            self.diagnostics.load_state_dict(state)
            self.class_means.load_state_dict(state)
            if self.args.distribution_alignment:
                self.labeler.head_means.load_state_dict(state)

    def start_epoch(self, epoch: int) -> None:
        """New views, and the fairness mean starts afresh, unless a checkpoint of the same epoch brought it along."""
        self.class_means.start_epoch(epoch)
        if isinstance(self.train_dataset, ViewDataset):
            self.train_dataset.set_epoch(epoch)

    def finish_epoch(self) -> None:
        """Bring labels up to date, and tell which images couldn't be read, over all processes, if any are new."""
        self._check_weights()
        self.diagnostics.flush(self.accelerator)
        if isinstance(self.train_dataset, ViewDataset):
            self.train_dataset.gather_unreadable(self.accelerator)

    def prepare_state(self) -> dict[str, torch.Tensor]:
        """See the base class."""
        self._check_weights()
        self.diagnostics.flush(self.accelerator)
        parts = (self.diagnostics, self.class_means, self.labeler.head_means)
        return {name: value for part in parts for name, value in part.state_dict().items()}

    @functools.cached_property
    def image_facts(self) -> dict[str, str]:
        """See the base class, and [`~checks.image_facts`]."""
        return image_facts(self.train_dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the base class, with the means of this period's training metrics."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):  # fp16 skips a step that overflows, and goes on
                self._check_weights()
            logs.update(self.diagnostics.summarize(self.accelerator))
            if self.args.label_refresh == "never":
                logs.pop("label_changes", None)  # that these stay says nothing
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight decay applies to all trained parameters, LayerNorms included."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def adopt_mixture(self, start: dict[str, torch.Tensor]) -> None:
        """Predict by a mixture over the features that training has led to, or else by the first one, with the weights
        of the `start`.
        """
        model = self._unwrapped_model
        fitted = self.mixer.first
        metrics = {"mixture_agreement": fitted.agreement}
        if self.state.global_step > 0:
            last = self.mixer.fit_last(model, self.train_dataset, self._known_frequencies)
            release_whole_weights(model)
            is_kept = last.agreement >= fitted.agreement - MAX_AGREEMENT_LOSS
            metrics = {"mixture_agreement": last.agreement, "first_mixture_agreement": fitted.agreement}
            metrics["training_was_kept"] = float(is_kept)
            if is_kept:
                fitted = last
            else:
                for name, weight in self._trained_weights():
                    set_weight(weight, start[name])
        merge_mixture(model, fitted.mixture)
        self.mixture = fitted.mixture
        if fitted.labels is None:
            self.diagnostics.record_counts(fitted.counts)
        else:
            index = (fitted.labels >= 0).nonzero().flatten()
            self.diagnostics.record_labels(fitted.labels[index], index, fitted.confidences[index])
            self.diagnostics.flush(self.accelerator)
        self.log({**metrics, "effective_classes": count_effective(self.diagnostics.class_counts)})

    def leave_group(self) -> None:
        """End what connects the processes of a run, as its last act: Gloo's threads end with the last reference to
        their group, and abort a process that exits before them.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    @torch.no_grad()
    def _predict_strong(self, views: torch.Tensor) -> torch.Tensor:
        """The student's logits `(B, C)`; without fairness only their number counts."""
        if self.args.fairness_weight == 0:
            return torch.zeros(len(views), self.model.num_labels, device=views.device)
        return self.model_wrapped(pixel_values=self.normalize(views))["logits"]

    def _read_frequencies(self, class_names: list[str] | None) -> torch.Tensor | None:
        """Those (C,) that are known; `None` where they are to be estimated."""
        source = self.args.class_frequencies
        if source == "estimated":
            return None
        if source == "equal":
            return torch.full((self.model.num_labels,), 1 / self.model.num_labels, device=self.args.device)
        if class_names is None:
            raise ValueError(f"class_frequencies {source} needs a model whose classes have names.")
        return torch.tensor(read_class_frequencies(source, class_names), device=self.args.device)

    def _trained_weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [named for named in self._unwrapped_model.named_parameters() if named[1].requires_grad]

    @property
    def _unwrapped_model(self) -> MicroCLIPForImageClassification:
        return self.accelerator.unwrap_model(self.model)

    def _check_weights(self) -> None:
        check_finite_weights(self.model, self.accelerator, self.state.global_step)


def _class_names(config: MicroCLIPConfig) -> list[str] | None:
    """The classes; `None` where they have no names but transformers' own."""
    return None if config.class_names[0] == "LABEL_0" else config.class_names
