"""`microclip adapt`: images + class names (+ descriptions) -> an adapted model on disk and on the Hub."""

import contextlib
import functools
import json
import os
import sys
import warnings
from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import pipeline
from transformers.trainer_utils import PredictionOutput, get_last_checkpoint, has_length
from transformers.utils import CONFIG_NAME

from ..data.class_names import read_class_names
from ..data.sources import load_images
from ..descriptions.files import load_descriptions, read_descriptions, save_descriptions
from ..explain.explanation import Explanation, explain
from ..files import check_writable, read_text
from ..hub.model_card import DESCRIPTIONS, PICTURE, CardFacts, split_results
from ..images import UNREADABLE, cut_strip, decode, to_rgb
from ..loading import load_clip, read_model_type
from ..modeling_microclip import MicroCLIPForImageClassification
from ..plots import plot_adaptation
from ..presets import Preset, list_presets, load_split
from ..report.page import write_report
from ..report.record import write_record
from ..run_names import REPORT
from ..text_heads import check_templates
from ..training.checks import check_classes, check_unused
from ..training.trainer import MicroCLIPTrainer
from ..training.training_args import MicroCLIPTrainingArguments
from . import command_frame, make_parser, refuse_unknown
from .options import check_files, read_overrides, read_preset, refuse_given


