"""Options that several commands share: what they may be, and how they are read."""

import json
import os
from typing import Any

from ..configuration_microclip import MicroCLIPConfig
from ..presets import Preset, load_preset


def read_overrides(text: str | None) -> dict[str, Any]:
    """Settings of the architecture from JSON.

    Raises:
        ValueError: if it isn't JSON, or has settings or values that [`MicroCLIPConfig`] hasn't.
    """
    try:
        overrides = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--config_overrides {text} isn't JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise ValueError(f'--config_overrides {text} is no JSON object; pass one such as \'{{"fg_query": "cls"}}\'.')
    known = MicroCLIPConfig.architecture_names()
    if unknown := set(overrides) - set(known):
        raise ValueError(
            f"--config_overrides has {', '.join(map(repr, sorted(unknown)))}; the settings are "
            f"{', '.join(sorted(known))}."
        )
    MicroCLIPConfig(**overrides)
    return overrides


def check_files(options: Any, *names: str) -> None:
    """Refuse files that aren't there, of the options of these names.

    Raises:
        ValueError: if there are any.
    """
    for name in names:
        path = vars(options)[name]
        if path is not None and not os.path.isfile(path):
            what = "that is a folder; pass a file" if os.path.isdir(path) else "there is no such file"
            raise ValueError(f"--{name} {path}: {what}.")


def refuse_given(options: Any, other: str, *names: str) -> None:
    """Refuse options that mean nothing beside another one.

    Raises:
        ValueError: if any of these names is given.
    """
    if given := [f"--{name}" for name in names if vars(options)[name] is not None]:
        raise ValueError(f"{', '.join(given)} can't go with {other}; leave out one or the other.")


def read_preset(options: Any, **splits: str | None) -> Preset:
    """The preset `options.preset` with the columns, splits, ... that are given in place of its own.

    Args:
        options: a command's, which names a data set of the Hub, its columns and templates as `microclip adapt` does.
        splits (`str`, *optional*): `train_split` and `test_split`, where given.

    Raises:
        ValueError: if there is no such preset.
    """
    return load_preset(options.preset).override(
        dataset=options.dataset_name,
        config=options.dataset_config,
        revision=options.dataset_revision,
        image_column=options.image_column,
        label_column=options.label_column,
        templates=options.templates,
        **splits,
    )
