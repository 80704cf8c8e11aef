"""How an image processor prepares photos, so that views in training and images in evaluation get the same pixels."""

from dataclasses import dataclass
from numbers import Real
from textwrap import shorten
from typing import Any

import torch
from PIL.Image import Image, Resampling, new
from transformers import BaseImageProcessor


# What the image processor is tried on: one colour, since any even resizing and cropping keeps it, of three different
# channels. The tolerance is a share of white; another channel order or a margin is off by far more.
PROBE_COLOR = (250, 120, 20)
TOLERANCE = 1 / 255
RESCALE = "set do_rescale=True"


@dataclass(frozen=True)
class Preparation:
    """An image processor's settings, in the terms of views: pixel values are `(rgb - mean) / std`, of rgb in [0, 1].

    Another rescale_factor than 1 / 255 is part of `mean` and `std`, and 0 and 1 stand for no normalisation.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Resampling

    @classmethod
    def of(cls, processor: BaseImageProcessor, size: int) -> "Preparation":
        """Read the settings of a processor of any class and back end, and try them.

        An error if it makes of a photo anything else than `size` x `size` resized and normalised pixels of it.
        """
        settings = processor.to_dict()
        if settings.get("do_resize") is False:
            raise _error(processor, "doesn't resize photos, and the model takes one size", "set do_resize=True")
        mean, std = _normalization(processor, settings)
        preparation = cls(mean, std, _resampling(processor, settings.get("resample")))
        for width, height in ((3 * size, 2 * size), (2 * size, 3 * size)):
            preparation._try(processor, new("RGB", (width, height), PROBE_COLOR), size)
        return preparation

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values `(batch_size, 3, height, width)` to [0, 1]."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        return pixel_values * torch.tensor(self.std).view(-1, 1, 1) + mean

    def _try(self, processor: BaseImageProcessor, photo: Image, size: int) -> None:
        of_photo = f"of a photo of {photo.width} x {photo.height}"
        try:
            pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
        except Exception as error:  # of anybody's class
            reason = shorten(str(error), 200)
            raise _error(processor, f"can't make pixel values {of_photo} ({reason})", "mend its settings") from error
        shape = tuple(pixel_values.shape)
        expected = (1, 3, size, size)
        if shape != expected:
            crop = f'set do_center_crop=True and crop_size={{"height": {size}, "width": {size}}}'
            advice = crop if shape[:-2] == expected[:-2] else "take a CLIPImageProcessor"
            raise _error(processor, f"makes {shape} pixel values {of_photo}; the model takes {expected}", advice)
        if not pixel_values.is_floating_point():
            raise _error(processor, f"makes {pixel_values.dtype} pixel values", RESCALE)
        color = torch.tensor(PROBE_COLOR).view(1, 3, 1, 1) / 255
        if not ((self.denormalize(pixel_values.float().cpu()) - color).abs() <= TOLERANCE).all():
            raise _error(
                processor,
                f"makes other pixel values {of_photo} than (photo - mean) / std, perhaps in a margin",
                f"resize to at least {size}, without padding, or take a CLIPImageProcessor",
            )


def _normalization(processor: BaseImageProcessor, settings: dict[str, Any]) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation of colours in [0, 1]."""
    factor = settings.get("rescale_factor") if settings.get("do_rescale") else 1.0
    if not isinstance(factor, Real) or not factor > 0:
        raise _error(processor, f"has rescale_factor={factor!r}", "pass a number above 0, such as 1 / 255")
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    if settings.get("do_normalize"):
        mean = _three(processor, "image_mean", settings.get("image_mean"))
        std = _three(processor, "image_std", settings.get("image_std"))
        if factor == 1 and max(mean) <= 1:
            raise _error(processor, f"doesn't rescale photos, and has a mean of colours in [0, 1], {mean}", RESCALE)
    if not min(std) > 0:
        raise _error(processor, f"has image_std={std}", "pass numbers above 0")
    # What the processor subtracts, in its own scale, in that of colours from 0 to 1.
    white = 255 * factor
    return tuple(value / white for value in mean), tuple(value / white for value in std)


def _three(processor: BaseImageProcessor, name: str, value: Any) -> tuple[float, ...]:
    values = [value] * 3 if isinstance(value, Real) else list(value or ())
    if len(values) != 3 or not all(isinstance(number, Real) for number in values):
        raise _error(processor, f"has {name}={value!r}", "pass three numbers, of red, green and blue")
    return tuple(map(float, values))


def _resampling(processor: BaseImageProcessor, value: Any) -> Resampling:
    if value is None:
        return Resampling.BILINEAR  # as transformers does
    try:
        # Torchvision's filters are called as PIL's are.
        return Resampling(value) if isinstance(value, int) else Resampling[value.name]
    except (AttributeError, KeyError, ValueError) as error:
        raise _error(processor, f"has resample={value!r}", "pass a filter of PIL's, such as 3 for bicubic") from error


def _error(processor: BaseImageProcessor, what: str, advice: str) -> ValueError:
    return ValueError(
        f"The image processor ({type(processor).__name__}) {what}; {advice}, in its preprocessor_config.json or in "
        "Python."
    )
