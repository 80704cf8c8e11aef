"""`microclip predict`: unlabelled photos -> a CSV or Parquet file with the best classes of each."""

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from ..data.class_names import read_class_names
from ..data.photo_sources import PhotoSource, open_hub_photos, open_photos
from ..files import check_new_file
from ..loading import load_adapted
from ..prediction.labelling import LabelCounts, LabelSettings, label_photos, print_aside, print_labels
from ..prediction.predictions import Classifier, column_names
from . import command_frame, naming_options, read_options
from .options import AdaptedOptions, check_files, start_processes
from .parser import missing_error


COLUMNS = tuple(column_names(2))
SOME_UNREADABLE = 3  # the exit code if some photos couldn't be read
NUM_PRINTED = 5  # labels
# A warning tells of a label that more than this share of at least so many photos got.
SUSPICIOUS_SHARE = 0.9
FEW_PHOTOS = 50


@dataclass
class PredictArguments(AdaptedOptions):
    """The model, the photos of a table, and the file to write."""

    output: str | None = HfArg(
        default=None,
        help="The file to write, which mustn't exist: Parquet if it ends in .parquet, else CSV. Default: print CSV.",
    )
    classes: str | None = HfArg(
        default=None,
        help="Text file with one class name a line, or JSON: only these of the model's classes count, and scores sum "
        "to 1 over them.",
    )
    top_k: int = HfArg(default=2, help="How many classes of a photo are named.")
    precision: Literal["float32", "bfloat16"] = HfArg(default="float32", help="Of the vision tower.")
    exact_pixels: bool = HfArg(
        default=False,
        help="Prepare large photos as the pipeline does: JPEGs decoded whole, not at 1/2, 1/4 or 1/8 where that is "
        "still large enough, and all resized by Pillow in place of torch.",
    )
    batch_size: int = HfArg(default=32, help="Photos classified at once.")
    num_workers: int | None = HfArg(
        default=None,
        help="Processes that read photos, for each that classifies; 0 reads them in threads. Default: 0 on a CPU, "
        "beside a GPU on Linux all cores but one, up to 16.",
    )
    dataset_name: str | None = HfArg(
        default=None, help="Photos of a data set on the Hub, or of a copy of its repository."
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of --dataset_name.")
    dataset_revision: str | None = HfArg(default=None, help="Its commit, branch or tag.")
    dataset_split: str | None = HfArg(default=None, help="Its split. Default: 'train'.")
    streaming: bool = HfArg(default=False, help="Read --dataset_name as it is labelled, in place of before.")
    image_column: str | None = HfArg(default=None, help="Column of photos in a table. Default: the only one.")


@command_frame("predict", "give the same command again")
def main(arguments: list[str] | None = None) -> None:
    """Label the photos; of one process the exit code is 3 if some can't be read, whose rows then have no label."""
    description = (
        f"{__doc__} Its columns: {', '.join(COLUMNS)}. Photos that can't be read have a row without a label, and make "
        f"the exit code {SOME_UNREADABLE}. Interrupted, the same command goes on. `accelerate launch "
        "examples/predict.py` does the same with several processes."
    )
    photos = {
        "nargs": "*",
        "default": [],
        "help": "One folder, which is searched at any depth; or photos, or patterns in quotes; or a folder, files or "
        "patterns of Parquet, WebDataset (.tar) or Arrow files.",
    }
    options, sources = read_options("predict", description, PredictArguments, arguments, photos=photos)
    _check(options, sources.photos)
    state, device = start_processes(options.device)
    if state.num_processes > 1 and options.output is None:
        raise ValueError(f"{state.num_processes} processes need an --output to write to.")
    if not state.is_main_process:
        warnings.simplefilter("ignore")  # the first process tells
    class_names = None if options.classes is None else read_class_names(options.classes)
    with naming_options("image_column"):
        source = _open(options, sources.photos)
    with state.local_main_process_first():  # of a model of the Hub one process downloads the files
        model = load_adapted(options.model).to(device)
    with naming_options("top_k"):
        classify = Classifier(model, class_names, options.top_k, options.precision)
    settings = LabelSettings(options.batch_size, options.num_workers, exact_pixels=options.exact_pixels, tell=_tell)
    if options.output is None:
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
        counts = print_labels(classify, source, sys.stdout, settings)
        sys.stdout.flush()
    else:
        counts = label_photos(classify, source, options.output, settings)
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()
    if counts is not None:
        _finish(options, counts, state.num_processes)


def _check(options: PredictArguments, photos: list[str]) -> None:
    """Refuse what is wrong with the options."""
    for name, lowest in (("batch_size", 1), ("num_workers", 0)):
        value = vars(options)[name]
        if value is not None and value < lowest:
            raise ValueError(f"--{name} is {value}; pass {lowest} or more.")
    if not photos and options.dataset_name is None:
        raise missing_error("microclip predict", ["photos"])
    if photos and options.dataset_name is not None:
        raise ValueError("Pass either photos, or --dataset_name for a data set of the Hub.")
    names = ("dataset_config", "dataset_revision", "dataset_split", "streaming")
    lost = [f"--{name}" for name in names if vars(options)[name] and options.dataset_name is None]
    if lost:
        raise ValueError(f"{', '.join(lost)} only goes with --dataset_name; leave it out.")
    check_files(options, "classes")
    if options.output is not None:
        check_new_file(options.output, "--output")


def _open(options: PredictArguments, photos: list[str]) -> PhotoSource:
    if options.dataset_name is None:
        return open_photos(photos, options.image_column)
    return open_hub_photos(
        options.dataset_name,
        options.dataset_config,
        options.dataset_revision,
        options.dataset_split or "train",
        options.image_column,
        options.streaming,
    )


def _tell(problem: str) -> None:
    print_aside(f"microclip predict: {problem}")


def _finish(options: PredictArguments, counts: LabelCounts, num_processes: int) -> None:
    if options.output is not None:
        print(f"Saved the labels of {counts.labels.total()} photos to {options.output}.")
    _tell_most_frequent(counts.labels)
    if counts.num_unreadable:
        _tell(f"{counts.num_unreadable} of {counts.num_photos} photos can't be read; their rows have no label.")
        if num_processes == 1:  # others of a launch would be taken to have failed
            sys.exit(SOME_UNREADABLE)


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
