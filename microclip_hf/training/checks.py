"""What can be known of a run before it trains: batches, optimiser, room on the disk, and whether a checkpoint fits."""

import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import Trainer, get_scheduler
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer_utils import IntervalStrategy, has_length
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import modeling_microclip
from ..configuration_microclip import MicroCLIPConfig
from ..data.image_columns import image_names
from ..files import nearest_folder
from ..hub.push import CARD, MODEL
from ..modeling_microclip import MicroCLIPForImageClassification
from ..run_names import LABELS, REPORT, REPORT_DIR
from ..saliency import NonFiniteError
from ..text_heads import abbreviate
from .saving import STATE_NAME
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewDataset, ViewStream


PRIOR_HEAD = "prior_head.weight"
# Unit vectors of the same texts, encoded on two machines, differ by far less, those of other texts by far more.
SAME_HEAD = 1e-3
BYTES = 4  # of a float32
FEATURE_BYTES = 2  # of a float16


def check_unused(folder: str | os.PathLike) -> None:
    """Whether a folder holds nothing under the names that a run writes; an error says what it holds."""
    code = [modeling_microclip.__file__, *get_relative_import_files(modeling_microclip.__file__)]
    patterns = (*MODEL, CARD, LABELS, REPORT, REPORT_DIR, *map(os.path.basename, code))
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if kept:
        raise ValueError(
            f"`output_dir` {os.fspath(folder)} holds {abbreviate(kept)}, which this run would overwrite. Choose "
            "another folder, or move them away."
        )


def check_parts(model: Any, args: Any) -> None:
    """Whether a Trainer can be made of these; a `TypeError` where one is of another class."""
    if not isinstance(model, MicroCLIPForImageClassification):
        raise TypeError(
            f"model is a {type(model).__name__}; pass a MicroCLIPForImageClassification, for example from "
            "MicroCLIPForImageClassification.from_clip(clip, class_names)."
        )
    if not isinstance(args, MicroCLIPTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}; pass MicroCLIPTrainingArguments.")
    if not model.prior_head.weight.any():
        warnings.warn("prior_head is all zeros: no text has built it. Use from_clip(clip, class_names).", stacklevel=3)


def check_images(dataset: Any, args: MicroCLIPTrainingArguments) -> None:
    """Refuse several data sets (`TypeError`), and a stream whose end isn't known (`ValueError`)."""
    if isinstance(dataset, dict):
        raise TypeError(
            f"train_dataset is a {type(dataset).__name__}; pass one data set, such as one split of a DatasetDict."
        )
    is_stream = isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset))
    if is_stream and args.max_steps <= 0 and not fits_mixture(args):  # see check_countable
        raise ValueError("train_dataset is a stream, whose end can't be known; set max_steps.")


def check_training(model: MicroCLIPForImageClassification, args: MicroCLIPTrainingArguments, dataset: Any) -> None:
    """Whether a run of these settings has a step to take, and an optimiser and a schedule to take it with.

    An error where the images are several data sets, too few for a batch, or a stream without `max_steps`, the
    optimiser's package is missing, or a setting of optimiser or schedule is wrong.
    """
    split = args.accelerator_config.split_batches
    batch = args.train_batch_size * (1 if split else args.world_size)
    if args.dataloader_drop_last and has_length(dataset) and len(dataset) < batch:
        raise ValueError(
            f"dataloader_drop_last leaves out batches that aren't full, and {len(dataset)} images don't fill one of "
            f"{batch}. Lower per_device_train_batch_size ({args.per_device_train_batch_size}), or leave out "
            "dataloader_drop_last."
        )
    Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type {args.lr_scheduler_type!r} can't be used with lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {error}"
        ) from error


def check_countable(dataset: Any, args: MicroCLIPTrainingArguments, num_classes: int) -> None:
    """Whether what is kept for each image can be; an error where the images have no numbers, or are too few."""
    if fits_mixture(args) and not isinstance(dataset, ViewDataset):
        _check_streamed_mixture(dataset, args)
    elif args.class_mixture:
        check_enough(len(dataset), num_classes)
    if args.prior_refresh == "never" and not isinstance(dataset, ViewDataset):
        raise ValueError(
            "prior_refresh='never' keeps a prior for each image, which a stream, views or a data_collator of one's "
            f"own don't allow (train_dataset is a {type(dataset).__name__}). Pass images that can be counted, or use "
            "prior_refresh='step'."
        )


