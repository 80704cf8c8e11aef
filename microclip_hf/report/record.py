"""What a finished run leaves in its folder about its images, for their owner and for the report."""

import csv
import datetime
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PredictionOutput
from transformers.utils import CONFIG_NAME

from ..data.image_columns import image_names
from ..data.labels import read_labels
from ..files import parse_json, read_text, write_whole
from ..hub.model_card import run_settings, versions
from ..run_names import FACTS, LABELS, REPORT, REPORT_DIR
from ..text_heads import abbreviate
from ..training.view_datasets import ViewDataset


SWAPS = os.path.join(REPORT_DIR, "swaps.csv")
TEST_LABELS = os.path.join(REPORT_DIR, "test_labels.csv")
FACT_NAMES = ("model", "images", "num_images", "root", "settings", "versions", "finished", "results")
LABEL_COLUMNS = ("file", "label", "confidence", "changes", "truth")  # the last where a true class is known
SWAP_COLUMNS = ("old", "new", "count")


@dataclass(frozen=True)
class ImageLabel:
    """What a run says of one image."""

    file: str  # what the image is called, empty where it has no name
    label: str  # its class, empty where it has none: it wasn't seen, or can't be read
    confidence: float = math.nan  # the label's probability, NaN where it isn't known
    changes: int = 0  # how often it had another label than an epoch before
    truth: str = ""  # its true class, empty where that isn't known


@dataclass(frozen=True)
class RunRecord:
    """All that a run's folder knows of it; what isn't there is empty."""

    class_names: list[str]
    log_history: list[dict[str, float]]  # the Trainer's
    results: dict[str, float]  # measured with labels, by the names of a card's
    images: list[ImageLabel]  # adapted to, in the data set's order
    tests: list[ImageLabel]  # test images, as the adapted model labels them
    swaps: list[tuple[str, str, int]]  # old class, new class, and how often
    # By `FACT_NAMES`, and what earlier versions didn't write: `undescribed`, `frequencies` and `absent`. `root` is of
    # the images' relative paths, `None` where they aren't files.
    facts: dict[str, Any]
    num_steps: int  # of training

    @property
    def has_mixture(self) -> bool:
        """Whether the labels at the end are a class mixture's."""
        return "frequencies" in self.facts

    @property
    def settings(self) -> dict[str, str]:
        """By name, as the page shows them; empty where the folder has no record of them."""
        return dict(self.facts.get("settings", ()))

    @property
    def has_fixed_labels(self) -> bool:
        """Whether the labels that taught were made once, before training."""
        return self.num_steps > 0 and self.settings.get("label_refresh") == "never"

    @property
    def can_change(self) -> bool:
        """Whether an image's label could become another: not without training, and labels that were made once change
        only where training was kept.
        """
        was_taken_back = any(entry.get("training_was_kept") == 0 for entry in self.log_history)
        return self.num_steps > 0 and not (self.has_fixed_labels and was_taken_back)


def write_record(trainer: Trainer, tested: PredictionOutput | None = None) -> None:
    """Write `pseudo_labels.csv`, and what else the report needs, into the output folder, on the main process alone.

    Args:
        trainer ([`MicroCLIPTrainer`]): after training, `save_state` and, for the facts, `card_facts`.
        tested (`PredictionOutput`, *optional*): of `trainer.predict(trainer.eval_dataset)`.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    class_names = trainer.model.config.class_names
    dataset = images_of(trainer.train_dataset)
    files, root = _name_images(dataset, trainer.card_facts.dataset)
    (folder / REPORT_DIR).mkdir(exist_ok=True)
    # Those of an earlier run, which this one went on from, wouldn't all be written over.
    for name in (REPORT, LABELS, TEST_LABELS):
        (folder / name).unlink(missing_ok=True)
    facts = _collect_facts(trainer, root)
    write_whole(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False))
    seen = trainer.diagnostics
    if len(seen.pseudo_labels):
        truths = _true_labels(dataset)
        _write_labels(folder / LABELS, class_names, files, seen.pseudo_labels, seen.confidences, seen.changes, truths)
    swaps = [(class_names[old], class_names[new], count) for old, new, count in seen.swaps.tolist()]
    _write_csv(folder / SWAPS, pd.DataFrame(swaps, columns=SWAP_COLUMNS, dtype=object))
    if tested is not None:
        test_dataset = trainer.eval_datasets.prepare(trainer.eval_dataset)
        test_files, _ = _name_images(test_dataset, trainer.card_facts.test_dataset)
        probabilities = torch.tensor(tested.predictions).float().softmax(-1)
        test_files = test_files[: len(probabilities)]  # a last batch may have been dropped
        labels = probabilities.argmax(-1)
        changes = torch.zeros_like(labels)
        truths = [] if tested.label_ids is None else tested.label_ids.tolist()
        _write_labels(folder / TEST_LABELS, class_names, test_files, labels, probabilities.amax(-1), changes, truths)


def images_of(train_dataset: Any) -> Any:
    """The data set below a trainer's views; `None` where they are views themselves, or a stream."""
    return train_dataset.dataset if isinstance(train_dataset, ViewDataset) else None


