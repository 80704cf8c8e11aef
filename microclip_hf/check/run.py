"""A check from its beginning to its end: which photos to label, more of them, and what the labels say."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.class_names import read_class_names
from ..data.photo_files import refuse_undecodable
from ..data.photo_sources import PhotoList
from ..descriptions.files import read_descriptions
from ..loading import load_adapted, load_clip
from ..modeling_microclip import MicroCLIPForImageClassification
from ..prediction import Classifier, find_photos
from ..prediction.labelling import LabelSettings, label_photos
from ..text_heads import abbreviate, normalize_name
from .folder import (
    MODELS,
    PAGE,
    Check,
    DrawRecord,
    check_new_folder,
    check_special_names,
    read_check,
    shuffled_batch,
    table_path,
    write_check,
    write_record,
)
from .labels import add_files, read_rows
from .page import write_page
from .results import PICTURE, measure, write_results
from .sampling import draw_photos
from .tables import Table, check_tables, fingerprint, is_table, read_table


NUM_LABELS = 60


@dataclass(frozen=True)
class CheckInputs:
    """What is compared, on which photos.

    Args:
        photos (`str`): a folder, searched at any depth.
        model, clip (`str`): the adapted model and its CLIP, Hub ids or folders; or tables that `microclip predict`
            wrote of them, `.csv` or `.parquet`.
        descriptions, class_names (`str`, *optional*): files; the names are the model's own, where it isn't a table,
            and else by default those in both tables.
    """

    photos: str
    model: str
    clip: str
    descriptions: str | None = None
    class_names: str | None = None
    device: torch.device | str = "cpu"
    batch_size: int = 32


def start_check(
    inputs: CheckInputs, output_dir: str | os.PathLike, num_labels: int = NUM_LABELS, seed: int = 0
) -> Check:
    """Compare two models on photos, and write which photos to label into a new folder.

    Args:
        inputs ([`CheckInputs`]): models and photos.
        output_dir (`str` or `os.PathLike`): gets `to_label.csv`, `label.html`, what both models said (`clip.csv`,
            `adapted.csv`) and `draw.json`.
        num_labels (`int`): how many photos to label.
        seed (`int`): of the draw.

    Raises:
        ValueError: if the folder holds a check, or something is wrong with the inputs.
    """
    if num_labels < 1:
        raise ValueError(f"`num_labels` is {num_labels}; pass 1 or more, such as {NUM_LABELS}.")
    _check_folders(inputs.photos, output_dir)
    class_names, tables = _predict(inputs, output_dir)
    files = check_tables({"CLIP": tables["clip"], "adapted": tables["adapted"]})
    _check_photos(inputs.photos, files)
    pairs = [[tables[name][file] for name in reversed(MODELS)] for file in files]
    differs = np.array([normalize_name(pair[0].label) != normalize_name(pair[1].label) for pair in pairs])
    draw = draw_photos(differs, np.array([[each.score for each in pair] for pair in pairs]), num_labels, seed)
    sources = {name: os.path.abspath(own) if os.path.exists(own) else own for name, own in _sources(inputs).items()}
    record = DrawRecord(
        photos=os.path.abspath(inputs.photos),
        sources=sources,
        fingerprints={name: fingerprint(source) for name, source in sources.items()},
        class_names=class_names,
        descriptions=read_descriptions(inputs.descriptions, class_names) if inputs.descriptions else {},
        seed=seed,
        order=[files[index] for index in draw.order],
        strata=draw.strata[draw.order].tolist(),
        differs=draw.differs.tolist(),
        num_drawn=min(num_labels, len(files)),
        num_left_out=len(tables["clip"]) - len(files),
    )
    check = write_check(output_dir, record, tables)
    _write_page(check)
    return check


def _check_folders(photos: str, output_dir: str | os.PathLike) -> None:
    """Refuse a folder for a check that holds one, or where its picture would count as a photo."""
    check_new_folder(output_dir)
    if not os.path.isdir(photos):
        raise ValueError(f"{photos} is no folder; pass the folder of photos.")
    if Path(os.path.realpath(output_dir)).is_relative_to(os.path.realpath(photos)):
        raise ValueError(
            f"`output_dir` {output_dir} lies in {photos}, where {PICTURE} would count as a photo; choose a folder "
            "outside."
        )


def extend_check(folder: str | os.PathLike, more: int) -> Check:
    """Draw further photos, so that all drawn are a stratified random sample; labels that are there stay.

    Raises:
        ValueError: if the folder holds no check, or no photo is left.
    """
    if more < 1:
        raise ValueError(f"`more` is {more}; pass 1 or more.")
    check = read_check(folder)
    before = check.record.num_drawn
    after = min(before + more, len(check.record.order))
    # Refused, if at all, before anything is drawn.
    rows = {row[0] for row in read_rows(check.labels)}
    if after == before and rows.issuperset(check.drawn):
        raise ValueError(f"All {before} photos were drawn already; label those that have no label yet.")
    check = replace(check, record=replace(check.record, num_drawn=after))
    # First what says which rows belong: rows that are missing are added by the next call.
    write_record(check)
    add_files(check.labels, [*check.drawn[:before], *shuffled_batch(check.record, before)])
    _write_page(check)
    return check


def finish_check(folder: str | os.PathLike) -> dict[str, Any]:
    """Say what the labels say: write `check.json`, `check.md` and `check.png`, and return the first's content.

    Raises:
        ValueError: if the folder holds no check, a label is no class, or there are too few labels.
    """
    check = read_check(folder)
    if not (check.folder / PAGE).is_file():  # the drawing was interrupted
        _write_page(check)
    results = measure(check)
    write_results(check.folder, results)
    return results


def _write_page(check: Check) -> None:
    missing = write_page(check)
    if missing:
        warnings.warn(
            f"{missing} of the photos to label can't be read in {check.record.photos}; put them back, or leave their "
            "labels empty.",
            stacklevel=3,
        )


def _predict(inputs: CheckInputs, output_dir: str | os.PathLike) -> tuple[list[str], dict[str, Table]]:
    """The classes, and what both models say; whatever is wrong with the inputs is known before a photo is read."""
    tables = {name: read_table(source) for name, source in _sources(inputs).items() if is_table(source)}
    model = None if "adapted" in tables else load_adapted(inputs.model)
    class_names = _class_names(inputs, None if model is None else model.config.class_names, tables)
    check_special_names(class_names)
    for table in tables.values():
        _check_labels(table, class_names)
    descriptions = read_descriptions(inputs.descriptions, class_names) if inputs.descriptions else None
    if len(tables) == len(MODELS):
        return class_names, tables
    photos = find_photos([inputs.photos])
    refuse_undecodable(list(photos))
    models = {}
    if "clip" not in tables:
        texts = {"class_names": class_names, "templates": None, "descriptions": descriptions}
        # [CLS] alone, compared with the mean of the descriptions: CuPL (arXiv:2209.03320).
        clip, _ = load_clip(inputs.clip, texts, {"prior_weighting": "uniform", "fusion_ratio": 1.0})
        models["clip"] = clip.eval()
    if model is not None:
        models["adapted"] = model
    for name, own in models.items():
        tables[name] = _label(own.to(inputs.device), photos, table_path(output_dir, name), inputs.batch_size)
    return class_names, {name: tables[name] for name in MODELS}


def _label(model: MicroCLIPForImageClassification, photos: dict[str, Path], path: Path, batch_size: int) -> Table:
    """What a model says, which is also kept beside the file, so that an interrupted check goes on with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = LabelSettings(batch_size, title=path.stem, keep_parts=True)
    label_photos(Classifier(model), PhotoList(photos), os.fspath(path), settings)
    return read_table(path)


