"""Images of a data set or a stream, to go through once: as prediction takes them, or as views."""

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..data.image_columns import stored_images
from ..data.photo_sources import Photo, PhotoSource, PhotoStream, Reader
from ..images import UNREADABLE, decode, to_rgb
from ..passes.photo_batches import PixelReader, Place
from ..passes.row_pass import PassSettings
from .kept_rows import ImagePass, Inputs
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import StreamNotes, ViewDataset, ViewSettings, ViewStream


class Numbers(PhotoSource, Reader):
    """The numbers of a data set's images, which are fetched by whoever reads them."""

    num_shards = 1

    def __init__(self, total: int) -> None:
        self.total = total
        self.end = total
        self.facts = {}

    def open(self, shard: int, first: int) -> "Numbers":
        """Itself."""
        return self

    def take(self, first: int, stop: int) -> list[Photo]:
        """As in the base class, in any order."""
        return [Photo(f"image {number}", number) for number in range(first, min(stop, self.end))]


class WholeImageReader:
    """Reads an image as prediction does, `pixel_values` `(3, S, S)`, and if there are any its `crops`, uint8
    `(K, 3, S, S)`. With a `dataset` it is given numbers of images.
    """

    def __init__(self, processor: BaseImageProcessor, settings: ViewSettings, dataset: Any = None) -> None:
        self.settings = settings
        self.dataset = dataset
        self._read_pixels = PixelReader(processor)

    def __call__(self, image: Any, place: Place) -> Inputs | Exception:
        """Tensors by name, or why the image can't be read."""
        try:
            return self.prepare(image if self.dataset is None else self.dataset[image]["image"], place[1])
        except UNREADABLE as error:
            return error

    def prepare(self, image: Any, row: int) -> Inputs:
        """Of an image, PIL or undecoded."""
        # What others hold too isn't drafted, nor closed.
        pixels = self._read_pixels(image if isinstance(image, dict) else to_rgb(decode(image)).copy())
        if isinstance(pixels, Exception):
            raise pixels
        if self.settings.num_crops == 0:
            return {"pixel_values": pixels}
        crops = self.settings.make_example({"image": image}, 0, row)["crops"]
        return {"pixel_values": pixels, "crops": torch.tensor(crops)}


class ViewReader:
    """Reads the views of a data set's image that a prior is made of: `weak` `(3, S, S)` and `crops` `(K, 3, S, S)`."""

    def __init__(self, views: ViewDataset) -> None:
        self.views = views

    def __call__(self, number: int, place: Place) -> Inputs | Exception:
        """Tensors by name, or why the image can't be read."""
        try:
            example = self.views.make_example(number)
        except UNREADABLE as error:
            return error
        return {name: torch.tensor(np.ascontiguousarray(example[name])) for name in ("weak", "crops")}


def whole_images(
    views: ViewDataset | ViewStream, processor: BaseImageProcessor, settings: ViewSettings, is_split: bool
) -> ImagePass:
    """The images as prediction takes them, with the settings' crops; for a model that `is_split` over processes."""
    if isinstance(views, ViewStream):
        source = open_stream(views)
        reader = WholeImageReader(processor, settings)
        notes = StreamNotes(settings)
        note, begin = notes.note, notes.begin
        in_threads = True
    else:
        source = Numbers(len(views))
        in_threads = _is_plain(views.dataset)
        images = stored_images(views.dataset) if in_threads else views.dataset
        reader = WholeImageReader(processor, settings, images)
        note, begin = views.note, None
    blank = reader.prepare(Image.new("RGB", (settings.size, settings.size)), 0) if is_split else None
    return ImagePass(source, reader, note, in_threads, blank, begin)


def first_views(views: ViewDataset) -> ImagePass:
    """The views of the first epoch."""
    return ImagePass(Numbers(len(views)), ViewReader(views), views.note, _is_plain(views.dataset))


def open_stream(views: ViewStream) -> PhotoStream:
    """The images of a stream, in its own order."""
    return PhotoStream(views.dataset.select_columns(["image"]), {}, None)


def pass_settings(args: MicroCLIPTrainingArguments, title: str) -> PassSettings:
    """How a run's images are read."""
    return PassSettings(args.eval_batch_size, args.dataloader_num_workers, title, not args.disable_tqdm)


def _is_plain(dataset: Any) -> bool:
    """Whether it is a data set of `datasets` whose images come as they are stored, which threads may read."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] is not None:
        return False
    feature = dataset.features.get("image")
    return isinstance(feature, datasets.Image) and feature.mode is None
