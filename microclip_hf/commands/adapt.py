"""`microclip adapt`: images + class names (+ descriptions) -> an adapted model on disk and on the Hub."""

import json
import os
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from datasets import Dataset, IterableDataset
from transformers.hf_argparser import HfArg

from ..configuration_microclip import HUB_PREFIX, MicroCLIPConfig
from ..data.class_names import read_class_names
from ..descriptions.files import load_descriptions
from ..files import read_text
from ..hub.model_card import CardFacts
from ..loading import load_clip, read_model_type
from ..presets import Preset
from ..recipes import load_recipe
from ..training.checks import check_classes, fits_mixture
from ..training.run import adapt, check_output
from ..training.training_args import MicroCLIPTrainingArguments
from . import command_frame, naming_options, read_options
from .options import ImageOptions


# Options that a run's errors speak of.
RUN_OPTIONS = ("output_dir", "resume_from_checkpoint", "hub_model_id", "push_to_hub")
CONFIG = {"help": "YAML file of settings named like these options, which override it."}
# What --help shows; --help_all shows the rest.
HELP_GROUPS = {
    "model and images": (
        "model_name_or_path",
        "train_dir",
        "dataset_name",
        "dataset_split",
        "preset",
        "test_dir",
    ),
    "texts": ("class_names", "descriptions", "templates"),
    "recipe, how it learns": (
        "recipe",
        "num_train_epochs",
        "per_device_train_batch_size",
        "learning_rate",
        "num_crops",
        "distribution_alignment",
        "fairness_weight",
        "prior_refresh",
        "bf16",
        "use_cpu",
        "seed",
    ),
    "output": ("output_dir", "report", "resume_from_checkpoint", "push_to_hub", "config"),
}


@dataclass
class AdaptArguments(ImageOptions):
    """The model to start from, the images and the texts."""

    TEST_SPLIT: ClassVar[str] = "test_split"
    model_name_or_path: str = HfArg(
        help="The CLIP to start from: Hub id or folder. It is in transformers' format or open_clip's, as OpenAI's, "
        "LAION's, DFN, MetaCLIP, BioCLIP, GeoRSCLIP and RemoteCLIP are."
    )
    train_dir: str | None = HfArg(
        default=None,
        help="Folder of images to adapt to. It may hold Arrow, Parquet or WebDataset (.tar) files; with a preset the "
        "images lie in sub-folders named like its classes.",
    )
    test_split: str | None = HfArg(default=None, help="Split of --dataset_name to measure accuracy on.")
    streaming: bool = HfArg(
        default=False,
        help="Read images as they are needed. Training needs --max_steps then; --recipe quick reads them once.",
    )
    shuffle_buffer: int = HfArg(default=1000, help="Images of a stream among which training draws the next.")
    descriptions_dataset: str | None = HfArg(
        default=None, help="A data set of descriptions on the Hub, in place of --descriptions."
    )
    descriptions_columns: list[str] | None = HfArg(
        default=None, help="Its columns of class names and of sentences, as in: class sentences."
    )
    report: bool = HfArg(default=True, help="Write report.html, curves and images to look at. It needs no labels.")
    license: str | None = HfArg(default=None, help="The result's licence, for its card, as in 'mit'.")


@command_frame("adapt", "before training, so nothing was written")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, build the model, and adapt it."""
    arguments = _expand_config(sys.argv[1:] if arguments is None else arguments)
    dataclasses = (AdaptArguments, MicroCLIPTrainingArguments)
    # In Python it has a default, "trainer_output", where nobody would look for a model.
    others = {"required": ["output_dir"], "--config": CONFIG}
    options, training_args, _ = read_options("adapt", __doc__, dataclasses, arguments, HELP_GROUPS, **others)
    overrides, checkpoint = _check_options(options, training_args)
    texts, train_dataset, test_dataset = _read_input(options, training_args, checkpoint)
    if test_dataset is None and training_args.eval_strategy != "no":
        raise ValueError("--eval_strategy needs images with labels; pass them with --test_dir or --test_split.")
    model, heads = load_clip(options.model_name_or_path, texts, overrides)
    images = options.train_dir or options.dataset_name
    facts = CardFacts(
        base_model=options.model_name_or_path.removeprefix(HUB_PREFIX),
        dataset=images,
        license=options.license,
        test_dataset=options.test_dir or images,
    )
    with naming_options(*RUN_OPTIONS):
        adapt(model, train_dataset, training_args, test_dataset, heads, texts["descriptions"], facts, options.report)


def _expand_config(arguments: list[str]) -> list[str]:
    """The settings of `--recipe`, then those of `--config`, as options before those that are given."""
    path, rest = _take_option("--config", arguments)
    # Of `--config` without a file the parser of all options complains.
    arguments = arguments if path is None else _as_options(_read_config(path)) + rest
    recipe, _ = _take_option("--recipe", arguments)
    return arguments if recipe is None else _as_options(load_recipe(recipe).args) + arguments


def _take_option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """An option's value, `None` where there is none, and the other arguments."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value", nargs="?")
    namespace, rest = parser.parse_known_args(arguments)
    return namespace.value, rest


def _read_config(path: str) -> dict[str, Any]:
    """The settings of a YAML file."""
    try:
        settings = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} isn't a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}; expected lines such as 'seed: 1'.")
    return settings


