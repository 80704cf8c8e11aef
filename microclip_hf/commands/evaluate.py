"""`microclip evaluate`: a model + images with labels -> how well each way of predicting does, and where it fails."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers.hf_argparser import HfArg

from ..configuration_microclip import MicroCLIPConfig
from ..data.class_names import read_class_names
from ..data.labels import labelled
from ..data.photo_sources import digest
from ..evaluation.page import (
    PAGE,
    PICTURE,
    RESULTS,
    check_results_dir,
    classes_table,
    describe_images,
    describe_left_out,
    pairs_table,
    ways_table,
    write_results,
)
from ..evaluation.predictions import (
    ANSWER,
    EvaluationSettings,
    PlainCLIP,
    Predictions,
    predict_all_ways,
    remove_parts,
)
from ..evaluation.results import EvaluationFacts, make_report
from ..hub.card_evaluation import add_results, read_card
from ..hub.model_card import hub_id
from ..images import NUM_CROPS
from ..loading import load_adapted, load_clip, read_config, read_model_type
from ..modeling_microclip import MicroCLIPForImageClassification
from ..text_heads import encode_heads
from . import command_frame, read_options
from .options import ImageOptions, start_processes


NUM_PRINTED = 5  # rows of a table
NEEDS_CLIP = "it needs the CLIP that was adapted (--clip)"


@dataclass
class EvaluateArguments(ImageOptions):
    """The model, the images with labels, and what to compare with."""

    model_name_or_path: str = HfArg(help="An adapted model, or a CLIP (then with --class_names): Hub id or folder.")
    output_dir: str = HfArg(help=f"Folder for {RESULTS}, {PAGE} and {PICTURE}.")
    clip: str | None = HfArg(
        default=None,
        help="For an adapted model: the CLIP to compare it with, Hub id or folder; it reads the texts.",
    )
    num_crops: int = HfArg(default=NUM_CROPS, help="Crops of an image, each a forward pass; 0 leaves that way out.")
    batch_size: int = HfArg(default=64, help="Images at once.")
    num_workers: int | None = HfArg(
        default=None,
        help="Processes that read images, for each that classifies; 0 reads them in threads. Default: 0 on a CPU, "
        "beside a GPU on Linux all cores but one, up to 16.",
    )
    device: str | None = HfArg(default=None, help="As torch calls it. Default: a GPU if there is one.")
    seed: int = HfArg(default=0, help="Of crops and intervals.")
    all: bool = HfArg(
        default=False,
        help=f"Show every way to predict, also with parts of the model. {RESULTS} always has them. Default: CLIP with "
        "names, CLIP with descriptions and the model.",
    )
    update_card: bool = HfArg(
        default=False, help="Also write the results into the card, README.md, of the adapted model's folder."
    )


@dataclass(frozen=True)
class Subject:
    """What is measured: the model, what it is compared with, and how ways are called or why they are left out."""

    model: MicroCLIPForImageClassification
    plain: PlainCLIP | None
    titles: dict[str, str]
    left_out: dict[str, str]


@command_frame("evaluate", "give the same command again")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, load the model, predict in every way, and write and print what was found."""
    description = (
        f"{__doc__} Interrupted, the same command goes on. `accelerate launch examples/evaluate_model.py` does the "
        "same with several processes."
    )
    (options,) = read_options("evaluate", description, EvaluateArguments, arguments)
    _check_options(options)
    state, device = start_processes(options.device)
    if not state.is_main_process:
        warnings.simplefilter("ignore")  # the first process tells
    is_adapted = read_model_type(options.model_name_or_path) == MicroCLIPConfig.model_type
    class_names = _read_classes(options, is_adapted)
    overrides = options.read_overrides()
    # A card that can't be written is known before anything is computed.
    card = read_card(options.model_name_or_path) if options.update_card else None
    texts, dataset, num_unlabelled = _read_input(options, class_names)
    subject = _load_adapted(options, texts) if is_adapted else _load_plain(options, texts, overrides)
    subject.model.to(device)
    if subject.plain is not None:
        subject.plain.model.to(device)
    settings = EvaluationSettings(
        options.num_crops, seed=options.seed, batch_size=options.batch_size, num_workers=options.num_workers
    )
    predictions = predict_all_ways(subject.model, dataset, subject.plain, settings, options.output_dir)
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()
    if predictions is not None:
        _finish(options, predictions, _facts(options, texts["class_names"], subject, num_unlabelled), card)


def _check_options(options: EvaluateArguments) -> None:
    """What can be wrong without reading anything."""
    for name, lowest in (("num_crops", 0), ("num_workers", 0), ("seed", 0), ("batch_size", 1)):
        value = vars(options)[name]
        if value is not None and value < lowest:
            raise ValueError(f"--{name} is {value}; it must be {lowest} or more.")
    check_results_dir(options.output_dir, "--output_dir")
    options.check("test")
    if options.test_dir is not None:
        output_dir = Path(os.path.realpath(options.output_dir))
        if output_dir.is_relative_to(os.path.realpath(options.test_dir)):
            raise ValueError(
                f"--output_dir {options.output_dir} lies in --test_dir {options.test_dir}, where {PICTURE} would "
                "count as a photo; choose a folder outside."
            )


