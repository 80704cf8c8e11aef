"""`microclip evaluate`: a model + images with labels -> how well each way of predicting does, and where it fails."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..configuration_microclip import MicroCLIPConfig
from ..data.class_names import read_class_names
from ..data.labels import labelled
from ..data.sources import load_images
from ..descriptions.files import read_descriptions
from ..evaluation.page import (
    PAGE,
    PICTURE,
    RESULTS,
    check_output,
    classes_table,
    describe_images,
    describe_left_out,
    pairs_table,
    ways_table,
    write_results,
)
from ..evaluation.predictions import ANSWER, EvaluationSettings, PlainCLIP, predict_all_ways
from ..evaluation.results import EvaluationFacts, make_report
from ..hub.card_results import add_results, read_card
from ..hub.model_card import hub_id
from ..loading import choose_device, load_adapted, load_clip, read_model_type
from ..modeling_microclip import MicroCLIPForImageClassification
from ..presets import Preset, load_split
from ..text_heads import check_templates, encode_heads
from ..training.views import NUM_CROPS
from . import command_frame, make_parser, refuse_unknown
from .options import check_files, read_overrides, read_preset, refuse_given


NUM_PRINTED = 5


@dataclass
class EvaluateArguments:
    """The model, the images with labels, and what to compare with."""

    model_name_or_path: str = field(
        metadata={"help": "An adapted model, or a CLIP (then with --class_names): Hub id or folder."}
    )
    output_dir: str = field(metadata={"help": f"Folder for {RESULTS}, {PAGE} and {PICTURE}."})
    preset: str | None = field(
        default=None,
        metadata={"help": "A benchmark by name, as in microclip adapt: its test split, names and prompts."},
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Images in sub-folders named like the classes, or Arrow, Parquet, .tar files."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Or a data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its commit, branch or tag."})
    dataset_split: str | None = field(default=None, metadata={"help": "Its split. Default: the preset's, or 'test'."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images. Default: the preset's, or the only one."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of labels. Default: the preset's, or 'label'."}
    )
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "For a CLIP: text file with one class name a line, or JSON. Default: the preset's. An adapted "
            "model has its own."
        },
    )
    descriptions: str | None = field(
        default=None,
        metadata={"help": 'JSON file {"class": ["sentence", ...]}, for a CLIP (also that of --clip).'},
    )
    templates: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts with {} for the class name. Default: the preset's, or 'a photo of a {}.'"},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'For a CLIP: architecture as JSON, for example \'{"prior_weighting": "uniform"}\'.'},
    )
    clip: str | None = field(
        default=None, metadata={"help": "For an adapted model: the CLIP to compare it with, Hub id or folder."}
    )
    num_crops: int = field(
        default=NUM_CROPS, metadata={"help": "Crops of an image, each a forward pass; 0 leaves that way out."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images at once."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images; 0 reads them in this one."})
    device: str | None = field(default=None, metadata={"help": "As torch calls it. Default: a GPU if there is one."})
    seed: int = field(default=0, metadata={"help": "Of crops and intervals."})
    update_card: bool = field(
        default=False,
        metadata={"help": "Also write the results into the card, README.md, of the adapted model's folder."},
    )


@dataclass(frozen=True)
class Subject:
    """What is measured: the model, what it is compared with, and how ways are called or why they are left out."""

    model: MicroCLIPForImageClassification
    plain: PlainCLIP | None
    titles: dict[str, str]
    left_out: dict[str, str]


@command_frame("evaluate", "no result is half-written")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, load the model, predict in every way, and write and print what was found."""
    parser = make_parser(EvaluateArguments, "evaluate", __doc__)
    options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    refuse_unknown(unknown, parser)
    device = _check_options(options)
    adapted = read_model_type(options.model_name_or_path) == MicroCLIPConfig.model_type
    class_names, overrides = _read_classes(options, adapted)
    preset = None if options.preset is None else _apply_preset(options)
    descriptions = _read_descriptions(options, class_names)
    card = read_card(options.model_name_or_path) if options.update_card else None
    dataset, num_unlabelled = _load_data(options, preset, class_names)
    if class_names is None:
        class_names = dataset.features["label"].names
        descriptions = _read_descriptions(options, class_names)
    texts = {"class_names": class_names, "templates": options.templates, "descriptions": descriptions}
    subject = _load_adapted(options, texts) if adapted else _load_plain(options, texts, overrides)
    for model in (subject.model, *([subject.plain.model] if subject.plain else [])):
        model.to(device)
    settings = EvaluationSettings(
        options.num_crops, seed=options.seed, batch_size=options.batch_size, num_workers=options.num_workers
    )
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    predictions = predict_all_ways(subject.model, dataset, subject.plain, settings)
    report = make_report(predictions, _facts(options, class_names, subject, num_unlabelled), options.seed)
    write_results(options.output_dir, report, predictions)
    if card is not None:
        add_results(card, options.model_name_or_path, report, **_dataset_facts(options))
    _print(report)
    print(f"\nSaved to {options.output_dir}: {RESULTS}, {PAGE}, {PICTURE}.")
    if card is not None:
        print(f"Added to the card: {Path(options.model_name_or_path, 'README.md')}")


