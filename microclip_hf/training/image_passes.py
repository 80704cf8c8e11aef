"""Images of a data set or a stream, to go through once: as prediction takes them, or as views."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..data.image_columns import gives_stored_images, stored_images
from ..data.photo_sources import NumberedPhotos, PhotoStream
from ..images import UNREADABLE, decode, to_rgb
from ..passes.photo_batches import NumberReader, PixelReader, Place
from ..passes.row_pass import PassSettings
from .kept_rows import ImagePass, Inputs
from .training_args import MicroCLIPTrainingArguments
from .view_datasets import StreamNotes, ViewDataset, ViewSettings, ViewStream


class WholeImageReader:
    """Reads an image as prediction does, `pixel_values` `(3, S, S)`, and if there are any its `crops`, uint8
    `(K, 3, S, S)`.
    """

    def __init__(self, processor: BaseImageProcessor, settings: ViewSettings) -> None:
        self.settings = settings
        self._read_pixels = PixelReader(processor)

    def __call__(self, image: Any, place: Place) -> Inputs | Exception:
        """Tensors by name, or why the image can't be read."""
        try:
            return self.prepare(image, place[1])
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
    reader = WholeImageReader(processor, settings)
    if isinstance(views, ViewStream):
        source = open_stream(views)
        read = reader
        notes = StreamNotes(settings)
        note, begin = notes.note, notes.begin
        in_threads = True
    else:
        source = NumberedPhotos(len(views))
        in_threads = gives_stored_images(views.dataset)
        images = stored_images(views.dataset) if in_threads else views.dataset
        read = NumberReader(images, reader)
        note, begin = views.note, None
    blank = reader.prepare(Image.new("RGB", (settings.size, settings.size)), 0) if is_split else None
    return ImagePass(source, read, note, in_threads, blank, begin)


def first_views(views: ViewDataset) -> ImagePass:
    """The views of the first epoch."""
    return ImagePass(NumberedPhotos(len(views)), ViewReader(views), views.note, gives_stored_images(views.dataset))


def open_stream(views: ViewStream) -> PhotoStream:
    """The images of a stream, in its own order."""
    return PhotoStream(views.dataset.select_columns(["image"]), {}, None)


def pass_settings(args: MicroCLIPTrainingArguments, title: str) -> PassSettings:
    """How a run's images are read."""
    return PassSettings(args.eval_batch_size, args.dataloader_num_workers, title, not args.disable_tqdm)
