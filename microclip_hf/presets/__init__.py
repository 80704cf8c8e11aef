"""Benchmarks by name: where the Hub holds each, its columns and splits, its class names and its prompts."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, IterableDataset

from ..data.labels import DataSource, align_labels, align_or_leave_out
from ..data.sources import open_dataset
from ..text_heads import abbreviate, check_class_names, check_templates


FOLDER = Path(__file__).parent
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Preset:
    """One benchmark, as `<name>.yaml` beside this file holds it; that file also says what each fact was read in.

    Attributes:
        dataset (`str`, *optional*): id of a data set on the Hub, or a copy of its repository here; `None` where the
            Hub was found to hold none. Then its `config`, `revision`, columns, and splits, `None` where it lacks one.
        num_classes, templates: how many classes it has, and prompts with `{}` for the class name.
        rename (`Mapping[str, str]`): class names that [`readable_name`] wouldn't make readable.
        class_names (`Sequence[str]`, *optional*): the classes by their numbers, where the data set holds numbers
            alone, or to take in place of its own.
        citation, license (`str`): the paper, and on what terms the data are given.
        verified, checked: whether id, revision, columns, splits and number of classes were all read in a source; those
            sources, and what was read in each.
    """

    name: str
    title: str
    dataset: str | None
    revision: str | None
    num_classes: int
    templates: Sequence[str]
    citation: str
    license: str
    verified: bool
    checked: Sequence[str]
    config: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train_split: str | None = "train"
    test_split: str | None = "test"
    rename: Mapping[str, str] = field(default_factory=dict)
    class_names: Sequence[str] | None = None

    def override(self, dataset: str | None = None, **fields: Any) -> "Preset":
        """The preset with those fields replaced that aren't `None`; another `dataset` drops config and revision."""
        changes = {name: value for name, value in fields.items() if value is not None}
        if dataset is not None:
            changes = {"dataset": dataset, "config": None, "revision": None, **changes}
        return dataclasses.replace(self, **changes)


def list_presets() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """A preset by its name, such as "cub"; if there is none, the error names the nearest ones."""
    names = list_presets()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, 3, cutoff=0.5)
        advice = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}."
        raise ValueError(f"There is no preset {name!r}; {advice}")
    preset = Preset(name=name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
    check_templates(preset.templates)
    return preset


def load_split(
    preset: Preset, split: str, source: str | None = None, streaming: bool = False, labels_required: bool = True
) -> Dataset | IterableDataset:
    """Images of a preset's data set, with labels under readable names, once it has been found to be what it should.

    Args:
        preset, split: by [`load_preset`], with fields of one's own by [`Preset.override`]; "train" or "test".
        source (`str`, *optional*): your own images in place of the preset's data set, in sub-folders named like its
            classes, or files with its columns.
        streaming, labels_required (`bool`): see [`open_dataset`].

    Returns:
        `image`, and `label`, a `ClassLabel` of `preset.class_names`, else of the data set's own names, made readable.

    Raises:
        ValueError: if columns, splits, the number of classes or renamed classes aren't those of the preset.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}.")
    split_name = preset.train_split if split == "train" else preset.test_split
    location = source or preset.dataset
    if location is None:
        raise ValueError(
            f"The preset {preset.name!r} names no data set on the Hub; pass your own images, in a sub-folder for each "
            "class (`source`), or a data set (`dataset`)."
        )
    if source is None and split_name is None:
        raise ValueError(
            f"The data set of the preset {preset.name!r}, {location}, has no split to {split} with; pass your own "
            f"images (`source`), or say which split to take (`{split}_split`)."
        )
    reading = {"image_column": preset.image_column, "label_column": preset.label_column, "streaming": streaming}
    expected = f"images in {preset.image_column!r}, labels in {preset.label_column!r}"
    if source is None:
        reading |= {"hub": True, "config_name": preset.config, "revision": preset.revision, "split": split_name}
        expected = f"{expected}, the split {split_name!r}"
    try:
        dataset = open_dataset(location, labels_required=labels_required, **reading)
    except ValueError as error:
        raise ValueError(f"The preset {preset.name!r} expects {expected}. {error}") from error
    differences = _differences(dataset.features.get("label"), preset)
    if differences:
        raise ValueError(
            f"{location} isn't the data set of the preset {preset.name!r}: {'; '.join(differences)}. For other "
            "classes pass `class_names` and leave the preset out."
        )
    return _name_labels(dataset, preset, location, labels_required)


def _differences(label: Any, preset: Preset) -> list[str]:
    """In what a column of labels, which is to say what the classes are called, isn't that of the preset."""
    if label is None or preset.class_names is not None:
        return []
    if not isinstance(label, ClassLabel):
        return [f"its column {preset.label_column!r} holds {label}, without the names of classes"]
    differences = []
    if len(label.names) != preset.num_classes:
        differences.append(f"it has {len(label.names)} classes ({abbreviate(label.names)}), not {preset.num_classes}")
    missing = [old for old, new in preset.rename.items() if not {old, new} & set(label.names)]
    if missing:
        differences.append(f"it lacks the classes {abbreviate(missing)} (it has {abbreviate(label.names)})")
    return differences


def _name_labels(dataset: DataSource, preset: Preset, location: str, labels_required: bool) -> DataSource:
    """The data set with readable class names, or with its labels numbered like those of the preset."""
    label = dataset.features.get("label")
    if isinstance(label, ClassLabel):
        names = [preset.rename.get(name, readable_name(name)) for name in label.names]
        if preset.class_names is None:
            check_class_names(names)
        dataset = dataset.cast_column("label", ClassLabel(names=names))
    if label is None or preset.class_names is None:
        return dataset
    if not labels_required:
        return align_or_leave_out(dataset, preset.class_names, location)
    # Also where the labels were numbers already: the data set then says what they are called.
    return align_labels(dataset, preset.class_names).cast_column("label", ClassLabel(names=list(preset.class_names)))


def readable_name(name: str) -> str:
    """A class name as one would write it: without a number before it, without `_` or CamelCase, without synonyms.

    "001.Black_footed_Albatross" gives "Black footed Albatross", "BareLand" "Bare Land", "tench, Tinca tinca" "tench".
    """
    name = re.sub(r"^\d+\.", "", name).split(",")[0].replace("_", " ").strip()
    # Not "iPod" or "McLaren MP4-12C", whose capitals are no beginnings of words.
    is_camel_case = re.fullmatch(r"(?:[A-Z][a-z]+){2,}", name)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) if is_camel_case else name
