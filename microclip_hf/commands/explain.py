"""`microclip explain`: a photo -> its label, and a picture of where an adapted model looked."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from transformers.hf_argparser import HfArg

from ..explain import Explanation, explain, overlay, plot
from ..files import check_new_file, whole_file
from ..images import UNREADABLE, to_rgb
from ..loading import choose_device, load_adapted
from . import command_frame, read_options
from .options import AdaptedOptions


ENDINGS = (".png", ".jpg", ".jpeg")


@dataclass
class ExplainArguments(AdaptedOptions):
    """The model, and the picture to draw."""

    output: str = HfArg(help=f"The picture to write ({', '.join(ENDINGS)}), which mustn't exist.")
    show: Literal["all", "fg_attention", "saliency_mask"] = HfArg(
        default="all",
        help="Attention over the photo at its own size, the salient patches likewise, or both beside the scores.",
    )


@command_frame("explain", "no picture was written")
def main(arguments: list[str] | None = None) -> None:
    """Check the input, print what the model says of the photo, and draw why."""
    photo = {"nargs": "+", "help": "One photo."}
    options, others = read_options("explain", __doc__, ExplainArguments, arguments, photo=photo)
    device = _check(options, others.photo)
    (path,) = others.photo
    image = _read(path)
    model = load_adapted(options.model).to(device)
    (explanation,) = explain(model, [image])
    _draw(explanation, options)
    best, second = explanation.scores.argsort()[::-1][:2]
    names, scores = explanation.class_names, explanation.scores
    print(f"{path}: {names[best]} ({scores[best]:.1%}), then {names[second]} ({scores[second]:.1%})")
    print(f"Saved to {options.output}.")


def _check(options: ExplainArguments, photos: list[str]) -> torch.device:
    """The device; whatever else is wrong with the options is an error."""
    if len(photos) > 1:
        raise ValueError(f"There are {len(photos)} photos; pass one, and run the command again for each other.")
    if os.path.isdir(photos[0]):
        raise ValueError(f"{photos[0]} is a folder; pass one photo.")
    check_new_file(options.output, "--output")
    if Path(options.output).suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {options.output} must end in one of {', '.join(ENDINGS)}, as in where.png.")
    return choose_device(options.device, "--device")


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from error


def _draw(explanation: Explanation, options: ExplainArguments) -> None:
    with whole_file(options.output) as incomplete:
        if options.show == "all":
            plot(explanation).savefig(incomplete, dpi=150)
        else:
            overlay(explanation, show=options.show).save(incomplete)
