"""The card that a saved model brings along: what it is, how it was made, what it reached."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..configuration_microclip import MicroCLIPConfig
from ..files import write_whole
from ..run_names import ACCURACIES
from ..training.training_args import MicroCLIPTrainingArguments
from .push import CARD, PICTURE


METRIC_TITLES = {
    "top5_accuracy": "top-5 accuracy",
    "mean_class_accuracy": "mean accuracy per class",
    "harmonic_mean": "harmonic mean of the classes' accuracies",
    "expected_calibration_error": "expected calibration error",
}
# Whether a setting is of training alone, and has no effect on a class mixture.
SETTINGS = {
    "recipe": False,
    "num_train_epochs": False,
    "max_steps": True,
    "per_device_train_batch_size": True,
    "gradient_accumulation_steps": True,
    "world_size": True,
    "learning_rate": True,
    "weight_decay": True,
    "num_crops": False,
    "crop_ratio": False,
    "prior_ratio": False,
    "label_fusion_ratio": True,
    "prior_refresh": True,
    "distribution_alignment": True,
    "class_mixture": False,
    "label_refresh": True,
    "class_frequencies": False,
    "autocast_pseudo_labels": False,
    "fairness_weight": True,
    "seed": False,
}
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
TEMPLATE = Path(__file__).with_name("model_card_template.md")


@dataclass
class CardFacts:
    """What a Trainer can't know by itself."""

    base_model: str | None = None  # the CLIP that was adapted, a Hub id or a folder
    dataset: str | None = None  # the images adapted to, a Hub id or a folder
    license: str | None = None  # of the adapted model, as the Hub calls it
    language: str | None = None  # of names and descriptions, as the Hub calls it
    test_dataset: str | None = None  # what the results were measured on
    # Fractions by the names in `ACCURACIES` and, as `adapted_*`, in `METRIC_TITLES`.
    results: dict[str, float] = field(default_factory=dict)
    descriptions: str | None = None  # the file in the output folder with the sentences about the classes
    undescribed: list[str] = field(default_factory=list)  # classes without sentences, where others have some
    verdict: str | None = None  # how the run went, see `microclip_hf.verdict`


def write_model_card(
    config: MicroCLIPConfig, args: MicroCLIPTrainingArguments, facts: CardFacts, num_images: int | None
) -> None:
    """Write `README.md` into the output folder, with a picture that lies there; of a stream `num_images` is `None`."""
    folder = Path(args.output_dir)
    results = facts.results
    model_id = args.hub_model_id or os.path.basename(os.path.abspath(folder))
    rows = [(title, f"{100 * results[key]:.1f}") for key, title in ACCURACIES.items() if key in results]
    metrics = [
        f"{title} {100 * results[f'adapted_{key}']:.1f}"
        for key, title in METRIC_TITLES.items()
        if f"adapted_{key}" in results
    ]
    card = ModelCard.from_template(
        _metadata(facts, model_id, args),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=model_id.split("/")[-1],
        source=_quote(args.hub_model_id or os.path.abspath(folder)),
        base_model=_link(facts.base_model, "https://huggingface.co/"),
        verdict=facts.verdict,
        num_images=num_images,
        num_classes=config.num_labels,
        classes=", ".join(config.class_names),
        results=rows,
        metrics=", ".join(metrics),
        picture=PICTURE if (folder / PICTURE).exists() else None,
        caption=_caption(args, rows),
        settings=_settings(config, args, facts),
    )
    save_card(card, folder)