def _check_options(options: EvaluateArguments) -> torch.device:
    """What can be wrong without reading anything; the device."""
    for name, lowest in (("num_crops", 0), ("num_workers", 0), ("seed", 0), ("batch_size", 1)):
        if (value := vars(options)[name]) < lowest:
            raise ValueError(f"--{name} is {value}; it must be {lowest} or more.")
    check_output(options.output_dir, "--output_dir")
    test_dir = None if options.test_dir is None else os.path.realpath(options.test_dir)
    if test_dir is not None and Path(os.path.realpath(options.output_dir)).is_relative_to(test_dir):
        raise ValueError(
            f"--output_dir {options.output_dir} lies in --test_dir {options.test_dir}, where {PICTURE} would count as "
            "a photo; choose a folder outside."
        )
    check_templates(options.templates)
    check_files(options, "class_names", "descriptions")
    if (options.test_dir is None) == (options.dataset_name is None) and (options.test_dir or not options.preset):
        raise ValueError("Pass the images with either --test_dir or --dataset_name, or with --preset.")
    if options.test_dir is not None:
        refuse_given(options, "--test_dir", "dataset_config", "dataset_revision", "dataset_split")
    return choose_device(options.device)


def _read_classes(options: EvaluateArguments, adapted: bool) -> tuple[list[str] | None, dict[str, Any]]:
    """Class names (`None`: the preset's) and architecture; settings that such a model doesn't take are refused."""
    source, class_names = options.model_name_or_path, None
    config = MicroCLIPConfig.from_pretrained(source)
    if adapted:
        refused = {"class_names": "its classes are its own", "config_overrides": "its architecture is its own"}
        class_names = config.class_names
        if options.clip is None:
            refused["descriptions"] = "only a CLIP reads them; pass it with --clip, to compare with"
        if options.clip is None and not config.keep_text_model:
            refused["templates"] = "only a CLIP reads them; pass it with --clip, to compare with"
        kind = "an adapted model"
    else:
        refused = {"clip": "it is compared with itself", "update_card": "only an adapted model's card is written"}
        kind = "a CLIP"
    for name, reason in refused.items():
        if vars(options)[name]:
            raise ValueError(f"--{name} doesn't go with {source}, {kind}: {reason}.")
    if options.clip is not None:
        read_model_type(options.clip)
        MicroCLIPConfig.from_pretrained(options.clip)
    if not adapted and options.class_names is None and options.preset is None:
        raise ValueError(f"{source} is a CLIP; pass the names of the classes with --class_names, or with --preset.")
    if not adapted and options.class_names is not None:
        class_names = read_class_names(options.class_names)
    return class_names, read_overrides(options.config_overrides)


def _apply_preset(options: EvaluateArguments) -> Preset:
    """The preset with the options that are given in place of its own, and the options with what it says."""
    preset = read_preset(options, test_split=options.dataset_split)
    options.templates = list(preset.templates)
    if options.test_dir is None:
        options.dataset_name, options.dataset_config = preset.dataset, preset.config
        options.dataset_revision, options.dataset_split = preset.revision, preset.test_split
    return preset


def _read_descriptions(options: EvaluateArguments, class_names: list[str] | None) -> dict[str, list[str]] | None:
    if options.descriptions is None or class_names is None:
        return None
    return read_descriptions(options.descriptions, class_names)