def fits_mixture(args: MicroCLIPTrainingArguments) -> bool:
    """Whether a run goes over all images before training."""
    return args.class_mixture or args.class_frequencies == "estimated"


def check_enough(num_images: int, num_classes: int) -> None:
    """An error where a class mixture has fewer images than classes."""
    if num_images < num_classes:
        raise ValueError(
            f"A class mixture needs as many images as classes, and there are {num_images} images of {num_classes} "
            "classes. Pass more images, or leave out the classes that none of them shows."
        )


def _check_streamed_mixture(dataset: Any, args: MicroCLIPTrainingArguments) -> None:
    """Whether a mixture can be fitted to what isn't a [`ViewDataset`]: a stream of `datasets`, without training."""
    if not isinstance(dataset, ViewStream):
        raise ValueError(
            "A class mixture is fitted to images, which views or a data_collator of one's own aren't (train_dataset "
            f"is a {type(dataset).__name__}). Pass images, or set class_mixture to false and class_frequencies to "
            "equal."
        )
    if not args.trains_nothing:
        raise ValueError(
            "With training, a class mixture is fitted to images that can be counted: labels are kept by an image's "
            f"number, and a stream's images have none (train_dataset is a {type(dataset).__name__}). Set "
            "num_train_epochs to 0 and leave out max_steps, as recipe quick does; or pass images that aren't in a "
            "stream; or set class_mixture to false and class_frequencies to equal."
        )
    if not isinstance(dataset.dataset, datasets.IterableDataset):
        raise ValueError(
            "A class mixture takes streams of `datasets`, which are read by shards, and train_dataset is a "
            f"{type(dataset.dataset).__name__}. Make it one with datasets.IterableDataset.from_generator."
        )


def check_finite_weights(model: torch.nn.Module, accelerator: Accelerator, step: int) -> None:
    """Weights that aren't finite are neither saved in place of good ones nor called a result: a `NonFiniteError` on
    all processes, which must all call it, where a trained weight of any is NaN or infinite.
    """
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
    is_finite = torch.stack([part.isfinite().all().to(accelerator.device) for part in parts]).all()
    if accelerator.reduce(is_finite.float(), "sum") < accelerator.num_processes:
        raise NonFiniteError(f"the weights hold NaN or infinite values after step {step}.")


def check_room(
    model: MicroCLIPForImageClassification,
    args: MicroCLIPTrainingArguments,
    num_images: int | None,
    checkpoint: str | None = None,
) -> None:
    """Whether the disk has room for the checkpoints that will be kept, one more while it's written, and the model.

    An error where it hasn't. A stream has no `num_images`; where a run goes on from a `checkpoint`, the checkpoints to
    keep are there already.
    """
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moments = 2 * BYTES * num_trained if "adam" in args.optim else 0  # what other optimisers keep isn't counted
    num_kept = _num_saves(args, num_images)
    if args.save_total_limit is not None:
        num_kept = min(num_kept, args.save_total_limit + 1)
    if checkpoint is not None:
        num_kept = min(num_kept, 1)
    needed = weights + num_kept * (weights + (0 if args.save_only_model else moments))
    if args.class_mixture and num_images is not None:
        both_embeds = 2 * model.config.clip_config.projection_dim
        # Of the last pass, after training if there is any, parts and file are there at once.
        needed += (2 if args.trains_nothing else 3) * num_images * FEATURE_BYTES * both_embeds
    free = shutil.disk_usage(nearest_folder(args.output_dir)).free
    if needed > free:
        fewer = f", lower save_total_limit ({args.save_total_limit}), or use save_strategy='no'" if num_kept else ""
        features = ", with the features of all images," if args.class_mixture else ""
        raise ValueError(
            f"The model and {num_kept} checkpoints{features} need about {needed / 1e9:.1f} GB in {args.output_dir}, "
            f"where {free / 1e9:.1f} GB are free. Make room{fewer}."
        )


