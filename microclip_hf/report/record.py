"""What a finished run leaves in its folder about its images, for their owner and for the report."""

import csv
import datetime
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PredictionOutput
from transformers.utils import CONFIG_NAME

from ..data.image_columns import image_names
from ..data.labels import read_labels
from ..files import write_whole
from ..hub.model_card import run_settings, versions
from ..text_heads import abbreviate
from ..training.view_datasets import ViewDataset


if TYPE_CHECKING:
    from ..training.trainer import MicroCLIPTrainer


LABELS = "pseudo_labels.csv"
REPORT, REPORT_DIR = "report.html", "report"
SWAPS, TEST_LABELS, FACTS = (os.path.join(REPORT_DIR, name) for name in ("swaps.csv", "test_labels.csv", "run.json"))
FACT_NAMES = ("model", "images", "num_images", "root", "settings", "versions", "finished", "results")
COLUMNS = ("file", "label", "confidence", "changes", "truth")


@dataclass(frozen=True)
class ImageLabel:
    """What a run says of one image.

    Args:
        file (`str`): what the image is called, empty where it has no name.
        label (`str`): its class, empty where it has none: it wasn't seen, or can't be read.
        confidence (`float`): the label's probability, NaN where it isn't known.
        changes (`int`): how often it had another label than an epoch before.
        truth (`str`): its true class, empty where that isn't known.
    """

    file: str
    label: str
    confidence: float = math.nan
    changes: int = 0
    truth: str = ""


@dataclass(frozen=True)
class RunRecord:
    """All that a run's folder knows of it; what isn't there is empty.

    Args:
        class_names (`list[str]`): the model's.
        log_history (`list[dict[str, float]]`): the Trainer's.
        results (`dict[str, float]`): measured with labels, by the names of a card's.
        images (`list[ImageLabel]`): adapted to, in the data set's order.
        tests (`list[ImageLabel]`): test images, as the adapted model labels them.
        swaps (`list[tuple[str, str, int]]`): old class, new class, and how often.
        facts (`dict`): `images`, `model`, `num_images`, `root` (of the images' relative paths; `None` where images
            aren't files), `settings`, `versions`, `finished`.
    """

    class_names: list[str]
    log_history: list[dict[str, float]]
    results: dict[str, float]
    images: list[ImageLabel]
    tests: list[ImageLabel]
    swaps: list[tuple[str, str, int]]
    facts: dict[str, Any]


def write_record(trainer: "MicroCLIPTrainer", tested: PredictionOutput | None = None) -> None:
    """Write `pseudo_labels.csv`, and what else the report needs, into the output folder.

    After training, `save_state` and, for the facts, `card_facts`; the main process alone writes.

    Args:
        trainer ([`MicroCLIPTrainer`]): whose run is over.
        tested (`PredictionOutput`, *optional*): of `trainer.predict(trainer.eval_dataset)`.
    """
    if not trainer.is_world_process_zero():
        return
    folder, seen = Path(trainer.args.output_dir), trainer.diagnostics
    names = [trainer.model.config.id2label[index] for index in range(trainer.model.config.num_labels)]
    dataset = trainer.train_dataset.dataset if isinstance(trainer.train_dataset, ViewDataset) else None
    files, are_files = image_names(dataset)
    (folder / REPORT_DIR).mkdir(exist_ok=True)
    for name in (REPORT, LABELS, TEST_LABELS):  # of an earlier run that this one went on from
        (folder / name).unlink(missing_ok=True)
    facts = {
        "model": trainer.card_facts.base_model,
        "images": trainer.card_facts.dataset,
        "num_images": len(dataset) if dataset is not None else None,
        "root": os.getcwd() if are_files else None,
        "settings": [(name, str(value)) for name, value in run_settings(trainer.model.config, trainer.args)],
        "versions": versions(),
        "finished": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "results": trainer.card_facts.results,
    }
    write_whole(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False))
    if num_labelled := len(seen.pseudo_labels):
        num_images = max(num_labelled, len(files))
        known = [*zip(seen.pseudo_labels.tolist(), seen.confidences.tolist(), seen.changes.tolist(), strict=True)]
        known += [(-1, math.nan, 0)] * (num_images - num_labelled)
        files += [""] * (num_images - len(files))
        truths = _known_labels(dataset, num_images)
        _write_labels(folder / LABELS, files, known, truths, names)
    swaps = [(names[old], names[new], count) for old, new, count in seen.swaps.tolist()]
    _write_csv(folder / SWAPS, [("old", "new", "count"), *swaps])
    if tested is not None:
        probabilities = torch.tensor(tested.predictions).float().softmax(-1)
        known = [(int(own.argmax()), float(own.max()), 0) for own in probabilities]
        test_files, _ = image_names(trainer.eval_datasets.prepare(trainer.eval_dataset))
        truths = np.asarray(tested.label_ids).tolist() if tested.label_ids is not None else [-1] * len(known)
        test_files = (test_files or [""] * len(known))[: len(known)]  # a last batch may have been dropped
        _write_labels(folder / TEST_LABELS, test_files, known, truths, names)


