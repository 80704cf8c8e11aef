"""Labels, which only measure: whatever a column holds of them, as numbers of classes.

A label is the name of a class (whatever its case, `_` and `-`), or its number, counted from 0: an integer, a whole
number, or digits that are no class's name. `None`, NaN, blanks and negative numbers say that there is no label.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from ..text_heads import abbreviate, contrast_spellings, name_positions, normalize_name


DataSource = TypeVar("DataSource", Dataset, IterableDataset)

# Types of columns, as `datasets` calls them.
STRINGS = ("string", "large_string", "string_view")
LABEL_TYPES = "|".join([*STRINGS, "bool", "null", r"u?int\d+", r"float\d+"])
NO_CLASS = -1  # a number for labels that aren't missing, but no class either
ADVICE = "Number the labels like the class names, or leave the column of labels out."


def can_be_labels(feature: Any) -> bool:
    """Whether a column of this type can hold labels; one of the type `null` holds that there are none."""
    if isinstance(feature, Value):
        return re.fullmatch(LABEL_TYPES, feature.dtype) is not None
    return isinstance(feature, ClassLabel)


def is_known(label: Any) -> bool:
    """Whether a label says anything."""
    if isinstance(label, str):
        return label.strip() not in ("", "-1")
    return label is not None and label >= 0


def read_labels(dataset: Dataset) -> list[Any]:
    """The column `label` as it is stored, whatever the data set's format."""
    return dataset.with_format(None).select_columns(["label"])["label"][:]


def labelled(dataset: Dataset) -> list[int]:
    """Indices of the images whose label is known."""
    return [index for index, label in enumerate(read_labels(dataset)) if is_known(label)]


def name_labels(dataset: Dataset) -> Dataset:
    """A `label` of strings, unless they are digits, as a `ClassLabel` of their sorted names, each in one spelling."""
    feature = dataset.features.get("label")
    if not isinstance(feature, Value) or feature.dtype not in STRINGS:
        return dataset
    labels = [label if is_known(label) else None for label in read_labels(dataset)]
    # Backwards, so that of several spellings the first one stays.
    spellings = {normalize_name(label): label for label in sorted(set(labels) - {None}, reverse=True)}
    if all(key.isdecimal() for key in spellings):
        return dataset
    names = sorted(spellings.values())
    position = name_positions(names)
    return _replace(dataset, [label and position[normalize_name(label)] for label in labels], names)


def align_labels(dataset: DataSource, class_names: Sequence[str], strict: bool = True) -> DataSource:
    """The data set, or stream, with any labels numbered like `class_names`; an error if one is no class.

    A `ClassLabel` has names of its own, in an order of its own (`imagefolder` sorts them). Labels of a stream are
    judged as they are read, and without `strict` one that is no class counts as unlabelled, with a warning.
    """
    feature = (dataset.features or {}).get("label")
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names == list(class_names) or (feature is None and dataset.features is not None):
        return dataset
    if feature is not None and not can_be_labels(feature):
        raise ValueError(f"The labels are {feature}; expected names or numbers of classes. {ADVICE}")
    position = name_positions(class_names)
    # A `ClassLabel` that was made without names calls its classes "0", "1", ...
    if names is not None and (names != [str(index) for index in range(len(names))] or position.keys() & set(names)):
        _check_names(names, class_names, position)
    if isinstance(dataset, IterableDataset):
        features = dataset.features
        if features is not None:
            features = Features({**features, "label": ClassLabel(names=list(class_names))})
        options = {"position": position, "names": names, "strict": strict}
        return dataset.map(_number_example, features=features, fn_kwargs=options)
    labels = read_labels(dataset)
    if names is not None:
        labels = [names[label] if is_known(label) else None for label in labels]
    numbers = _number_all(labels, class_names, position)
    if isinstance(feature, Value) and "int" in feature.dtype:
        return dataset  # numbered already
    return _replace(dataset, numbers, class_names)


def align_or_leave_out(dataset: DataSource, class_names: Sequence[str], source: str) -> DataSource:
    """As [`align_labels`]; labels that can't be used are left out, with a warning of those of `source`."""
    try:
        return align_labels(dataset, class_names, strict=False)
    except ValueError as error:
        warn_left_out(source, error)
        return dataset.remove_columns("label")


def warn_left_out(source: str, reason: Any) -> None:
    """Tell that adaptation goes on without labels."""
    warnings.warn(f"The labels of {source} are left out, and nothing is measured by them. {reason}", stacklevel=3)


def _replace(dataset: Dataset, numbers: list[int | None], names: Sequence[str]) -> Dataset:
    return dataset.remove_columns("label").add_column("label", numbers, feature=ClassLabel(names=list(names)))


def _check_names(names: Sequence[str], class_names: Sequence[str], position: Mapping[str, int]) -> None:
    unknown = [name for name in names if normalize_name(name) not in position]
    if not unknown:
        return
    labels = set(map(normalize_name, names))
    unlabelled = [name for name in class_names if normalize_name(name) not in labels]
    lacking = f"; the classes {abbreviate(unlabelled)} have no label" if unlabelled else ""
    raise ValueError(
        f"The labels {abbreviate(unknown)} are none of the {len(class_names)} classes{lacking}."
        f"{contrast_spellings(unknown[0], class_names, 'the class names')} Labels are names of "
        "sub-folders or entries of a column. Rename them or the classes, or leave the labels out."
    )


def _number_all(labels: Sequence[Any], class_names: Sequence[str], position: Mapping[str, int]) -> list[int | None]:
    """The number of each label, once all were found to be names or numbers of classes."""
    values = {label for label in labels if is_known(label)}
    words = sorted(str(value) for value in values if isinstance(value, (str, bool)))
    if not all(word.strip().isdecimal() for word in words):
        _check_names(words, class_names, position)
    numbers = {value: _number(value, position) for value in values}
    if NO_CLASS in numbers.values():
        example = next(value for value in values if numbers[value] == NO_CLASS)
        raise ValueError(f"The label {example} is no whole number; expected names or numbers of classes. {ADVICE}")
    highest = max(numbers.values(), default=-1)
    if highest >= len(class_names):
        raise ValueError(
            f"The highest label is {highest}, and there are {len(class_names)} classes, numbered from 0. {ADVICE}"
        )
    return [numbers[label] if is_known(label) else None for label in labels]


def _number(label: Any, position: Mapping[str, int]) -> int:
    """The number of a class, which may be too high; `NO_CLASS` for a word, or a number, that can't be one."""
    if isinstance(label, (str, bool)):
        key = normalize_name(str(label))
        return position.get(key, int(key) if key.isdecimal() else NO_CLASS)
    return int(label) if label % 1 == 0 else NO_CLASS


def _number_example(
    example: dict[str, Any], position: Mapping[str, int], names: Sequence[str] | None, strict: bool
) -> dict[str, int | None]:
    """The `label` of one example of a stream, if it has one; `names` are those that its numbers stand for."""
    if "label" not in example:
        return {}
    label = example["label"]
    try:
        if not is_known(label):
            return {"label": None}
        number = _number(label if names is None else names[label], position)
    except TypeError:  # of a stream that doesn't say what it holds, such as a list
        number = NO_CLASS
    if 0 <= number < len(position):
        return {"label": number}
    message = f"The label {label!r} of an image is none of the {len(position)} classes."
    if strict:
        raise ValueError(f"{message} {ADVICE}")
    warnings.warn(f"{message} It counts as missing.", stacklevel=2)
    return {"label": None}