@dataclass
class AdaptArguments:
    """The model to start from, the images and the texts."""

    model_name_or_path: str = field(metadata={"help": "A CLIP: Hub id or folder."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": f"A benchmark by name ({', '.join(list_presets())}): its data set on the Hub, splits, columns, "
            "class names and prompts; other options replace them. For your own copy in place of the Hub's, pass the "
            "folder of a copy of its repository with --dataset_name, or images in sub-folders named like its classes "
            "with --train_dir and --test_dir."
        },
    )
    class_names: str | None = field(
        default=None, metadata={"help": "Text file with one class name a line, or JSON. Default: the preset's."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={"help": "Images to adapt to: a folder of them, or of Arrow, Parquet or WebDataset (.tar) files."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Or a data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its commit, branch or tag."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Its split to adapt to. Default: the preset's, or 'train'."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Its split to measure accuracy on."})
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder of images in sub-folders named like the classes, to measure accuracy."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images. Default: the preset's, or the only one."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of labels; they only measure. Default: the preset's, or 'label'."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read images while training; needs --max_steps."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images of a stream among which the next is drawn."})
    descriptions: str | None = field(
        default=None,
        metadata={
            "help": 'JSON file {"class": ["sentence", ...]}, or .txt file of lines "class: sentence". Default: the '
            "templates."
        },
    )
    descriptions_dataset: str | None = field(default=None, metadata={"help": "Or a data set of them on the Hub."})
    descriptions_columns: list[str] | None = field(
        default=None, metadata={"help": "Its columns of class names and of sentences, as in: class sentences."}
    )
    templates: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts with {} for the class name. Default: the preset's, or 'a photo of a {}.'"},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Architecture as JSON, for example \'{"prior_weighting": "uniform"}\'.'}
    )
    report: bool = field(
        default=True, metadata={"help": "Write report.html: curves and images to look at, for a run without labels."}
    )
    license: str | None = field(default=None, metadata={"help": "The result's licence, for its card, as in 'mit'."})


@command_frame("adapt", "before training, so nothing was written")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, build the model, adapt it, save it, and show that the saved model predicts."""
    parser = make_parser((AdaptArguments, MicroCLIPTrainingArguments), "adapt", __doc__)
    parser.add_argument("--config", help="YAML file of settings named like these options, which override it.")
    arguments = _expand_config(sys.argv[1:] if arguments is None else arguments)
    options, training_args, _, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    refuse_unknown(unknown, parser)
    texts, overrides, train_dataset, test_dataset = _check_input(options, training_args)
    model, zero_shot_head = load_clip(options.model_name_or_path, texts, overrides)
    trainer = MicroCLIPTrainer(model=model, args=training_args, train_dataset=train_dataset, eval_dataset=test_dataset)
    trainer.check_run(_find_checkpoint(training_args))
    if trainer.is_world_process_zero():
        print(
            f"Adapting to {len(train_dataset) if has_length(train_dataset) else 'a stream of'} images of "
            f"{len(texts['class_names'])} classes, {len(texts.get('descriptions', ()))} of them described."
        )
    results = {}
    if test_dataset is not None:
        results |= _evaluate_clip(trainer, zero_shot_head, "zero_shot")
        if "descriptions" in texts:
            results |= _evaluate_clip(trainer, model.classifier.weight.detach().clone(), "cupl")
    shown = _spread(test_dataset if test_dataset is not None else train_dataset)
    before = _explain(model, shown)

    try:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(training_args.output_dir)) from None
    try:
        _finish(options, trainer, texts, results, (shown, before), result.metrics)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"training is over, and what is complete lies in {training_args.output_dir}") from None
    finally:
        trainer.leave_group()


def _finish(
    options: AdaptArguments,
    trainer: MicroCLIPTrainer,
    texts: dict[str, Any],
    results: dict[str, float],
    shown: tuple[list[dict[str, Any]], list[Explanation]],
    train_metrics: dict[str, float],
) -> None:
    """Save the model, measure it, draw what was learned, write card and report, push."""
    examples, before = shown
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", train_metrics)
    trainer.save_metrics("train", train_metrics)
    tested = None
    if trainer.eval_dataset is not None:
        tested = trainer.predict(trainer.eval_dataset, metric_key_prefix="adapted")
        trainer.log(tested.metrics)
        results = results | split_results(tested.metrics)
        trainer.log_metrics("eval", results)
        trainer.save_metrics("eval", results)
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        if "descriptions" in texts:
            save_descriptions(folder / DESCRIPTIONS, texts["descriptions"].items())
        adapted = MicroCLIPForImageClassification.from_pretrained(folder)  # trainer.model may be split over processes
        after = explain(adapted, [explanation.image for explanation in before])
        labels = [example.get("label") for example in examples]
        plot_adaptation(folder / PICTURE, trainer.state.log_history, results, before, after, labels)
        dataset = options.train_dir or options.dataset_name
        trainer.card_facts = CardFacts(
            base_model=options.model_name_or_path,
            dataset=dataset,
            descriptions=DESCRIPTIONS if "descriptions" in texts else None,
            license=options.license,
            test_dataset=options.test_dir or dataset,
            results=results,
        )
        trainer.create_model_card()
        _report(trainer, tested, options.report)
        _show_prediction(trainer.args.output_dir, examples[0]["image"])
        print(f"What was learned, in a picture: {folder / PICTURE}")
    if trainer.args.push_to_hub:
        pushed = trainer.push_to_hub()
        if trainer.is_world_process_zero():
            print(f"Pushed to {pushed}")


def _how_to_go_on(folder: str) -> str:
    """What a run that was interrupted leaves."""
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if checkpoint is None:
        return "there is no checkpoint yet"
    return f"with --resume_from_checkpoint true the same command goes on from {checkpoint}"


def _expand_config(arguments: list[str]) -> list[str]:
    """The settings of `--config` as options, before those that are given."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    if (path := known.config) is None:
        return arguments
    try:
        settings = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} isn't a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}; expected lines such as 'seed: 1'.")
    options = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        options += [f"--{name}", *map(str, values)]
    return options + rest


def _evaluate_clip(trainer: MicroCLIPTrainer, head: torch.Tensor, name: str) -> dict[str, float]:
    """Accuracy of plain CLIP: its [CLS] feature against a head."""
    model = trainer.model
    own_head, own_ratio = model.classifier.weight.detach().clone(), model.config.fusion_ratio
    try:
        model.classifier.weight.data.copy_(head)
        model.config.fusion_ratio = 1
        return split_results(trainer.evaluate(metric_key_prefix=name))
    finally:
        model.classifier.weight.data.copy_(own_head)
        model.config.fusion_ratio = own_ratio