def _read_classes(options: EvaluateArguments, is_adapted: bool) -> list[str] | None:
    """The class names (`None`: the preset's); options that such a model doesn't take are refused."""
    source = options.model_name_or_path
    config = read_config(source)
    if is_adapted:
        refused = {"class_names": "its classes are its own", "config_overrides": "its architecture is its own"}
        without_clip = "only a CLIP reads them; pass it with --clip, to compare with"
        if options.clip is None:
            refused["descriptions"] = without_clip
        if options.clip is None and not config.keep_text_model:
            refused["templates"] = without_clip
    else:
        refused = {"clip": "it is compared with itself", "update_card": "only an adapted model's card is written"}
    for name, reason in refused.items():
        if vars(options)[name]:
            kind = "an adapted model" if is_adapted else "a CLIP"
            raise ValueError(f"--{name} doesn't go with {source}, {kind}: {reason}.")
    if options.clip is not None:  # it is loaded late, and checked here
        read_model_type(options.clip)
        read_config(options.clip)
    if is_adapted:
        return config.class_names
    if options.class_names is not None:
        return read_class_names(options.class_names)
    if options.preset is None:
        raise ValueError(f"{source} is a CLIP; pass the names of the classes with --class_names, or with --preset.")
    return None


def _read_input(options: EvaluateArguments, class_names: list[str] | None) -> tuple[dict[str, Any], Dataset, int]:
    """What a CLIP's heads are made of, the images that have a label, and how many haven't."""
    preset = options.apply_preset(options.test_dir, test_split=options.dataset_split)
    if options.test_dir is None:
        options.dataset_split = preset.test_split if preset is not None else options.dataset_split or "test"
    if class_names is None:
        dataset = options.read_images("test", preset, None, labels_required=True)
        texts = options.read_texts(dataset.features["label"].names)
    else:  # images may take long to read, and what is wrong with the texts is known before
        texts = options.read_texts(class_names)
        dataset = options.read_images("test", preset, class_names, labels_required=True)
    indices = labelled(dataset)
    return texts, dataset.select(indices), len(dataset) - len(indices)


def _load_plain(options: EvaluateArguments, texts: dict[str, Any], overrides: dict[str, Any]) -> Subject:
    """A CLIP, and the microCLIP that it would start as."""
    model, heads = load_clip(options.model_name_or_path, texts, overrides)
    plain = PlainCLIP(model, heads, _digest_texts(texts))
    return Subject(model, plain, {ANSWER: "microCLIP, not adapted"}, _without_descriptions(texts))


def _load_adapted(options: EvaluateArguments, texts: dict[str, Any]) -> Subject:
    """A saved microCLIP, and the CLIP to compare it with."""
    model = load_adapted(options.model_name_or_path)
    if options.clip is not None:
        # The prior's weighting has no part in CLIP's own heads.
        clip, heads = load_clip(options.clip, texts, {"prior_weighting": "uniform"})
        return Subject(model, PlainCLIP(clip, heads, _digest_texts(texts)), {}, _without_descriptions(texts))
    left_out = {"cupl": f"{NEEDS_CLIP}, and --descriptions"}
    if model.tokenizer is None:
        return Subject(model, None, {}, {"zero_shot": NEEDS_CLIP, **left_out})
    head, _ = encode_heads(model.clip, model.tokenizer, texts["class_names"], texts["templates"])
    titles = {"zero_shot": "[CLS] as adapted, with the class names"}
    plain = PlainCLIP(model, {"zero_shot": head}, _digest_texts(texts), is_adapted=True)
    return Subject(model, plain, titles, left_out)


def _digest_texts(texts: dict[str, Any]) -> str:
    return digest([json.dumps(texts, sort_keys=True)])


def _without_descriptions(texts: dict[str, Any]) -> dict[str, str]:
    """Why the descriptions' way is left out, if it is."""
    return {"cupl": "it needs --descriptions"} if texts["descriptions"] is None else {}


def _facts(
    options: EvaluateArguments, class_names: Sequence[str], subject: Subject, num_unlabelled: int
) -> EvaluationFacts:
    no_crops = {"multi_crop": "--num_crops is 0"} if options.num_crops == 0 else {}
    names = ("clip", "descriptions", "templates", "config_overrides", "num_crops", "preset", "dataset_revision")
    settings = {name: vars(options)[name] for name in names}
    return EvaluationFacts(
        model=options.model_name_or_path,
        dataset=_dataset_title(options),
        class_names=class_names,
        titles=subject.titles,
        left_out=subject.left_out | no_crops,
        num_unlabelled=num_unlabelled,
        settings={name: value for name, value in settings.items() if value is not None},
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


def _finish(
    options: EvaluateArguments, predictions: Predictions, facts: EvaluationFacts, card: ModelCard | None
) -> None:
    """Write and print what was found."""
    report = make_report(predictions, facts, options.seed)
    write_results(options.output_dir, report, predictions, options.all)
    if card is not None:
        add_results(card, options.model_name_or_path, report, options.all, **_dataset_facts(options))
    remove_parts(options.output_dir)
    _print(report, options.all)
    print(f"\nSaved to {options.output_dir}: {RESULTS}, {PAGE}, {PICTURE}.")
    if card is not None:
        print(f"Added to the card: {Path(options.model_name_or_path, 'README.md')}")


def _print(report: dict[str, Any], show_all: bool) -> None:
    parts = [
        f"{report['model']} on {report['dataset']}: {describe_images(report)}",
        ways_table(report, show_all),
        describe_left_out(report, show_all),
        f"The worst classes ({PAGE} has all):\n\n{classes_table(report, [ANSWER], NUM_PRINTED)}",
    ]
    if report["confused_pairs"]:
        parts.append(f"Most confused, by {report['ways'][ANSWER]['title']}:\n\n{pairs_table(report, NUM_PRINTED)}")
    print("\n\n".join(filter(None, parts)))
