"""Recipes by name: settings of model and training that belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One recipe, as `<name>.yaml` beside this file holds it.

    Attributes:
        name, title (`str`): what it is called, and what it does, as a part of a sentence.
        config (`dict`): fields of [`MicroCLIPConfig`], for `from_clip`.
        args (`dict`): fields of [`MicroCLIPTrainingArguments`]. What neither names keeps its default.
    """

    name: str
    title: str
    config: dict[str, Any]
    args: dict[str, Any]


def list_recipes() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, such as "quick"; a `ValueError` lists those there are if there is none of that name."""
    names = list_recipes()
    if name not in names:
        raise ValueError(f"There is no recipe {name!r}; pass one of {', '.join(names)}.")
    return Recipe(name=name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