def _as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as words of the command line; those that are `None` are left out."""
    options = []
    for name, value in settings.items():
        if value is None:
            continue
        # As on the command line, where a dictionary is JSON and a list several words.
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        options += [f"--{name}", *map(str, values)]
    return options


def _check_options(
    options: AdaptArguments, training_args: MicroCLIPTrainingArguments
) -> tuple[dict[str, Any], str | None]:
    """Settings of the architecture, and the checkpoint to resume, if any; what is wrong before images are read."""
    options.check("train")
    if read_model_type(options.model_name_or_path) == MicroCLIPConfig.model_type:
        raise ValueError(
            f"--model_name_or_path {options.model_name_or_path} was adapted already; pass the CLIP that it was made "
            "of. An interrupted run goes on with --resume_from_checkpoint true."
        )
    if options.preset is None and options.class_names is None:
        raise ValueError("Pass the classes with --class_names, a text file with one name a line, or with --preset.")
    if options.test_split is not None and options.train_dir is not None:
        raise ValueError("--test_split is a split of --dataset_name; pass that, or --test_dir in its place.")
    if options.test_split is not None and options.test_dir is not None:
        raise ValueError("Pass the images to measure accuracy on with either --test_split or --test_dir.")
    if options.streaming and not training_args.trains_nothing:
        _check_streamed_training(training_args)
    if options.descriptions is not None and options.descriptions_dataset is not None:
        raise ValueError("Pass the descriptions with either --descriptions or --descriptions_dataset.")
    if options.descriptions_columns is not None and options.descriptions_dataset is None:
        raise ValueError("--descriptions_columns are those of --descriptions_dataset; pass that too.")
    output_dir = training_args.output_dir
    for folder in (options.train_dir, options.test_dir):
        if folder and os.path.realpath(folder) == os.path.realpath(output_dir):
            raise ValueError(
                f"--output_dir {output_dir} is the folder of the images, among which pictures of the run would count; "
                "choose another folder, which may lie in it."
            )
    # The field holds text, whose true is no name of a folder.
    resume = str(training_args.resume_from_checkpoint).lower()
    if resume in ("none", "true", "false"):
        training_args.resume_from_checkpoint = resume == "true"
    overrides = options.read_overrides()
    if training_args.recipe is not None:
        overrides = {**load_recipe(training_args.recipe).config, **overrides}
    with naming_options(*RUN_OPTIONS):
        return overrides, check_output(training_args)


def _check_streamed_training(training_args: MicroCLIPTrainingArguments) -> None:
    """Refuse what a stream can't be trained on with."""
    if fits_mixture(training_args):
        raise ValueError(
            "--streaming true and a class mixture don't go together in training, which keeps labels by an image's "
            "number, and a stream's images have none. Set --num_train_epochs 0 and leave out --max_steps, as --recipe "
            "quick does; or leave out --streaming."
        )
    if training_args.max_steps <= 0:
        raise ValueError("--streaming true needs --max_steps, since the end of a stream can't be known.")


def _read_input(
    options: AdaptArguments, training_args: MicroCLIPTrainingArguments, checkpoint: str | None
) -> tuple[dict[str, Any], Dataset | IterableDataset, Dataset | None]:
    """What the heads are made of, images to adapt to, and images with labels to measure by."""
    splits = {"train_split": options.dataset_split, "test_split": options.test_split}
    preset = options.apply_preset(options.train_dir, **splits)
    if options.class_names is None:
        train_dataset, test_dataset = _read_images(options, training_args, preset, None)
        return _read_texts(options, train_dataset.features["label"].names, checkpoint), train_dataset, test_dataset
    # Images may take long to read, and what is wrong with the texts is known before.
    class_names = read_class_names(options.class_names)
    texts = _read_texts(options, class_names, checkpoint)
    return texts, *_read_images(options, training_args, preset, class_names)


def _read_texts(options: AdaptArguments, class_names: list[str], checkpoint: str | None) -> dict[str, Any]:
    """What the heads are made of; the classes are those of a run that goes on."""
    if checkpoint is not None:
        check_classes(checkpoint, class_names)
    texts = options.read_texts(class_names)
    if options.descriptions_dataset is not None:
        texts["descriptions"] = load_descriptions(
            options.descriptions_dataset, class_names, options.descriptions_columns
        )
    return texts


def _read_images(
    options: AdaptArguments,
    training_args: MicroCLIPTrainingArguments,
    preset: Preset | None,
    class_names: list[str] | None,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    # Of a preset's data set the labels bring the class names where none are given.
    labels_required = None if preset is None else class_names is None
    reading = {"streaming": options.streaming, "labels_required": labels_required}
    train_dataset = options.read_images("train", preset, class_names, **reading)
    class_names = class_names or train_dataset.features["label"].names
    if options.streaming and not training_args.trains_nothing:
        train_dataset = train_dataset.shuffle(seed=training_args.seed, buffer_size=options.shuffle_buffer)
    # A folder in place of the preset's data set has no such split.
    test_split = options.test_split or (preset and preset.test_split)
    if options.test_dir is None and (options.train_dir is not None or test_split is None):
        return train_dataset, None
    return train_dataset, options.read_images("test", preset, class_names, labels_required=True)