def keep_card(folder: str | os.PathLike) -> None:
    """Give a card that somebody else wrote, or edited, another name: `README.old.md`, or `README.old-2.md`, ..."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (Path(folder, f"README.old{number}.md") for number in numbers)
    Path(folder, CARD).replace(next(name for name in names if not name.exists()))


def save_card(card: ModelCard, folder: Path) -> None:
    """Write `README.md` as a whole or not at all."""
    write_whole(folder / CARD, str(card))


def _metadata(facts: CardFacts, model_id: str, args: MicroCLIPTrainingArguments) -> ModelCardData:
    dataset = hub_id(facts.dataset)
    measured_on = hub_id(facts.test_dataset)
    prefix = "adapted_"
    metrics = {name.removeprefix(prefix): facts.results[name] for name in facts.results if name.startswith(prefix)}
    results = eval_results(
        metrics, dataset_type=measured_on or "imagefolder", dataset_name=measured_on or "test images"
    )
    return ModelCardData(
        base_model=hub_id(facts.base_model),
        datasets=[dataset] if dataset else None,
        language=facts.language,
        library_name="transformers",
        license=facts.license,
        pipeline_tag="image-classification",
        tags=["microclip"],
        model_name=model_id.split("/")[-1],
        eval_results=results or None,
    )


def eval_results(metrics: Mapping[str, float], **dataset: Any) -> list[EvalResult]:
    """`accuracy` and the metrics in `METRIC_TITLES`, in the Hub's form; `dataset_name` and the like say on what."""
    return [
        EvalResult(task_type="image-classification", metric_type=name, metric_value=metrics[name], **dataset)
        for name in ("accuracy", *METRIC_TITLES)
        if name in metrics
    ]


def run_settings(config: MicroCLIPConfig, args: MicroCLIPTrainingArguments) -> list[tuple[str, Any]]:
    """Those of the run, and of architecture where they aren't the defaults."""
    left_out = {name for name, is_of_training in SETTINGS.items() if is_of_training and args.trains_nothing}
    if args.recipe is None:
        left_out.add("recipe")
    if args.max_steps < 0:
        left_out.add("max_steps")  # epochs are counted in its place
    settings = {name: getattr(args, name) for name in SETTINGS if name not in left_out}
    default = MicroCLIPConfig()
    architecture = {name: getattr(config, name) for name in config.architecture_names()}
    changed = {name: value for name, value in architecture.items() if value != getattr(default, name)}
    return [*settings.items(), *changed.items()]


def _caption(args: MicroCLIPTrainingArguments, accuracies: Sequence[Any]) -> str:
    """What the picture shows."""
    if not args.trains_nothing:
        return "Curves of the training, and images before and after"
    return "Accuracies, and images before and after" if accuracies else "Images before and after"


def versions() -> str:
    """Of the libraries that a run depends on."""
    return f"microclip_hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"


def _settings(config: MicroCLIPConfig, args: MicroCLIPTrainingArguments, facts: CardFacts) -> list[tuple[str, Any]]:
    settings = run_settings(config, args)
    if facts.dataset:
        settings.append(("images", _link(facts.dataset, "https://huggingface.co/datasets/")))
    if facts.descriptions:
        digest = hashlib.sha256(Path(args.output_dir, facts.descriptions).read_bytes()).hexdigest()
        settings.append(("descriptions", f"[{facts.descriptions}]({facts.descriptions}), SHA-256 {digest}"))
    return [*settings, ("versions", versions())]


def _quote(source: str) -> str:
    """A Hub id or a folder as Python's text; a whole path, so that the card's code runs from anywhere."""
    return json.dumps(source, ensure_ascii=False)


def _link(source: str | None, hub: str) -> str | None:
    """A Hub id as a link; a folder by its name alone."""
    if source is None or hub_id(source):
        return source and f"[{source}]({hub}{source})"
    return f"`{os.path.basename(os.path.abspath(source))}`"


def hub_id(source: str | None) -> str | None:
    """The source where it is one of the Hub's, `name` or `user/name`, and no file or folder here."""
    return source if source and re.fullmatch(HUB_ID, source) and not os.path.exists(source) else None


def split_results(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of a Trainer's metrics that a card shows."""
    names = {*ACCURACIES, *(f"adapted_{name}" for name in METRIC_TITLES)}
    return {name: value for name, value in metrics.items() if name in names}