def read_record(folder: str | os.PathLike) -> RunRecord:
    """What lies in a run's folder; an error where it is no run's, or not as `write_record` wrote it."""
    folder = Path(folder)
    for name in (TRAINER_STATE_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; pass the `output_dir` of a finished `microclip adapt`.")
    try:
        id2label = _read_json(folder / CONFIG_NAME)["id2label"]
        class_names = [id2label[key] for key in sorted(id2label, key=int)]
        state = _read_json(folder / TRAINER_STATE_NAME)
        log_history = [dict(entry) for entry in state["log_history"]]
        num_steps = int(state["global_step"])
        facts = _read_json(folder / FACTS)
        results = {name: float(value) for name, value in facts["results"].items()} if facts else {}
        missing = set(FACT_NAMES) - facts.keys()
        if facts and missing:
            raise ValueError(f"{folder / FACTS} lacks {', '.join(sorted(missing))}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} isn't as the run left it: {error!r}. Take the files from a copy of it.") from error
    return RunRecord(
        class_names=class_names,
        log_history=log_history,
        results=results,
        images=_read_labels(folder / LABELS, class_names),
        tests=_read_labels(folder / TEST_LABELS, class_names),
        swaps=[(old, new, int(count)) for old, new, count in _read_csv(folder / SWAPS, SWAP_COLUMNS)],
        facts=facts,
        num_steps=num_steps,
    )


def _name_images(dataset: Any, source: str | None) -> tuple[list[str], str | None]:
    """What the images are called, and the folder that these names are relative to, `None` where they aren't files.

    Files that all lie in the folder `source` are called as `microclip predict` calls them, relative to it. Otherwise
    they are called as they were given, perhaps relative to the folder of this process.
    """
    names, are_files = image_names(dataset)
    if not are_files:
        return names, None
    root = os.path.abspath(source or os.curdir)
    paths = [Path(os.path.abspath(name)) for name in names]
    if source is None or not all(path.is_relative_to(root) for path in paths):
        return names, os.getcwd()
    return [path.relative_to(root).as_posix() for path in paths], root


def _collect_facts(trainer: Trainer, root: str | None) -> dict[str, Any]:
    model = trainer.card_facts.base_model
    return {
        # A folder's whole path, which stays true elsewhere.
        "model": os.path.abspath(model) if model is not None and os.path.exists(model) else model,
        "images": trainer.card_facts.dataset,
        "num_images": trainer.num_images,
        "root": root,
        "settings": [(name, str(value)) for name, value in run_settings(trainer.model.config, trainer.args)],
        "versions": versions(),
        "finished": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "results": trainer.card_facts.results,
        "undescribed": trainer.card_facts.undescribed,
        **_describe_mixture(trainer),
    }


def _describe_mixture(trainer: Trainer) -> dict[str, Any]:
    """The class mixture's frequencies with their standard errors, and the classes of which there is probably no image;
    nothing where none was fitted.

    Where frequencies were given, they are the mixture's own count all the same.
    """
    mixture = trainer.mixture
    if mixture is None:
        return {}
    class_names = trainer.model.config.class_names
    shares = mixture.counts / mixture.counts.sum()
    pairs = torch.stack([shares, mixture.frequency_errors], -1).tolist()
    absent = [name for name, is_absent in zip(class_names, mixture.is_absent.tolist(), strict=True) if is_absent]
    return {"frequencies": dict(zip(class_names, pairs, strict=True)), "absent": absent}


def _true_labels(dataset: Any) -> list[int]:
    """The data set's own labels; none where it isn't one of `datasets`, or has no labels."""
    if not isinstance(dataset, datasets.Dataset) or "label" not in dataset.features:
        return []
    return [label if isinstance(label, int) else -1 for label in read_labels(dataset)]


def _write_labels(
    path: Path,
    class_names: Sequence[str],
    files: Sequence[str],
    labels: torch.Tensor,
    confidences: torch.Tensor,
    changes: torch.Tensor,
    truths: Sequence[int],
) -> None:
    """One row an image, class indices as names; a column of true classes where any is known."""
    columns = (files, labels.tolist(), confidences.tolist(), changes.tolist(), truths)
    # Of the last images not all may be known. Objects, since pandas' own text can't hold the name of every file.
    series = [pd.Series(values, dtype=object) for values in columns]
    table = pd.DataFrame(dict(zip(LABEL_COLUMNS, series, strict=True)))
    names = pd.Series(class_names, dtype=object)
    table["label"] = names.reindex(table["label"]).array
    table["truth"] = names.reindex(table["truth"]).array
    table["confidence"] = table["confidence"].astype(float)
    table["changes"] = pd.to_numeric(table["changes"]).fillna(0).astype(int)
    _write_csv(path, table if table["truth"].notna().any() else table.drop(columns="truth"))


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, table.to_csv(index=False, float_format="%.6f", lineterminator="\n"))


def _read_labels(path: Path, class_names: Sequence[str]) -> list[ImageLabel]:
    rows = _read_csv(path, LABEL_COLUMNS[:-1])
    try:
        labels = [
            ImageLabel(file, label, float(confidence or math.nan), int(changes), *truth)
            for file, label, confidence, changes, *truth in rows
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} isn't as the run wrote it: {error}") from error
    unknown = {name for image in labels for name in (image.label, image.truth)} - {"", *class_names}
    if unknown:
        raise ValueError(
            f"{path} isn't as the run wrote it: {abbreviate(sorted(unknown))} are no classes of the model."
        )
    return labels


def _read_csv(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows, without the first, which must begin with these names; none where there is no file."""
    if not path.exists():
        return []
    # Not by pandas, which fills rows that are too short, as of a file that was cut off.
    with open(path, encoding="utf-8", newline="") as file:
        try:
            head, *rows = list(csv.reader(file)) or [[]]
        except csv.Error as error:
            raise ValueError(f"{path} isn't as the run wrote it: {error}") from error
    if head[: len(columns)] != [*columns]:
        raise ValueError(
            f"{path} begins with {','.join(head)!r}; expected {','.join(columns)!r}, as the run wrote it."
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(head):
            raise ValueError(
                f"{path} isn't as the run wrote it: row {number} has {len(row)} values for {len(head)} columns. "
                "Take the file from a copy."
            )
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    content = parse_json(path, read_text(path)) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content
