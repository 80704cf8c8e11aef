"""`microclip adapt`: a folder of images + class names (+ descriptions) -> an adapted model on disk and on the Hub."""

import json
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedConfig, pipeline
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_microclip import MicroCLIPConfig
from ..data import load_image_folder, read_class_names
from ..descriptions import read_descriptions
from ..modeling_microclip import MicroCLIPForImageClassification
from ..text_heads import check_templates
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
    try:
        options, training_args = parser.parse_args_into_dataclasses(arguments)
        texts, overrides, train_dataset, test_dataset = _check_input(options, training_args)
        model = MicroCLIPForImageClassification.from_clip(options.model_name_or_path, **texts, **overrides)
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        sys.exit(f"microclip adapt: {error}")
    print(
        f"Adapting to {len(train_dataset)} images of {len(texts['class_names'])} classes, "
        f"{len(texts.get('descriptions', ()))} of them described."
    )
    trainer = MicroCLIPTrainer(model=model, args=training_args, train_dataset=train_dataset, eval_dataset=test_dataset)

    if test_dataset is not None:
        trainer.log_metrics("before", trainer.evaluate())
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if test_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        _show_prediction(training_args.output_dir, (test_dataset or train_dataset)[0]["image"])


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