def _sources(inputs: CheckInputs) -> dict[str, str]:
    return {"clip": inputs.clip, "adapted": inputs.model}


def _class_names(inputs: CheckInputs, own: list[str] | None, tables: dict[str, Table]) -> list[str]:
    """The model's own names, those of a file, or those in both tables."""
    if own is not None:
        if inputs.class_names is not None:
            raise ValueError(f"`class_names` doesn't go with {inputs.model}, whose classes are its own.")
        return own
    if inputs.class_names is not None:
        return read_class_names(inputs.class_names)
    if len(tables) < len(MODELS):
        raise ValueError(f"{inputs.model} doesn't list the classes that {inputs.clip} needs; pass `class_names`.")
    predictions = [each for table in tables.values() for each in table.values() if each is not None]
    names = {normalize_name(name): name for each in predictions for name in each.names}
    return sorted(names.values())


def _check_labels(table: Table, class_names: Sequence[str]) -> None:
    known = set(map(normalize_name, class_names))
    predictions = [prediction for prediction in table.values() if prediction is not None]
    names = {name for each in predictions for name in each.names}
    unknown = sorted(name for name in names if normalize_name(name) not in known)
    if unknown:
        raise ValueError(
            f"A table of predictions has the classes {abbreviate(unknown)}, which are none of the {len(class_names)} "
            "class names; pass predictions of models of the same classes."
        )


def _check_photos(folder: str, files: Sequence[str]) -> None:
    gone = [file for file in files if not Path(folder, file).is_file()]
    if gone:
        raise ValueError(
            f"{len(gone)} of {len(files)} photos with predictions aren't in {folder} ({abbreviate(gone)}); pass the "
            "folder that was predicted."
        )
