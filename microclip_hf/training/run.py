"""A whole run: CLIP measured, the model adapted, saved, measured, and all that its folder holds for people."""

import contextlib
import functools
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import pipeline
from transformers.trainer_utils import PredictionOutput, get_last_checkpoint, has_length, speed_metrics
from transformers.utils import CONFIG_NAME

from ..data.labels import labelled
from ..descriptions.files import save_descriptions
from ..evaluation.predictions import EvaluationSettings, PlainCLIP, predict_all_ways
from ..explain.explanation import Explanation, explain
from ..files import check_writable
from ..hub.model_card import CardFacts, split_results
from ..hub.push import DESCRIPTIONS, PICTURE
from ..images import UNREADABLE, cut_strip, decode, to_rgb
from ..metrics import classification_metrics
from ..modeling_microclip import MicroCLIPForImageClassification
from ..plots import plot_adaptation
from ..report.page import write_report
from ..report.record import write_record
from ..run_names import REPORT, accuracy_line
from ..text_heads import match_descriptions
from ..verdict import Verdict, judge
from .checks import check_unused
from .cost import describe_cost
from .mixing import FEATURES_DIR
from .trainer import MicroCLIPTrainer
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewDataset, ViewStream


NUM_SHOWN = 8  # images in the picture, before and after


