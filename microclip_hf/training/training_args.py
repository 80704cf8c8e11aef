"""Settings of optimisation and pseudo-labelling; the defaults are the published ones (arXiv:2510.02270, section 4)."""

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import TrainingArguments

from ..data.class_frequencies import check_frequencies
from ..images import CROP_RATIO, NUM_CROPS
from ..machine import num_workers
from ..recipes import list_recipes, load_recipe


PriorRefresh = Literal["step", "never"]
LabelRefresh = Literal["step", "never"]
RECIPES = "; ".join(f"{name} ({load_recipe(name).title})" for name in list_recipes())


@dataclass
class MicroCLIPTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`MicroCLIPTrainer`]: transformers' own, and what self-training adds.

    Defaults that differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size=64`,
    `per_device_eval_batch_size=64`, `num_train_epochs=15`, `learning_rate=1e-4`, `weight_decay=0.1` (on every trained
    parameter), `max_grad_norm=0` (no clipping), `lr_scheduler_type="cosine_with_min_lr"` down to 2e-6,
    `save_strategy="epoch"`, `save_total_limit=2`, `logging_steps=10`, `hub_strategy="end"` (pushes in between would
    lack the code), `remove_unused_columns=False` (views are made from the image column),
    `ddp_find_unused_parameters=False`, `ddp_broadcast_buffers=False` (processes exchange trained parameters only),
    `logging_nan_inf_filter=False` (nothing is hidden, and the host needn't wait for each step); on a GPU non-blocking
    copies and, where processes are forked (Linux), `dataloader_num_workers` of all cores but one, up to 16.

    Args:
        recipe (`str`, *optional*): name of the recipe that the other settings began from. It only records, for the
            card: a value that equals the default can't be told from one that wasn't given, so a recipe that was
            applied here would replace some given values in silence. `from_recipe` and `--recipe` apply it. A recipe
            none of whose `args` hold is refused, or else a card would name what wasn't done.
        num_crops (`int`, defaults to 8): K, crops of the multi-view prior. 0 takes the weak view's own feature.
        crop_ratio (`list[float]`, defaults to `[0.5, 0.9]`): least and greatest side of a crop, as shares of the
            image's shorter side.
        prior_ratio (`float`, defaults to 0.5): gamma, the share of the frozen head in the pseudo-labels, in [0, 1].
        label_fusion_ratio (`float`, defaults to 0.5): share of [CLS] in the fused embedding that the learnable head
            labels, in [0, 1]: `unit(0.5 g + 0.5 l)` as published (section 3.4), whatever
            `MicroCLIPConfig.fusion_ratio` classifies with.
        distribution_alignment (`bool`, defaults to `False`): mix probabilities in place of cosines, each divided by
            the mean probability that its head gives the class, over the last 32 batches or so, so that neither head's
            favourite classes take over. The fused head's mean is kept in the model and divides its predictions too
            (`model.logit_adjustment`). Not in the paper. Where classes aren't about as frequent as each other, set
            `class_frequencies` too. Accumulated batches are aligned part by part.
        class_mixture (`bool`, defaults to `False`): predict by a mixture of one Gaussian a class over the fused
            features, held to what the texts say (see [`~class_mixture.fit_class_mixture`]; not in the paper). It is
            fitted to all images, by one forward of each and of its `num_crops` crops, before training, and again after
            it, unless `num_train_epochs` is 0, with which nothing is trained and images may be a stream. The model
            predicts by the last one, or, where training has led away from what the texts say, has the weights and the
            mixture of before.
        label_refresh (`"step"` or `"never"`, defaults to `"step"`): when pseudo-labels are made: with the weights of
            each step, as published; or once, by the class mixture before training, after which a step is the student's
            alone, without crops.
        class_frequencies (`str`, defaults to `"equal"`): how frequent classes are taken to be, by alignment, fairness,
            the division of predictions and the class mixture: all equally; `"estimated"`, by a class mixture that is
            fitted before training; or as a CSV or JSON file of classes and shares says (see
            [`~data.class_frequencies.read_class_frequencies`]).
        fairness_weight (`float`, defaults to 1.0): weight of the loss that keeps every class in use. Lower it where
            classes are known to be rare or absent, and then only with `distribution_alignment`.
        prior_refresh (`"step"` or `"never"`, defaults to `"step"`): when the multi-view prior is computed: with the
            weights of each step, as published; or once, from the weights that training starts with, after which a
            step costs a third. It is then kept in `output_dir`, 4 bytes an image and class.
        autocast_pseudo_labels (`bool`, defaults to `False`): with `bf16` or `fp16`, label the images in that precision
            too; as published they are labelled in float32.
        max_corrupt_share (`float`, defaults to 0.05): share of the images that may be unreadable, rounded up; more are
            an error. In place of such an image comes the next one that can be read.

    Raises:
        ValueError: if a number is out of its range, there is no such recipe, none of its `args` hold, or the machine
            can't do what the launcher or `fp16` ask for.
    """

    # Optimisation
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a step on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images a step in evaluation."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over the images."})
    learning_rate: float = field(default=1e-4, metadata={"help": "AdamW's initial learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of every trained parameter."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 doesn't."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning rate schedule."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of the schedule. Default for "cosine_with_min_lr": min_lr 2e-6.'}
    )

    # Recipe
    recipe: str | None = field(
        default=None,
        metadata={"help": f"Settings to begin from: {RECIPES}. Other options and --config replace them."},
    )

    # Pseudo-labels
    num_crops: int = field(default=NUM_CROPS, metadata={"help": "K, crops of the multi-view prior."})
    crop_ratio: list[float] = field(
        default_factory=lambda: list(CROP_RATIO), metadata={"help": "Least and greatest side of a crop (share)."}
    )
    prior_ratio: float = field(default=0.5, metadata={"help": "gamma, share of the frozen head in pseudo-labels."})
    label_fusion_ratio: float = field(
        default=0.5, metadata={"help": "Share of [CLS] in the fused embedding that pseudo-labels compare."}
    )
    distribution_alignment: bool = field(
        default=False, metadata={"help": "Mix both heads' probabilities, each divided by its class means."}
    )
    class_mixture: bool = field(
        default=False, metadata={"help": "Predict by a mixture of one Gaussian a class, fitted to all images."}
    )
    label_refresh: LabelRefresh = field(
        default="step",
        metadata={"help": "Make pseudo-labels anew each step, or never. Never takes those of --class_mixture."},
    )
    class_frequencies: str = field(
        default="equal",
        metadata={"help": "How frequent classes are. It is equal, estimated, or a CSV or JSON file of their shares."},
    )
    fairness_weight: float = field(default=1.0, metadata={"help": "Weight of the fairness loss."})
    prior_refresh: PriorRefresh = field(
        default="step",
        metadata={"help": "Compute the multi-view prior anew each step, or never. Never is three times as fast."},
    )
    autocast_pseudo_labels: bool = field(
        default=False, metadata={"help": "Label images in the precision of --bf16 or --fp16 too."}
    )

    # Saving and logging
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the result, checkpoints and logs."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on from a checkpoint. Its folder, or true for the last one."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the result to the Hub, once it is there."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the Hub."})

    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN out of logged losses."})

    # Data and processes
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that make views. Default: beside a GPU on Linux all cores but one, up to 16."},
    )
    max_corrupt_share: float = field(default=0.05, metadata={"help": "Images that may be unreadable (share)."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Views need the image column."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without gradient; there are none."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Send buffers to all processes; all have the same."}
    )

    @classmethod
    def from_recipe(cls, recipe: str, output_dir: str | None = None, **kwargs: Any) -> "MicroCLIPTrainingArguments":
        """Arguments of a recipe by its name; those given win. Its `config` is for `from_clip`, see [`load_recipe`].

        Raises:
            ValueError: if there is no such recipe, or as in the constructor.
        """
        return cls(output_dir=output_dir, recipe=recipe, **{**load_recipe(recipe).args, **kwargs})

    def __post_init__(self) -> None:
        if self.recipe is not None:
            self._check_recipe()
        if self.num_crops < 0:
            raise ValueError(f"num_crops is {self.num_crops}; it must be 0 or more.")
        if len(self.crop_ratio) != 2 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1] <= 1:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; it must be two ascending numbers in (0, 1].")
        for name in ("prior_ratio", "label_fusion_ratio", "max_corrupt_share"):
            share = vars(self)[name]
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; it must lie in [0, 1].")
        for name in ("learning_rate", "weight_decay", "fairness_weight"):
            number = vars(self)[name]
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} is {number}; it must be 0 or more, and finite.")
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*counts, *(["save_steps"] if self.save_strategy == "steps" else [])):
            number = vars(self)[name]
            if not number > 0:
                raise ValueError(f"{name} is {number}; it must be more than 0.")
        for name, choices in (("prior_refresh", get_args(PriorRefresh)), ("label_refresh", get_args(LabelRefresh))):
            if vars(self)[name] not in choices:
                raise ValueError(f"{name} is {vars(self)[name]!r}; it must be one of {', '.join(choices)}.")
        check_frequencies(self.class_frequencies)
        if self.label_refresh == "never" and not self.class_mixture:
            raise ValueError("label_refresh 'never' takes the labels of a class mixture; set class_mixture to true.")
        if self.prior_refresh == "never" and (self.label_refresh == "never" or self.trains_nothing):
            raise ValueError(
                "prior_refresh 'never' keeps a prior for the pseudo-labels of each step, and this run makes none. "
                "Leave it out, or set label_refresh to 'step' and num_train_epochs to more than 0."
            )
        if self.autocast_pseudo_labels and not (self.bf16 or self.fp16):
            raise ValueError("autocast_pseudo_labels needs bf16 or fp16, the precision to label images in.")
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(
                f'hub_strategy is "{self.hub_strategy}"; only "end" pushes what a model needs to be loaded.'
            )
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": 2e-6}
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True; it must be False, since views are made from the images.")
        if self.trains_nothing and not self.class_mixture:
            raise ValueError("num_train_epochs is 0, so nothing would be adapted; set it, or class_mixture.")
        has_accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:  # on a CPU the model itself needs the cores
            self.dataloader_num_workers = num_workers() if has_accelerator else 0
        if self.accelerator_config is None and has_accelerator:
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        # Without an accelerator there is nothing to pin memory for, and torch would warn at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_accelerator
        super().__post_init__()
        self._check_machine()
        self._use_one_gpu()
        # What chooses by an evaluation (best checkpoint, early stopping, schedules) sets it, or needs it.
        if self.metric_for_best_model is not None or self.save_strategy == "best":
            raise ValueError(
                f"The run would be steered by evaluations (metric_for_best_model is {self.metric_for_best_model!r}), "
                "and labels only measure. Leave out metric_for_best_model, load_best_model_at_end, save_strategy "
                "'best', and schedules such as 'reduce_lr_on_plateau'."
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError("bf16_full_eval and fp16_full_eval cast the weights that are adapted; leave them out.")

    @property
    def trains_nothing(self) -> bool:
        """Whether the run takes no step, so that a class mixture is all that it fits."""
        return self.num_train_epochs == 0 and self.max_steps <= 0

    def _check_recipe(self) -> None:
        """Refuse an unknown recipe, and one that was only named."""
        settings = load_recipe(self.recipe).args
        if settings and all(vars(self)[name] != value for name, value in settings.items()):
            raise ValueError(
                f"recipe is {self.recipe!r}, and none of its settings hold ({', '.join(settings)}). Set them by "
                f"MicroCLIPTrainingArguments.from_recipe({self.recipe!r}, ...), or leave recipe out."
            )

    def _check_machine(self) -> None:
        """Refuse processes that don't know of each other, and fp16 on a CPU, which accelerate ignores."""
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched > 1 and self.world_size == 1:
            raise ValueError(
                f"{launched} processes were launched, and find no GPU to share the run on (their device is "
                f"{self.device}): each would do the whole of it. Launch 1 process, or set use_cpu to run on the CPU "
                f"with {launched}."
            )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 is True, and a CPU trains in bf16 or float32 only. Set bf16, or leave out fp16.")

    def _use_one_gpu(self) -> None:
        """Of several, or else the Trainer would wrap the model in DataParallel, which splits batches in a process."""
        if self.n_gpu > 1:
            warnings.warn(
                f"Of the {self.n_gpu} GPUs here one is used. For all of them, launch the run by accelerate launch.",
                stacklevel=3,
            )
            self._n_gpu = 1
