"""`microclip predict`: a folder of unlabelled photos -> a CSV file with the best class of each, and the runner-up."""

import contextlib
import csv
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from ..files import check_new_file, whole_file
from ..loading import choose_device, load_adapted
from ..modeling_microclip import MicroCLIPForImageClassification
from ..prediction import COLUMNS, find_photos, predict_photos, table_row
from . import command_frame, read_options
from .options import AdaptedOptions


SOME_UNREADABLE = 3  # the exit code if some photos couldn't be read
NUM_PRINTED = 5  # labels
# A warning tells of a label that more than this share of at least so many photos got.
SUSPICIOUS_SHARE = 0.9
FEW_PHOTOS = 50


@dataclass
class PredictArguments(AdaptedOptions):
    """The model, and the file to write."""

    output: str | None = HfArg(default=None, help="The CSV file to write, which mustn't exist. Default: print it.")
    batch_size: int = HfArg(default=32, help="Photos classified at once.")


@command_frame("predict", "the same command starts anew")
def main(arguments: list[str] | None = None) -> None:
    """Label the photos; exit with 3 if some can't be read, whose rows then have no label."""
    description = (
        f"{__doc__} Its columns: {', '.join(COLUMNS)}. Photos that can't be read have a row without a label, and make "
        f"the exit code {SOME_UNREADABLE}."
    )
    photos = {
        "nargs": "+",
        "help": "One folder, which is searched at any depth; or photos, or patterns in quotes.",
    }
    options, sources = read_options("predict", description, PredictArguments, arguments, photos=photos)
    device = _check(options)
    photos = find_photos(sources.photos)
    model = load_adapted(options.model).to(device)
    with _open_output(options.output) as file:
        counts = _write_labels(file, photos, model, options.batch_size)
    if options.output is not None:
        print(f"Saved the labels of {counts.total()} photos to {options.output}.")
    _tell_most_frequent(counts)
    unreadable = len(photos) - counts.total()
    if unreadable:
        print(
            f"microclip predict: {unreadable} of {len(photos)} photos can't be read; their rows have no label.",
            file=sys.stderr,
        )
        sys.exit(SOME_UNREADABLE)


def _check(options: PredictArguments) -> torch.device:
    """The device; whatever else is wrong with the options is an error."""
    if options.batch_size < 1:
        raise ValueError(f"--batch_size is {options.batch_size}; pass 1 or more.")
    if options.output is not None:
        check_new_file(options.output, "--output")
    return choose_device(options.device, "--device")


@contextlib.contextmanager
def _open_output(path: str | None) -> Iterator[TextIO]:
    """The CSV file, which gets its name once it is complete, or what is printed. Both are UTF-8."""
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}  # file names may be any bytes
    if path is None:
        sys.stdout.reconfigure(**text)
        yield sys.stdout
        sys.stdout.flush()
        return
    # Rows are written as they come, so that an interruption loses none.
    try:
        with whole_file(path, keep=True) as incomplete, open(incomplete, "w", **text) as file:
            yield file
    except BaseException:
        print(
            f"microclip predict: the labels so far, if any, are in {incomplete}; rename it to keep them, since the "
            "same command starts anew.",
            file=sys.stderr,
        )
        raise


def _write_labels(
    file: TextIO, photos: dict[str, Path], model: MicroCLIPForImageClassification, batch_size: int
) -> Counter[str]:
    """A row for each photo; returns how many got which label."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    counts: Counter[str] = Counter()
    results = predict_photos(model, photos.values(), batch_size)
    for name, result in zip(photos, tqdm(results, "Photos", len(photos), unit="photo"), strict=True):
        if isinstance(result, Exception):
            tqdm.write(f"microclip predict: {photos[name]} can't be read: {result}", file=sys.stderr)
            writer.writerow(table_row(name, None))
        else:
            counts[result.label] += 1
            writer.writerow(table_row(name, result))
    return counts


def _tell_most_frequent(counts: Counter[str]) -> None:
    """Which labels are the most frequent, on stderr as stdout may be the table; a warning of one for nearly all."""
    if not counts:
        return
    shown = counts.most_common(NUM_PRINTED)
    others = f" and {len(counts) - len(shown)} other labels" if len(counts) > len(shown) else ""
    labels = ", ".join(f"{label} ({count})" for label, count in shown)
    print(f"The most frequent labels, with their numbers of photos: {labels}{others}.", file=sys.stderr)
    label, count = shown[0]
    if counts.total() >= FEW_PHOTOS and count > SUSPICIOUS_SHARE * counts.total():
        warnings.warn(
            f"{count} of {counts.total()} photos got the label {label!r}. If so many can't show that, the model "
            "doesn't fit these photos: look at some of them, and at the report of its adaptation.",
            stacklevel=2,
        )