def _load_data(
    options: EvaluateArguments, preset: Preset | None, class_names: Sequence[str] | None
) -> tuple[Dataset, int]:
    """The images that have a label, and how many haven't."""
    source = options.test_dir or options.dataset_name
    if preset is not None:
        dataset = load_split(preset.override(class_names=class_names), "test", options.test_dir)
    else:
        options.dataset_split = options.dataset_split or "test"
        dataset = load_images(
            source,
            class_names,
            hub=options.dataset_name is not None,
            config_name=options.dataset_config,
            revision=options.dataset_revision,
            split=options.dataset_split,
            image_column=options.image_column,
            label_column=options.label_column,
            labels_required=True,
        )
    known = labelled(dataset)
    return dataset.select(known), len(dataset) - len(known)


def _load_plain(options: EvaluateArguments, texts: dict[str, Any], overrides: dict[str, Any]) -> Subject:
    """A CLIP, and the microCLIP that it would start as."""
    model, zero_shot_head = load_clip(options.model_name_or_path, texts, overrides)
    heads, left_out = _clip_heads(model, zero_shot_head, texts)
    return Subject(model, PlainCLIP(model, heads), {ANSWER: "microCLIP, not adapted"}, left_out)


def _load_adapted(options: EvaluateArguments, texts: dict[str, Any]) -> Subject:
    """A saved microCLIP, and the CLIP to compare it with."""
    model = load_adapted(options.model_name_or_path)
    if options.clip is not None:
        clip, zero_shot_head = load_clip(options.clip, texts, {"prior_weighting": "uniform"})
        heads, left_out = _clip_heads(clip, zero_shot_head, texts)
        return Subject(model, PlainCLIP(clip, heads), {}, left_out)
    left_out = {"cupl": "it needs the CLIP that was adapted (--clip), and --descriptions"}
    if model.tokenizer is not None:
        head, _ = encode_heads(model.clip, model.tokenizer, texts["class_names"], texts["templates"])
        titles = {"zero_shot": "[CLS] as adapted, with the class names"}
        return Subject(model, PlainCLIP(model, {"zero_shot": head}), titles, left_out)
    return Subject(model, None, {}, {"zero_shot": "it needs the CLIP that was adapted (--clip)", **left_out})


def _clip_heads(
    clip: MicroCLIPForImageClassification, zero_shot_head: torch.Tensor, texts: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The heads of a plain CLIP by way, and why one is left out."""
    if texts["descriptions"] is None:
        return {"zero_shot": zero_shot_head}, {"cupl": "it needs --descriptions"}
    return {"zero_shot": zero_shot_head, "cupl": clip.classifier.weight.detach().clone()}, {}


def _facts(
    options: EvaluateArguments, class_names: Sequence[str], subject: Subject, num_unlabelled: int
) -> EvaluationFacts:
    no_crops = {"multi_crop": "--num_crops is 0"} if options.num_crops == 0 else {}
    names = ("clip", "descriptions", "templates", "config_overrides", "num_crops", "preset", "dataset_revision")
    return EvaluationFacts(
        model=options.model_name_or_path,
        dataset=_dataset_title(options),
        class_names=class_names,
        titles=subject.titles,
        left_out=subject.left_out | no_crops,
        num_unlabelled=num_unlabelled,
        settings={name: value for name in names if (value := vars(options)[name]) is not None},
    )


def _dataset_title(options: EvaluateArguments) -> str:
    """A Hub id with its configuration and split; a folder by its name alone."""
    if hub_id(options.dataset_name) is None:
        return os.path.basename(os.path.abspath(options.test_dir or options.dataset_name))
    return ", ".join(filter(None, [options.dataset_name, options.dataset_config, options.dataset_split]))


def _dataset_facts(options: EvaluateArguments) -> dict[str, str | None]:
    """The data set in the metadata of a card; the Hub tells folders of images apart by `dataset_config` alone."""
    title = _dataset_title(options)
    if hub_id(options.dataset_name) is None:
        return {"dataset_type": "imagefolder", "dataset_name": title, "dataset_config": title}
    return {
        "dataset_type": options.dataset_name,
        "dataset_name": title,
        "dataset_config": options.dataset_config,
        "dataset_split": options.dataset_split,
        "dataset_revision": options.dataset_revision,
    }


def _print(report: dict[str, Any]) -> None:
    parts = [
        f"{report['model']} on {report['dataset']}: {describe_images(report)}",
        ways_table(report),
        describe_left_out(report),
        f"The worst classes ({PAGE} has all):\n\n{classes_table(report, [ANSWER], NUM_PRINTED)}",
    ]
    if report["confused_pairs"]:
        parts.append(f"Most confused, by {report['ways'][ANSWER]['title']}:\n\n{pairs_table(report, NUM_PRINTED)}")
    print("\n\n".join(filter(None, parts)))
