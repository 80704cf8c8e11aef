"""How long a run will take, from a few pieces of it that are timed: views of some photos, forwards of some views.

Nothing of the run is changed by it: no random number is drawn, no gradient kept, no image left out.
"""

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..images import UNREADABLE
from .trainer import MicroCLIPTrainer
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import ViewCollator, ViewDataset, ViewSettings, ViewStream


NUM_PHOTOS = 4  # whose views are made
NUM_VIEWS = 64  # encoded at once, at most
PIECE_SECONDS = 0.2  # for encoding views at once, unless one alone takes longer
# Photos of a stream of unknown length, by which its pass is estimated.
STREAMED = 1000
# A forward with its backward takes about as long as so many forwards.
STUDENT_FORWARDS = 3

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pieces:
    """Seconds that the pieces of a run take, each for one image or view."""

    all_views: float  # to make them, crops included
    step_views: float  # to make those that each step needs
    weak: float  # to encode a weak view with both of its embeddings
    crop: float  # to encode a crop
    student: float  # a forward of the strong view


def describe_cost(
    trainer: MicroCLIPTrainer, examples: list[dict[str, Any]], clock: Clock = time.perf_counter
) -> str | None:
    """A sentence about a run that starts afresh, such as "720 photos x 15 epochs: about 24 min on this machine.".

    A few images of the training data are timed, or of a stream, which would have to be read, the `examples`. `None`
    where none can be read, the data makes its own views, or a model is split or compiled.
    """
    args = trainer.args
    is_plain = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.torch_compile)
    if not is_plain or not isinstance(trainer.train_dataset, (ViewDataset, ViewStream)):
        return None
    with _same_random_numbers():
        pieces = _time_pieces(trainer, examples, clock)
    if pieces is None:
        return None
    is_endless = trainer.num_images is None
    num_images = STREAMED if is_endless else trainer.num_images
    epochs = f"{args.num_train_epochs:g} epoch{'' if args.num_train_epochs == 1 else 's'}"
    amount = f"{num_images} photos x {epochs}" if args.num_train_epochs > 0 else f"{num_images} photos, once"
    if is_endless:
        amount = f"Each {STREAMED} photos of the stream"
    num_shown = num_images * args.num_train_epochs
    if args.max_steps > 0:
        images_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        amount = f"{args.max_steps} steps x {images_a_step} photos"
        num_shown = args.max_steps * images_a_step
    seconds = estimate_seconds(pieces, args, num_shown, num_images)
    return f"{amount}: {describe_duration(seconds)} on this machine."


def estimate_seconds(pieces: Pieces, args: MicroCLIPTrainingArguments, num_shown: float, num_images: int) -> float:
    """Seconds of training that shows `num_shown` images, of which there are `num_images`; saving isn't counted."""
    passes = (args.class_mixture or args.class_frequencies == "estimated") + (args.class_mixture and num_shown > 0)
    # Each of them encodes a photo and its crops, with both embeddings.
    views = pieces.all_views if args.num_crops > 0 else pieces.step_views / 2
    encoding = (args.num_crops + 1) * pieces.weak
    whole = passes * num_images * _side_by_side(args, views, encoding) / args.world_size
    return whole + _estimate_steps(pieces, args, num_shown, num_images)


def _estimate_steps(pieces: Pieces, args: MicroCLIPTrainingArguments, num_shown: float, num_images: int) -> float:
    if args.label_refresh == "never":
        return num_shown * _side_by_side(args, pieces.step_views, STUDENT_FORWARDS * pieces.student) / args.world_size
    step = pieces.weak + STUDENT_FORWARDS * pieces.student
    crops = args.num_crops * pieces.crop
    if args.prior_refresh == "never":
        # Once over all images, the weak view too, which counts as a crop there.
        once = num_images * _side_by_side(args, pieces.all_views, pieces.crop + crops)
        return (once + num_shown * _side_by_side(args, pieces.step_views, step)) / args.world_size
    return num_shown * _side_by_side(args, pieces.all_views, step + crops) / args.world_size