def adapt(
    model: MicroCLIPForImageClassification,
    train_dataset: Any,
    args: MicroCLIPTrainingArguments,
    test_dataset: Dataset | None = None,
    clip_heads: Mapping[str, torch.Tensor] | None = None,
    descriptions: Mapping[str, list[str]] | None = None,
    facts: CardFacts | None = None,
    report: bool = True,
) -> dict[str, float]:
    """What `microclip adapt` does once it has read its input, with the same files in `args.output_dir`.

    Plain CLIP is measured; the model is adapted, saved, measured, and pushed where `args.push_to_hub` says so. Ctrl-C
    in training ends in a `KeyboardInterrupt` that says how to go on.

    Args:
        model, train_dataset: as [`MicroCLIPTrainer`] takes them.
        args ([`MicroCLIPTrainingArguments`]): settings; `resume_from_checkpoint` is `True` or a checkpoint's folder.
        test_dataset (`Dataset`, *optional*): `image` and `label`, which only measures.
        clip_heads (`Mapping[str, torch.Tensor]`, *optional*): see [`measure_clip`]; [`load_clip`] makes them.
        descriptions (`Mapping[str, list[str]]`, *optional*): the sentences that heads were made of, to be saved too.
        facts, report: for the card, which gets the results by itself, and whether to write `report.html`.

    Returns:
        `dict[str, float]`: shares of test images, as in `eval_results.json`.

    Raises:
        ValueError: see [`check_output`] and [`MicroCLIPTrainer`]; if the test images have no labels.

    Example:
    ```python
    model = MicroCLIPForImageClassification.from_clip("openai/clip-vit-base-patch32", class_names)
    adapt(model, load_image_folder("photos", class_names), MicroCLIPTrainingArguments("adapted"))
    ```
    """
    _check_labels(test_dataset)
    checkpoint = check_output(args)
    trainer = MicroCLIPTrainer(model=model, args=args, train_dataset=train_dataset, eval_dataset=test_dataset)
    trainer.check_run(checkpoint)
    undescribed = _find_undescribed(model.config.class_names, descriptions)
    examples = _spread(trainer)
    if trainer.is_world_process_zero():
        _announce(trainer, train_dataset, len(descriptions or ()), examples if checkpoint is None else [])
    results = measure_clip(trainer, clip_heads or {})
    before = _explain(model, examples)
    metrics = _train(trainer, checkpoint)
    try:
        tested = _save_and_measure(trainer, metrics, results)
        trainer.card_facts = replace(facts or trainer.card_facts, results=dict(results), undescribed=undescribed)
        trainer.card_facts.verdict = str(_judge(trainer))
        if trainer.is_world_process_zero():
            if descriptions is not None:
                save_descriptions(Path(args.output_dir, DESCRIPTIONS), descriptions.items())
                trainer.card_facts.descriptions = DESCRIPTIONS
            _show(trainer, tested, examples, before, report)
        pushed = trainer.push_to_hub() if args.push_to_hub else None
        if pushed is not None:
            print(f"Pushed to {pushed}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"training is over, and what is complete lies in {args.output_dir}") from None
    finally:
        # A process that exits before its connections end may be aborted.
        trainer.leave_group()
    return results


def _check_labels(test_dataset: Any) -> None:
    """Images without labels measure nothing, and of a stream processes can't take their shares."""
    if test_dataset is None or (isinstance(test_dataset, Dataset) and "label" in test_dataset.column_names):
        return
    raise ValueError(
        f"test_dataset is a {type(test_dataset).__name__}; pass a datasets.Dataset with columns image and label."
    )


def check_output(args: MicroCLIPTrainingArguments) -> str | None:
    """The checkpoint to go on from, if any; an error if it is missing, or `output_dir` isn't this run's to write."""
    folder = args.output_dir
    check_writable(folder, "`output_dir`")
    newest = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    checkpoint = args.resume_from_checkpoint or None  # `False` is none either
    if checkpoint is True:
        if newest is None:
            raise ValueError(f"`resume_from_checkpoint` true, but {folder} holds no checkpoint; leave it out.")
        return newest
    if checkpoint is not None:
        if not os.path.isdir(checkpoint):
            raise ValueError(f"`resume_from_checkpoint` {checkpoint}: there is no such folder; pass a checkpoint's.")
        return checkpoint
    if newest or os.path.exists(os.path.join(folder, CONFIG_NAME)):
        advice = ", or continue that run with `resume_from_checkpoint` true" if newest else ""
        raise ValueError(f"`output_dir` {folder} already holds a model. Choose another folder{advice}.")
    check_unused(folder)
    return None


def measure_clip(trainer: MicroCLIPTrainer, heads: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Accuracies of plain CLIP on `trainer.eval_dataset`, of which each process classifies its share; all are logged.

    To be done before training, while [CLS] is CLIP's; in float32, whatever the run trains in. The `heads`, class
    vectors `(num_classes, embed_dim)` as `zero_shot` and `cupl`, give `<name>_accuracy` each; where no image has a
    label, nothing.
    """
    if trainer.eval_dataset is None or not heads:
        return {}
    args = trainer.args
    start = time.time()
    # Read once: the adapted model is measured on the same selection.
    dataset = trainer.eval_datasets.prepare(trainer.eval_dataset)
    share = dataset.select(labelled(dataset)[args.process_index :: args.world_size])
    settings = EvaluationSettings(
        num_crops=0,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        progress=trainer.is_world_process_zero() and not args.disable_tqdm,
    )
    # With fewer images than processes some have none.
    parts = [predict_all_ways(None, share, PlainCLIP(trainer.model, heads), settings)] if len(share) else []
    parts = gather_object(parts)
    results = {}
    for name in heads if parts else ():
        labels = np.concatenate([part.labels for part in parts])
        logits = np.concatenate([part.logits[name] for part in parts])
        loss = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        metrics = {"loss": loss, **classification_metrics(logits, labels)}
        metrics = {f"{name}_{metric}": value for metric, value in metrics.items()}
        num_steps = math.ceil(len(labels) / (args.eval_batch_size * args.world_size))
        trainer.log(metrics | speed_metrics(name, start, len(labels), num_steps))
        results |= split_results(metrics)
    return results


def _spread(trainer: MicroCLIPTrainer) -> list[dict[str, Any]]:
    """A few readable images from all over those with labels, else those adapted to, or the first ones of a stream."""
    dataset = trainer.eval_dataset
    if dataset is None:
        # What holds views needn't hold images.
        made_of_images = isinstance(trainer.train_dataset, (ViewDataset, ViewStream))
        dataset = trainer.train_dataset.dataset if made_of_images else []
    if has_length(dataset):
        # Files of a class often lie side by side.
        step = max(1, len(dataset) // NUM_SHOWN)
        fetches = (functools.partial(dataset.__getitem__, index) for index in range(0, len(dataset), step))
    else:
        fetches = (functools.partial(dict, example) for example in dataset)
    readable = []
    for fetch in fetches:
        with contextlib.suppress(*UNREADABLE):
            example = fetch()
            readable.append({**example, "image": to_rgb(decode(example["image"]))})
        if len(readable) == NUM_SHOWN:
            break
    return readable


def _explain(model: MicroCLIPForImageClassification, examples: list[dict[str, Any]]) -> list[Explanation]:
    """For the picture of the run, which is drawn without images where an unusual image processor forbids."""
    try:
        return explain(model, [example["image"] for example in examples])
    except ValueError as error:
        warnings.warn(f"{PICTURE} will show no images, since they can't be explained: {error}", stacklevel=2)
        return []


def _train(trainer: MicroCLIPTrainer, checkpoint: str | None) -> dict[str, float]:
    """What training says of itself; where it is interrupted, how to go on."""
    folder = trainer.args.output_dir
    try:
        return trainer.train(resume_from_checkpoint=checkpoint).metrics
    except KeyboardInterrupt:
        newest = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        advice = f"with `resume_from_checkpoint` true the same command goes on from {newest}"
        if newest is None:
            has_features = os.path.isdir(os.path.join(folder, FEATURES_DIR))
            advice = "there is no checkpoint yet"
            advice += ", and the same command goes on with the features that are done" if has_features else ""
        raise KeyboardInterrupt(advice) from None


def _save_and_measure(
    trainer: MicroCLIPTrainer, metrics: dict[str, float], results: dict[str, float]
) -> PredictionOutput | None:
    """What the adapted model says of the images with labels, if any; how often it is right goes into the results."""
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is None:
        return None
    tested = trainer.predict(trainer.eval_dataset, metric_key_prefix="adapted")
    trainer.log(tested.metrics)
    results |= split_results(tested.metrics)
    trainer.save_metrics("eval", results)
    line = accuracy_line(results)
    if line and trainer.is_world_process_zero():
        print(f"Right on the test images: {line}")
    return tested


def _announce(trainer: MicroCLIPTrainer, dataset: Any, num_described: int, examples: list[dict[str, Any]]) -> None:
    """Say what will be done, and with `examples` how long it will take."""
    count = len(dataset) if has_length(dataset) else "a stream of"
    print(f"Adapting to {count} images of {trainer.model.num_labels} classes, {num_described} of them described.")
    cost = describe_cost(trainer, examples) if examples else None
    if cost is not None:
        print(cost)


def _find_undescribed(class_names: list[str], descriptions: Mapping[str, list[str]] | None) -> list[str]:
    """Classes without descriptions, where others have some; an error where descriptions are of other classes."""
    matched = match_descriptions(class_names, descriptions or None)
    missing = [name for name, own in zip(class_names, matched, strict=True) if own is None]
    return missing if len(missing) < len(class_names) else []


def _judge(trainer: MicroCLIPTrainer) -> Verdict:
    facts = trainer.card_facts
    class_names = trainer.model.config.class_names
    counts = trainer.diagnostics.class_counts
    return judge(class_names, counts, trainer.state.log_history, facts.results, facts.undescribed)


def _show(
    trainer: MicroCLIPTrainer,
    tested: PredictionOutput | None,
    examples: list[dict[str, Any]],
    before: list[Explanation],
    report: bool,
) -> None:
    """Picture, card, the labels of the images and their page, and what the saved model says of the first example."""
    folder = Path(trainer.args.output_dir)
    picture = folder / PICTURE
    # Not the trainer's model, which may be split over processes.
    adapted = MicroCLIPForImageClassification.from_pretrained(folder)
    after = explain(adapted, [explanation.image for explanation in before])
    labels = [example.get("label") for example in examples]
    plot_adaptation(picture, trainer.curves, trainer.card_facts.results, before, after, labels)
    trainer.create_model_card()
    try:
        write_record(trainer, tested)
        if report:
            write_report(folder, trainer.train_dataset)
    except Exception as error:  # whatever it is, the run is no less finished
        warnings.warn(
            f"The run is saved, but not its report: {error!r}. 'microclip report {folder}' tries again.", stacklevel=2
        )
    if examples:
        _show_prediction(trainer.args.output_dir, examples[0]["image"])
    pages = [page for page in (picture, folder / REPORT) if page.exists()]
    print(f"Look at what was learned: {', '.join(map(str, pages))}")
    print(trainer.card_facts.verdict)


def _show_prediction(folder: str, image: Any) -> None:
    """Reload the saved model as a user would."""
    classify = pipeline("image-classification", model=folder, top_k=3)
    print(f"Saved to {folder}. The saved model says of the first image:")
    for prediction in classify(cut_strip(image)):
        print(f"  {prediction['score']:6.1%}  {prediction['label']}")
