"""An evaluation's results in the card of a saved model: in its metadata, which the Hub shows, and as a table."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..evaluation.page import describe_images, ways_table
from ..evaluation.predictions import ANSWER
from .model_card import eval_results, save_card
from .push import CARD


# Of the card that adaptation writes; a section of results comes before it.
NEXT_HEADING = "## How it was made"


def read_card(folder: str | os.PathLike) -> ModelCard:
    """The card of a model's folder; an error where there is none, or its metadata can't be read."""
    path = Path(folder, CARD)
    if not path.is_file():
        raise ValueError(f"{folder} isn't a folder with a card, {CARD}, to write the results into.")
    try:
        return ModelCard.load(path)
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of {path} can't be read; correct or remove it. ({error})") from error


def add_results(
    card: ModelCard, folder: str | os.PathLike, report: Mapping[str, Any], show_all: bool = False, **dataset: Any
) -> None:
    """Write a report of `make_report` into a model's card; results of the same data set are replaced, others stay.

    Its table has all ways (`show_all`), or those of `MAIN_WAYS`.
    `dataset` is how the Hub's metadata call it: `dataset_type`, `dataset_name`, and perhaps `dataset_config`,
    `dataset_split` and `dataset_revision`.
    """
    results = eval_results(report["ways"][ANSWER], **dataset)
    others = [
        earlier
        for earlier in card.data.eval_results or ()
        if not any(earlier.is_equal_except_value(result) for result in results)
    ]
    card.data.eval_results = others + results
    # Without a name huggingface_hub can't write results.
    card.data.model_name = card.data.model_name or os.path.basename(os.path.abspath(folder))
    content = f"{describe_images(report)} Labels only measure.\n\n{ways_table(report, show_all)}\n"
    add_section(card, folder, f"## Measured on {report['dataset']}", content)


def add_section(card: ModelCard, folder: str | os.PathLike, heading: str, content: str) -> None:
    """Write a section into a model's card, in place of one of the same heading."""
    card.text = _with_section(card.text, heading, content)
    save_card(card, Path(folder))


def _with_section(text: str, heading: str, content: str) -> str:
    """The text with this section in place of one of the same heading, or before the heading that it should precede."""
    section = f"{heading}\n\n{content}\n"
    # Up to the next heading of its level or above.
    earlier = re.search(rf"^{re.escape(heading)}\n.*?(?=^#{{1,2}} |\Z)", text, re.DOTALL | re.MULTILINE)
    if earlier:
        return text[: earlier.start()] + section + text[earlier.end() :]
    following = re.search(rf"^{re.escape(NEXT_HEADING)}$", text, re.MULTILINE)
    if following:
        return text[: following.start()] + section + text[following.start() :]
    return f"{text.rstrip()}\n\n{section}"
