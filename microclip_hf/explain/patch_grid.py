"""Where a model's patches lie in the picture that its image processor was given.

A CLIP's image processor resizes a picture and cuts out its middle. Both are undone by one box, the part of the picture
that the patches share evenly among them. It sticks out where a picture smaller than the crop was padded.
"""

from dataclasses import dataclass

import numpy as np
from transformers import BaseImageProcessor


# Of a pixel's or a patch's area; less is rounding.
SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class PatchGrid:
    """A grid of patches over a picture.

    Args:
        image_size (`tuple[int, int]`): width and height of the picture in pixels, upright.
        box (`tuple[float, float, float, float]`): left, top, right and bottom of what the patches cover, in pixels of
            the picture; not always within it.
        shape (`tuple[int, int]`): rows and columns of patches.
    """

    image_size: tuple[int, int]
    box: tuple[float, float, float, float]
    shape: tuple[int, int]

    @classmethod
    def locate(cls, image_size: tuple[int, int], processor: BaseImageProcessor, patch_size: int) -> "PatchGrid":
        """The grid that a processor's settings amount to, for a picture of `image_size`.

        Args:
            processor (`BaseImageProcessor`): its resizing and its centre crop count (PIL back end; where torchvision's
                pads by an odd number, it is one pixel of the model's input off).
            patch_size (`int`): side of a patch in pixels of the model's input. What is left of the input at the right
                and at the bottom belongs to no patch.

        Raises:
            ValueError: if the processor resizes in another way than to a shortest edge, or to a height and a width.
        """
        width, height = _resized(image_size, processor)
        input_width, input_height = width, height
        if processor.do_center_crop:
            input_width = processor.crop_size.width
            input_height = processor.crop_size.height
        columns = input_width // patch_size
        rows = input_height // patch_size
        # In pixels of the resized picture. Rounded down, below zero too: padding has the odd pixel before the picture.
        left = (width - input_width) // 2
        top = (height - input_height) // 2
        # Back to the picture's own pixels. The sides' factors differ, since each was rounded to whole pixels.
        x_scale = image_size[0] / width
        y_scale = image_size[1] / height
        right = left + columns * patch_size
        bottom = top + rows * patch_size
        return cls(image_size, (left * x_scale, top * y_scale, right * x_scale, bottom * y_scale), (rows, columns))

    def boxes(self) -> np.ndarray:
        """Left, top, right and bottom of each patch in pixels of the picture, float64, `(rows, columns, 4)`."""
        x, y = self._edges()
        lefts, tops = np.meshgrid(x[:-1], y[:-1])
        rights, bottoms = np.meshgrid(x[1:], y[1:])
        return np.stack([lefts, tops, rights, bottoms], -1)

    def to_image(self, values: np.ndarray) -> np.ndarray:
        """Numbers or booleans of patches, `(rows, columns)`, as values of pixels, float32 `(height, width)`: the mean
        over a pixel's area, as far as it was seen; NaN where it wasn't. Another shape is a `ValueError`.
        """
        _check_shape(values, self.shape)
        # Sums along both axes at once, as matrix products: a pixel may share its area with several patches.
        down, across = self._overlaps()
        return _mean(down @ values.astype(np.float32) @ across.T, np.outer(down.sum(1), across.sum(1)))

    def to_patches(self, values: np.ndarray) -> np.ndarray:
        """Numbers or booleans of pixels, `(height, width)`, as values of patches, float32 `(rows, columns)`: the mean
        over a patch's area within the picture; NaN where all of it is padding. Another shape is a `ValueError`.
        """
        _check_shape(values, self.image_size[::-1])
        down, across = self._overlaps()
        return _mean(down.T @ values.astype(np.float32) @ across, np.outer(down.sum(0), across.sum(0)))

    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where columns of patches begin and end, `(columns + 1,)`, and rows, `(rows + 1,)`."""
        left, top, right, bottom = self.box
        rows, columns = self.shape
        return np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)

    def _overlaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths that pixels and patches share, downwards `(height, rows)` and across `(width, columns)`."""
        x, y = self._edges()
        width, height = self.image_size
        return _overlap(y, height), _overlap(x, width)


def _overlap(edges: np.ndarray, num_pixels: int) -> np.ndarray:
    pixel = np.arange(num_pixels)[:, None]
    lengths = np.minimum(pixel + 1, edges[1:]) - np.maximum(pixel, edges[:-1])
    return lengths.clip(0).astype(np.float32)


def _mean(total: np.ndarray, area: np.ndarray) -> np.ndarray:
    return np.divide(total, area, out=np.full_like(total, np.nan), where=area > SMALLEST_SHARE)


def _resized(image_size: tuple[int, int], processor: BaseImageProcessor) -> tuple[int, int]:
    """Width and height after resizing."""
    if not processor.do_resize:
        return image_size
    size = processor.size
    if size.height and size.width:
        return size.width, size.height
    if not size.shortest_edge or size.longest_edge:
        raise ValueError(
            f"The image processor's size is {dict(size)}; patches can be found in the picture where it is a "
            "shortest_edge, or a height and a width."
        )
    # Rounded down, as transformers does.
    width, height = (int(size.shortest_edge * length / min(image_size)) for length in image_size)
    return width, height


def _check_shape(values: np.ndarray, shape: tuple[int, int]) -> None:
    if values.shape != shape:
        raise ValueError(f"values has the shape {values.shape}; expected {shape}.")