def describe_duration(seconds: float) -> str:
    """As people say it: "less than a minute", "about 24 min" (up to 120), "about 3 hours"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return "less than a minute"
    return f"about {minutes} min" if minutes <= 120 else f"about {minutes / 60:.0f} hours"


def _side_by_side(args: MicroCLIPTrainingArguments, views: float, model: float) -> float:
    """Seconds an image, where worker processes, if any, make views while a device computes."""
    views /= max(1, args.dataloader_num_workers)
    # On a CPU both want the same cores.
    is_apart = args.dataloader_num_workers > 0 and args.device.type != "cpu"
    return max(views, model) if is_apart else views + model


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What comes after draws the random numbers that it would have drawn."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # on others nothing is drawn
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@torch.no_grad()
def _time_pieces(trainer: MicroCLIPTrainer, examples: list[dict[str, Any]], clock: Clock) -> Pieces | None:
    settings = trainer.train_dataset.settings
    made, all_views = _time_making(trainer.train_dataset, examples, settings, clock)
    if not made:
        return None
    step_views = all_views
    if trainer.args.prior_refresh == "never":
        _, step_views = _time_making(trainer.train_dataset, examples, replace(settings, num_crops=0), clock)
    batch = {name: views.to(trainer.args.device) for name, views in ViewCollator()(made).items()}
    labeler = trainer.labeler
    model = trainer.model

    def encode_weak(views: torch.Tensor) -> torch.Tensor:
        return labeler.encode_views(lambda pixels: model.encode_image(pixels).fg_embeds, views)

    def encode_crops(views: torch.Tensor) -> torch.Tensor:
        return labeler.encode_views(model.coarse_embeds, views)

    def student(views: torch.Tensor) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return model(pixel_values=labeler.normalize(views)).logits

    encode_weak(batch["weak"][:1])  # what comes first takes longer
    return Pieces(
        all_views,
        step_views,
        _time_encoding(encode_weak, batch["weak"], labeler.chunk_size, clock),
        _time_encoding(encode_crops, batch["weak"], labeler.chunk_size, clock),
        _time_encoding(student, batch["strong"], trainer.args.train_batch_size, clock),
    )


def _time_making(
    dataset: ViewDataset | ViewStream, examples: list[dict[str, Any]], settings: ViewSettings, clock: Clock
) -> tuple[list[dict[str, Any]], float]:
    """Views of a few photos from all over a data set, and the seconds that a photo takes, reading it included."""
    photos = dataset.dataset if isinstance(dataset, ViewDataset) else examples
    step = max(1, len(photos) // NUM_PHOTOS)
    made = []
    seconds = 0.0
    for index in itertools.islice(range(0, len(photos), step), NUM_PHOTOS):
        with contextlib.suppress(*UNREADABLE):
            if not made:
                settings.make_example(photos[index], 0, index)  # what comes first takes longer
            start = clock()
            example = settings.make_example(photos[index], 0, index)
            seconds += clock() - start
            made.append({name: example[name] for name in ("weak", "strong")})
    return made, seconds / max(1, len(made))


def _time_encoding(
    encode: Callable[[torch.Tensor], torch.Tensor], views: torch.Tensor, most: int, clock: Clock
) -> float:
    """Seconds that a view takes among as many as a run encodes at once, or as `PIECE_SECONDS` allow."""
    alone = min(_time_once(encode, views[:1], clock) for _ in range(2))
    number = int(min(most, NUM_VIEWS, PIECE_SECONDS / max(alone, 1e-6)))
    if number <= 1:
        return alone
    views = views[torch.arange(number) % len(views)]
    # Other programs may have had the cores for a while.
    return statistics.median(_time_once(encode, views, clock) for _ in range(3)) / number


def _time_once(encode: Callable[[torch.Tensor], torch.Tensor], views: torch.Tensor, clock: Clock) -> float:
    start = clock()
    encode(views)[0].sum().item()  # which waits for the device
    return clock() - start
