"""`microclip adapt`: a folder of images + class names (+ descriptions) -> an adapted model on disk and on the Hub."""

import json
import os
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedConfig, pipeline
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_microclip import MicroCLIPConfig
from ..data import load_image_folder, read_class_names
from ..descriptions import read_descriptions
from ..model_card import write_model_card
from ..modeling_microclip import MicroCLIPForImageClassification
from ..plots import plot_adaptation, snapshot
from ..text_heads import check_templates, encode_heads
from ..trainer import MicroCLIPTrainer
from ..training_args import MicroCLIPTrainingArguments


@dataclass
class AdaptArguments:
    """The model to start from, the images and the texts."""

    model_name_or_path: str = field(metadata={"help": "A CLIP: Hub id or folder."})
    train_dir: str = field(metadata={"help": "Folder of images to adapt to. Labels aren't used."})
    class_names: str = field(metadata={"help": "Text file with one class name a line."})
    descriptions: str | None = field(
        default=None, metadata={"help": 'JSON file {"class": ["sentence", ...]}. Default: the templates.'}
    )
    templates: list[str] | None = field(
        default=None, metadata={"help": "Prompts with {} for the class name. Default: 'a photo of a {}.'"}
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder of images in sub-folders named like the classes, to measure accuracy."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Architecture as JSON, for example \'{"prior_weighting": "uniform"}\'.'}
    )


def main(arguments: list[str] | None = None) -> None:
    """Check the input, build the model, adapt it, save it, and show that the saved model predicts."""
    parser = HfArgumentParser(
        (AdaptArguments, MicroCLIPTrainingArguments), prog="microclip adapt", description=__doc__
    )
    parser.add_argument("--config", help="YAML file of settings named like these options, which override it.")
    try:
        arguments = _expand_config(sys.argv[1:] if arguments is None else arguments)
        options, training_args = parser.parse_args_into_dataclasses(arguments)[:2]
        texts, overrides, train_dataset, test_dataset = _check_input(options, training_args)
        model, zero_shot_head = _load_model(options.model_name_or_path, texts, overrides)
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        sys.exit(f"microclip adapt: {error}")
    print(
        f"Adapting to {len(train_dataset)} images of {len(texts['class_names'])} classes, "
        f"{len(texts.get('descriptions', ()))} of them described."
    )
    trainer = MicroCLIPTrainer(model=model, args=training_args, train_dataset=train_dataset, eval_dataset=test_dataset)

    accuracies = {}
    if test_dataset is not None:
        cupl_head = model.classifier.weight.detach().clone()
        accuracies |= _evaluate_clip(trainer, zero_shot_head, "zero_shot")
        accuracies |= _evaluate_clip(trainer, cupl_head, "cupl")
    shown = _spread(test_dataset if test_dataset is not None else train_dataset)
    before = snapshot(model, shown)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if test_dataset is not None:
        accuracies |= _accuracy(trainer.evaluate(metric_key_prefix="adapted"))
        trainer.log_metrics("eval", accuracies)
        trainer.save_metrics("eval", accuracies)
    if trainer.is_world_process_zero():
        write_model_card(model, training_args, options.model_name_or_path, len(train_dataset), accuracies)
        picture = Path(training_args.output_dir, "adaptation.png")
        plot_adaptation(picture, trainer.state.log_history, accuracies, before, snapshot(model, shown))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        _show_prediction(training_args.output_dir, shown[0]["image"])
        print(f"What was learned, in a picture: {picture}")


def _expand_config(arguments: list[str]) -> list[str]:
    """The settings of `--config` as options, before those that are given."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    if (path := known.config) is None:
        return arguments
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
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


def _load_model(
    source: str, texts: dict[str, Any], overrides: dict[str, Any]
) -> tuple[MicroCLIPForImageClassification, torch.Tensor]:
    """The model with both of its heads, and the head of plain CLIP, made of the templates alone."""
    model = MicroCLIPForImageClassification.from_clip(source, **texts, **{**overrides, "keep_text_model": True})
    zero_shot_head, _ = encode_heads(model.clip, model.tokenizer, texts["class_names"], texts["templates"])
    if not overrides.get("keep_text_model"):
        model.drop_text_model()
    return model, zero_shot_head


def _evaluate_clip(trainer: MicroCLIPTrainer, head: torch.Tensor, name: str) -> dict[str, float]:
    """Accuracy of plain CLIP: its [CLS] feature against a head."""
    model = trainer.model
    own_head, own_ratio = model.classifier.weight.detach().clone(), model.config.fusion_ratio
    try:
        model.classifier.weight.data.copy_(head)
        model.config.fusion_ratio = 1
        return _accuracy(trainer.evaluate(metric_key_prefix=name))
    finally:
        model.classifier.weight.data.copy_(own_head)
        model.config.fusion_ratio = own_ratio


def _accuracy(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.endswith("_accuracy")}


def _spread(dataset: Dataset, count: int = 8) -> Dataset:
    """A few images from all over the data set."""
    count = min(count, len(dataset))
    return dataset.select([index * len(dataset) // count for index in range(count)])


def _check_input(
    options: AdaptArguments, training_args: MicroCLIPTrainingArguments
) -> tuple[dict[str, Any], dict[str, Any], Dataset, Dataset | None]:
    """All that can be wrong is found before the model is loaded."""
    _check_output(training_args)
    class_names = read_class_names(options.class_names)
    texts = {"class_names": class_names, "templates": options.templates}
    check_templates(options.templates)
    if options.descriptions is not None:
        texts["descriptions"] = read_descriptions(options.descriptions, class_names)
    overrides = _read_overrides(options.config_overrides)
    train_dataset = load_image_folder(options.train_dir, class_names)
    test_dataset = None
    if options.test_dir is not None:
        test_dataset = load_image_folder(options.test_dir, class_names, labels_required=True)
    return texts, overrides, train_dataset, test_dataset


def _check_output(training_args: MicroCLIPTrainingArguments) -> None:
    """A finished run isn't overwritten, and there is something to resume."""
    folder, resume = training_args.output_dir, str(training_args.resume_from_checkpoint)
    if resume.lower() in ("none", "true", "false"):
        training_args.resume_from_checkpoint = resume.lower() == "true"
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if training_args.resume_from_checkpoint is True and checkpoint is None:
        raise ValueError(f"--resume_from_checkpoint true, but {folder} holds no checkpoint; leave the option out.")
    if not training_args.resume_from_checkpoint and (
        checkpoint or os.path.exists(os.path.join(folder, "config.json"))
    ):
        raise ValueError(
            f"--output_dir {folder} already holds a model. Choose another folder, or continue that run with "
            "--resume_from_checkpoint true."
        )


def _read_overrides(text: str | None) -> dict[str, Any]:
    try:
        overrides = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--config_overrides {text} isn't JSON: {error}") from error
    known = {f.name for f in fields(MicroCLIPConfig)} - {f.name for f in fields(PreTrainedConfig)} - {"clip_config"}
    if unknown := set(overrides) - known:
        raise ValueError(
            f"--config_overrides has {', '.join(map(repr, sorted(unknown)))}; the settings are "
            f"{', '.join(sorted(known))}."
        )
    MicroCLIPConfig(**overrides)
    return overrides


def _show_prediction(folder: str, image: Any) -> None:
    """Reload the saved model as a user would."""
    classify = pipeline("image-classification", model=folder, top_k=3)
    print(f"Saved to {folder}. pipeline('image-classification', model={folder!r}) says of the first image:")
    for prediction in classify(image):
        print(f"  {prediction['score']:6.1%}  {prediction['label']}")