def _spread(dataset: Dataset | IterableDataset, count: int = 8) -> list[dict[str, Any]]:
    """A few readable images from all over the data set, or the first ones of a stream."""
    if has_length(dataset):
        step = max(1, len(dataset) // count)
        fetches = (functools.partial(dataset.__getitem__, index) for index in range(0, len(dataset), step))
    else:
        fetches = (functools.partial(dict, example) for example in dataset)
    readable = []
    for fetch in fetches:
        with contextlib.suppress(*UNREADABLE):
            example = fetch()
            readable.append({**example, "image": to_rgb(decode(example["image"]))})
        if len(readable) == count:
            break
    return readable


def _explain(model: MicroCLIPForImageClassification, examples: list[dict[str, Any]]) -> list[Explanation]:
    """For the picture of the run, which is drawn without images where an unusual image processor forbids."""
    try:
        return explain(model, [example["image"] for example in examples])
    except ValueError as error:
        warnings.warn(f"{PICTURE} will show no images, since they can't be explained: {error}", stacklevel=2)
        return []


def _check_input(
    options: AdaptArguments, training_args: MicroCLIPTrainingArguments
) -> tuple[dict[str, Any], dict[str, Any], Dataset | IterableDataset, Dataset | None]:
    """All that can be wrong is found before the model is loaded."""
    check_files(options, "class_names", "descriptions")
    read_model_type(options.model_name_or_path)
    preset = None if options.preset is None else _apply_preset(options)
    if preset is None and options.class_names is None:
        raise ValueError("Pass the classes with --class_names, a text file with one name a line, or with --preset.")
    checkpoint = _check_output(training_args)
    for folder in filter(None, (options.train_dir, options.test_dir)):
        if os.path.realpath(folder) == os.path.realpath(training_args.output_dir):
            raise ValueError(
                f"--output_dir {training_args.output_dir} is the folder of the images, among which pictures of the "
                "run would count; choose another folder, which may lie in it."
            )
    check_templates(options.templates)
    if options.descriptions is not None and options.descriptions_dataset is not None:
        raise ValueError("Pass the descriptions with either --descriptions or --descriptions_dataset.")
    if options.descriptions_columns is not None and options.descriptions_dataset is None:
        raise ValueError("--descriptions_columns are those of --descriptions_dataset; pass that too.")
    overrides = read_overrides(options.config_overrides)
    if options.class_names is not None:
        texts = _read_texts(options, read_class_names(options.class_names), checkpoint)
        return texts, overrides, *_load_data(options, training_args, preset, texts["class_names"])
    datasets = _load_data(options, training_args, preset)
    return _read_texts(options, datasets[0].features["label"].names, checkpoint), overrides, *datasets


def _apply_preset(options: AdaptArguments) -> Preset:
    """The preset with the options that are given in place of its own; what else the run asks of it, in the options."""
    preset = read_preset(options, train_split=options.dataset_split, test_split=options.test_split)
    options.templates = list(preset.templates)
    if options.train_dir is None:
        options.dataset_name = preset.dataset
    return preset


def _read_texts(options: AdaptArguments, class_names: list[str], checkpoint: str | None) -> dict[str, Any]:
    """What the heads are made of; the classes are those of a run that goes on."""
    if checkpoint is not None:
        check_classes(checkpoint, class_names)
    texts = {"class_names": class_names, "templates": options.templates}
    if options.descriptions is not None:
        texts["descriptions"] = read_descriptions(options.descriptions, class_names)
    if options.descriptions_dataset is not None:
        source, columns = options.descriptions_dataset, options.descriptions_columns
        texts["descriptions"] = load_descriptions(source, class_names, columns)
    return texts


def _load_data(
    options: AdaptArguments,
    training_args: MicroCLIPTrainingArguments,
    preset: Preset | None,
    class_names: list[str] | None = None,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Images to adapt to, and images with labels to measure by."""
    given = sum(source is not None for source in (options.train_dir, options.dataset_name))
    if given == 2 or (given == 0 and preset is None):
        raise ValueError("Pass the images with either --train_dir or --dataset_name.")
    if options.train_dir is not None:
        refuse_given(options, "--train_dir", "dataset_config", "dataset_revision", "dataset_split")
    if options.test_split is not None and options.train_dir is not None:
        raise ValueError("--test_split is a split of --dataset_name; pass that, or --test_dir in its place.")
    if options.streaming and training_args.max_steps <= 0:
        raise ValueError("--streaming true needs --max_steps, since the end of a stream can't be known.")
    if preset is None:
        dataset, test_dataset = _load_own(options, class_names)
    else:
        dataset, test_dataset = _load_preset(options, preset, class_names)
    if options.streaming:
        dataset = dataset.shuffle(seed=training_args.seed, buffer_size=options.shuffle_buffer)
    return dataset, test_dataset


def _load_own(options: AdaptArguments, class_names: list[str]) -> tuple[Dataset | IterableDataset, Dataset | None]:
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    hub = {
        "hub": options.dataset_name is not None,
        "config_name": options.dataset_config,
        "revision": options.dataset_revision,
        **columns,
    }
    source, split = options.train_dir or options.dataset_name, options.dataset_split or "train"
    dataset = load_images(source, class_names, split=split, streaming=options.streaming, **hub)
    if options.test_split is not None:
        return dataset, load_images(source, class_names, split=options.test_split, labels_required=True, **hub)
    if options.test_dir is not None:
        return dataset, load_images(options.test_dir, class_names, labels_required=True, **columns)
    return dataset, None


def _load_preset(
    options: AdaptArguments, preset: Preset, class_names: list[str] | None
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    preset = preset.override(class_names=class_names)
    required = class_names is None  # then the labels hold the names
    dataset = load_split(preset, "train", options.train_dir, options.streaming, labels_required=required)
    preset = preset.override(class_names=class_names or dataset.features["label"].names)
    if options.test_dir is not None:
        return dataset, load_split(preset, "test", options.test_dir)
    if options.train_dir is None and preset.test_split is not None:
        return dataset, load_split(preset, "test")
    return dataset, None


def _check_output(training_args: MicroCLIPTrainingArguments) -> str | None:
    """The checkpoint to resume, if any; only the run that wrote what lies in the folder may write over it."""
    folder = training_args.output_dir
    resume = str(training_args.resume_from_checkpoint)
    if resume.lower() in ("none", "true", "false"):
        training_args.resume_from_checkpoint = resume.lower() == "true"
    check_writable(folder)
    newest = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if training_args.resume_from_checkpoint is True and newest is None:
        raise ValueError(f"--resume_from_checkpoint true, but {folder} holds no checkpoint; leave the option out.")
    checkpoint = _find_checkpoint(training_args)
    if checkpoint is not None:
        if not os.path.isdir(checkpoint):
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: there is no such folder; pass a checkpoint's.")
        return checkpoint
    if newest or os.path.exists(os.path.join(folder, CONFIG_NAME)):
        advice = ", or continue that run with --resume_from_checkpoint true" if newest else ""
        raise ValueError(f"--output_dir {folder} already holds a model. Choose another folder{advice}.")
    check_unused(folder)
    return None


def _find_checkpoint(training_args: MicroCLIPTrainingArguments) -> str | None:
    """The folder to resume from, if any."""
    if training_args.resume_from_checkpoint is True:
        return get_last_checkpoint(training_args.output_dir)
    return training_args.resume_from_checkpoint or None


def _report(trainer: MicroCLIPTrainer, tested: PredictionOutput | None, page: bool) -> None:
    """The labels of the images, and the page; where they fail the run is no less finished."""
    folder = Path(trainer.args.output_dir)
    try:
        write_record(trainer, tested)
        if page:
            write_report(folder, trainer.train_dataset)
            print(f"What to look at, without labels: {folder / REPORT}")
    except Exception as error:
        warnings.warn(
            f"The run is saved, but not its report: {error!r}. 'microclip report {folder}' tries again.", stacklevel=2
        )


def _show_prediction(folder: str, image: Any) -> None:
    """Reload the saved model as a user would."""
    classify = pipeline("image-classification", model=folder, top_k=3)
    print(f"Saved to {folder}. pipeline('image-classification', model={folder!r}) says of the first image:")
    for prediction in classify(cut_strip(image)):
        print(f"  {prediction['score']:6.1%}  {prediction['label']}")