def read_record(folder: str | os.PathLike) -> RunRecord:
    """What lies in a run's folder.

    Raises:
        ValueError: if it is no run's, or a file of it doesn't hold what `write_record` wrote.
    """
    folder = Path(folder)
    for name in (TRAINER_STATE_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; pass the --output_dir of a finished `microclip adapt`.")
    try:
        id2label = _read_json(folder / CONFIG_NAME)["id2label"]
        class_names = [id2label[key] for key in sorted(id2label, key=int)]
        log_history = [dict(entry) for entry in _read_json(folder / TRAINER_STATE_NAME)["log_history"]]
        facts = _read_json(folder / FACTS)
        results = {name: float(value) for name, value in facts["results"].items()} if facts else {}
        if facts and (missing := set(FACT_NAMES) - facts.keys()):
            raise ValueError(f"{folder / FACTS} lacks {', '.join(sorted(missing))}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} isn't as the run left it: {error!r}. Take the files from a copy of it.") from error
    return RunRecord(
        class_names=class_names,
        log_history=log_history,
        results=results,
        images=_read_labels(folder / LABELS, class_names),
        tests=_read_labels(folder / TEST_LABELS, class_names),
        swaps=[(old, new, int(count)) for old, new, count in _read_csv(folder / SWAPS, ("old", "new", "count"))],
        facts=facts,
    )


def _known_labels(dataset: Any, num_images: int) -> list[int]:
    """The data set's own labels, -1 where there are none."""
    labels = [-1] * num_images
    if isinstance(dataset, datasets.Dataset) and "label" in dataset.features:
        labels = [label if isinstance(label, int) else -1 for label in read_labels(dataset)]
    return labels


def _write_labels(
    path: Path,
    files: Sequence[str],
    known: Sequence[tuple[int, float, int]],
    truths: Sequence[int],
    names: Sequence[str],
) -> None:
    """One row an image; a column of true classes where any is known."""
    columns = COLUMNS if any(truth >= 0 for truth in truths) else COLUMNS[:-1]
    rows = [columns]
    for file, (label, confidence, changes), truth in zip(files, known, truths, strict=True):
        own = (file, *(_name(names, label), "" if math.isnan(confidence) else f"{confidence:.6f}", changes))
        rows.append((*own, _name(names, truth))[: len(columns)])
    _write_csv(path, rows)


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if 0 <= index < len(names) else ""


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows(rows)
    write_whole(path, content.getvalue())


def _read_labels(path: Path, class_names: Sequence[str]) -> list[ImageLabel]:
    rows = _read_csv(path, COLUMNS[:-1])
    try:
        labels = [
            ImageLabel(file, label, float(confidence or math.nan), int(changes), *truth)
            for file, label, confidence, changes, *truth in rows
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} isn't as the run wrote it: {error}") from error
    if unknown := {name for image in labels for name in (image.label, image.truth)} - {"", *class_names}:
        raise ValueError(
            f"{path} isn't as the run wrote it: {abbreviate(sorted(unknown))} are no classes of the model."
        )
    return labels


def _read_csv(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows, without the first, which must begin with these names; none where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        try:
            first, *rows = list(csv.reader(file)) or [[]]
        except csv.Error as error:
            raise ValueError(f"{path} isn't as the run wrote it: {error}") from error
    if tuple(first[: len(columns)]) != tuple(columns):
        raise ValueError(
            f"{path} begins with {','.join(first)!r}; expected {','.join(columns)!r}, as the run wrote it."
        )
    if wrong := next((row for row in rows if len(row) != len(first)), None):
        raise ValueError(f"{path} has a row of {len(wrong)} cells; expected {len(first)}, as the run wrote it.")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} isn't JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content