def _num_saves(args: MicroCLIPTrainingArguments, num_images: int | None) -> int:
    """How many checkpoints a run writes."""
    if args.save_strategy == IntervalStrategy.NO or args.trains_nothing:
        return 0
    images_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps_an_epoch = math.inf if num_images is None else math.ceil(num_images / images_a_step)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)
    if args.save_strategy == IntervalStrategy.EPOCH:
        return math.ceil(num_steps / steps_an_epoch)
    return math.ceil(1 / args.save_steps if args.save_steps < 1 else num_steps / args.save_steps)


def image_facts(dataset: Any) -> dict[str, str]:
    """What a checkpoint says of the images, as text: `num_images`, and `image_names`, a SHA-256.

    Names are those of files below what all of them have in common, so that a folder can be moved; a stream has no
    facts, and images without names only their number.
    """
    if not has_length(dataset):
        return {}
    facts = {"num_images": str(len(dataset))}
    names, _ = image_names(dataset.dataset) if isinstance(dataset, ViewDataset) else ([], False)
    if any(names):
        start = len(os.path.commonprefix(names))  # noqa: RUF071, by letters: names needn't be paths
        text = "\n".join(name[start:] for name in names)
        facts["image_names"] = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return facts


def check_checkpoint(
    checkpoint: str, config: MicroCLIPConfig, prior_head: torch.Tensor, images: Mapping[str, str]
) -> None:
    """Whether a run can go on from a checkpoint; an error says what differs: classes, architecture, texts (the frozen
    `prior_head`, `(num_classes, embed_dim)`, on the CPU) or images (by [`image_facts`]).
    """
    saved_config = MicroCLIPConfig.from_pretrained(checkpoint)
    check_classes(checkpoint, config.class_names)
    for name in config.architecture_names():
        saved = vars(saved_config)[name]
        wanted = vars(config)[name]
        if saved != wanted:
            raise ValueError(
                f"The run that wrote {checkpoint} had {name}={saved!r}, and now it is {wanted!r}. Resume with the "
                "settings that it began with."
            )
    head = _read_weight(checkpoint, PRIOR_HEAD)
    if head is not None and (head.shape != prior_head.shape or (head - prior_head).abs().max() > SAME_HEAD):
        raise ValueError(
            f"The run that wrote {checkpoint} began with another CLIP, other descriptions or other templates. Resume "
            "with those, or start a new run in another folder."
        )
    _check_images(checkpoint, images)


def _check_images(checkpoint: str, images: Mapping[str, str]) -> None:
    path = os.path.join(checkpoint, STATE_NAME)
    if not os.path.exists(path):
        return
    with safe_open(path, "pt") as file:
        saved = file.metadata() or {}
    advice = "Resume with the images that it began with, or start a new run in another folder."
    if saved.get("num_images", images.get("num_images")) != images.get("num_images"):
        raise ValueError(
            f"The run that wrote {checkpoint} began with {saved['num_images']} images, and now there are "
            f"{images.get('num_images', 'as many as a stream gives')}. {advice}"
        )
    if saved.get("image_names", images.get("image_names")) != images.get("image_names"):
        raise ValueError(
            f"The run that wrote {checkpoint} began with images of other names, or in another order. {advice}"
        )


def _read_weight(checkpoint: str, name: str) -> torch.Tensor | None:
    """One tensor of a checkpoint; `None` where it isn't in safetensors, as of a model that is split over processes."""
    path = Path(checkpoint, SAFE_WEIGHTS_NAME)
    index = Path(checkpoint, SAFE_WEIGHTS_INDEX_NAME)
    if index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        path = path.with_name(shards.get(name, "none"))
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def check_classes(checkpoint: str, class_names: list[str]) -> None:
    """Heads of other classes, or of another order, aren't taken over from a checkpoint: they are an error."""
    saved = MicroCLIPConfig.from_pretrained(checkpoint).class_names
    if saved == class_names:
        return
    pairs = itertools.zip_longest(saved, class_names)
    index, (old, new) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
    before, now = ("missing" if name is None else repr(name) for name in (old, new))
    raise ValueError(
        f"The run that wrote {checkpoint} had other class names: number {index + 1} was {before} and is now {now}. "
        "Resume with the class names that the run began with, in their order."
    )
