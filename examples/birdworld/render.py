"""Birds drawn with PIL on a canvas of 192 x 192, reduced to the size asked for; with the bird's own pixels as a mask.

A place in the bird's own units is (x, y): x to its front, y down, the body's centre at (0, 0), about 1.8 units from
bill to tail.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .birds import COLORS, Bird


CANVAS = 192
PLACES = {
    "sky": ((150, 190, 226), (190, 210, 232), (120, 160, 212)),
    "water": ((68, 118, 150), (92, 142, 172), (58, 98, 132)),
    "sand": ((208, 186, 142), (222, 204, 164), (188, 162, 118)),
    "meadow": ((84, 122, 70), (110, 146, 84), (64, 96, 58)),
    "snow": ((226, 230, 236), (206, 214, 226), (240, 240, 244)),
    "rock": ((120, 116, 112), (146, 140, 134), (98, 96, 96)),
}
Color = tuple[int, int, int]
# Points in units and a colour.
Shape = tuple[np.ndarray, Color]

_TURN = np.linspace(0, 2 * math.pi, 22, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)


@dataclass(frozen=True)
class Look:
    """How a domain's pictures look. Pairs are ranges that each picture draws from."""

    places: tuple[str, ...] = tuple(PLACES)
    clutter: tuple[int, int] = (3, 14)  # things in the background
    scale: tuple[float, float] = (64, 100)  # canvas pixels a unit; a large bird is drawn 1.2 times as big
    offset: float = 0.08  # of the canvas, at most
    tilt: float = 0.2  # radians, at most
    mirrored: float = 0.5  # probability
    twigs: tuple[int, int] = (0, 0)  # in front of the bird
    blur: tuple[float, float] = (0, 0)  # radius, canvas pixels
    gain: tuple[float, float] = (1, 1)  # brightness
    cast: tuple[float, float, float] = (1, 1, 1)  # factors of red, green, blue
    haze: tuple[float, float] = (0, 0)  # share of `haze_color`
    haze_color: Color = (210, 214, 218)
    noise: float = 0  # standard deviation at most, of 255
    grey: tuple[float, float] = (0, 0)  # share of colour that is lost
    pencil: float = 0  # strength of outlines on washed-out paper


def render(bird: Bird, place: str, look: Look, rng: random.Random, size: int = 64) -> Image.Image:
    """A picture of the bird; see [`render_with_mask`]."""
    return _render(bird, place, look, rng, size, with_mask=False)[0]


def render_with_mask(
    bird: Bird, place: str, look: Look, rng: random.Random, size: int = 64
) -> tuple[Image.Image, Image.Image]:
    """A picture and, from the same chances, the pixels that show the bird.

    Args:
        bird (`dict[str, str]`): its attributes.
        place (`str`): one of `PLACES`.
        look (`Look`): the domain's look.
        rng (`random.Random`): all that varies is drawn from it.
        size (`int`): side in pixels, a divisor of 192.

    Returns:
        The picture, RGB, and the mask, mode "L": 255 where at least half of a pixel is bird, else 0.

    Raises:
        ValueError: if `size` doesn't divide 192.
    """
    image, mask = _render(bird, place, look, rng, size, with_mask=True)
    return image, mask


def _render(
    bird: Bird, place: str, look: Look, rng: random.Random, size: int, with_mask: bool
) -> tuple[Image.Image, Image.Image | None]:
    if CANVAS % size:
        raise ValueError(f"size is {size}; it must divide {CANVAS}.")
    image = Image.new("RGB", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    draw_background(draw, place, look, rng)
    shapes = place_bird(bird_shapes(bird, rng), bird, look, rng)
    twigs = [twig(rng) for _ in range(rng.randint(*look.twigs))]
    for points, color in shapes + twigs:
        draw.polygon(points, fill=color)
    image = finish(image, look, rng, size)
    if not with_mask:
        return image, None
    mask = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(mask)
    for points, _ in shapes:
        draw.polygon(points, fill=255)
    for points, _ in twigs:
        draw.polygon(points, fill=0)
    return image, mask.reduce(CANVAS // size).point(lambda value: 255 if value > 127 else 0)


def draw_background(draw: ImageDraw.ImageDraw, place: str, look: Look, rng: random.Random) -> None:
    """Bands of the place's colours, and clutter: blobs, leaves and stalks, some as colourful as birds."""
    palette = PLACES[place]
    top, bottom = (np.array(vary(rng.choice(palette), rng, 18)) for _ in range(2))
    bands = 12
    for band in range(bands):
        color = top + (bottom - top) * band // (bands - 1)
        draw.rectangle((0, band * CANVAS // bands, CANVAS, (band + 1) * CANVAS // bands), fill=tuple(color.tolist()))
    for _ in range(rng.randint(*look.clutter)):
        x, y, kind = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.random()
        color = rng.choice(palette) if rng.random() < 0.75 else COLORS[rng.choice(list(COLORS))]
        color = vary(color, rng, 30)
        if kind < 0.4:
            width, height = rng.uniform(6, 32), rng.uniform(6, 32)
            draw.ellipse((x - width, y - height, x + width, y + height), fill=color)
        elif kind < 0.75:
            draw.polygon(leaf(x, y, rng.uniform(12, 58), rng.uniform(2, 9), rng), fill=color)
        else:
            angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(20, 90)
            end = (x + math.cos(angle) * length, y + math.sin(angle) * length)
            draw.line((x, y, *end), fill=color, width=rng.randint(2, 6))


def bird_shapes(bird: Bird, rng: random.Random) -> list[Shape]:
    """The bird's parts in units, from back to front."""
    colors = {part: vary(COLORS[bird[part]], rng, 10) for part in ("head", "belly", "wing", "tail_color")}
    bill, legs = vary(COLORS[bird["bill"]], rng, 10), vary(COLORS[bird["legs"]], rng, 10)
    shapes = [*_legs(legs, rng), _tail(bird["tail"], colors["tail_color"])]
    shapes.append((ellipse(0, 0.02, 0.5, 0.36, -0.15), colors["belly"]))
    shapes += _breast_marks(bird["breast"], colors["belly"])
    lift = rng.uniform(0, 0.18)
    shade = tuple(int(value * 0.78) for value in colors["wing"])
    shapes += [
        (ellipse(-0.14, -0.08, 0.42, 0.21, lift), shade),
        (ellipse(-0.12, -0.1, 0.38, 0.17, lift), colors["wing"]),
    ]
    if bird["bars"] != "none":
        shapes += [(_bar(x), COLORS[bird["bars"]]) for x in (0.04, -0.2)]
    return shapes + _head(bird, colors["head"], bill, rng)


def _legs(color: Color, rng: random.Random) -> list[Shape]:
    x, width = rng.uniform(-0.08, 0.06), 0.045
    shapes = []
    for foot in (x, x + 0.2):
        shin = polygon(foot - width, 0.28, foot + width, 0.28, foot + width, 0.58, foot - width, 0.58)
        toes = polygon(foot - width, 0.54, foot + 0.16, 0.56, foot + 0.16, 0.63, foot - width, 0.63)
        shapes += [(shin, color), (toes, color)]
    return shapes


def _tail(kind: str, color: Color) -> Shape:
    outlines = {
        "short": (-0.3, -0.16, -0.72, -0.1, -0.72, 0.2, -0.3, 0.18),
        "long": (-0.3, -0.14, -1.12, 0.06, -1.1, 0.32, -0.3, 0.18),
        "forked": (-0.3, -0.16, -1.04, -0.26, -0.66, 0.06, -1.0, 0.44, -0.3, 0.18),
        "fanned": (-0.28, -0.1, -0.74, -0.42, -0.94, -0.08, -0.94, 0.26, -0.72, 0.56, -0.28, 0.16),
    }
    return polygon(*outlines[kind]), color


def _breast_marks(kind: str, belly: Color) -> list[Shape]:
    if kind == "plain":
        return []
    color = (40, 34, 34) if sum(belly) > 260 else (226, 220, 206)
    shapes = []
    for mark in range(6):
        x, y = -0.2 + 0.095 * mark, 0.24 - 0.0063 * mark * mark + (0.05 if mark % 2 else -0.02)
        if kind == "spotted":
            shapes.append((ellipse(x, y, 0.045, 0.045), color))
        else:
            shapes.append(
                (polygon(x - 0.024, y - 0.1, x + 0.024, y - 0.1, x + 0.014, y + 0.1, x - 0.024, y + 0.1), color)
            )
    return shapes


def _bar(x: float) -> np.ndarray:
    return polygon(x - 0.05, -0.24, x + 0.05, -0.24, x - 0.02, 0.06, x - 0.12, 0.06)


def _head(bird: Bird, color: Color, bill: Color, rng: random.Random) -> list[Shape]:
    x, y, radius = 0.4, -0.36 + rng.uniform(-0.03, 0.03), 0.29
    shapes = []
    tip, root = x + radius + 0.34, x + radius - 0.08
    if bird["bill"] != "black":
        shapes.append((polygon(root, y - 0.13, tip + 0.04, y + 0.06, root, y + 0.19), (60, 56, 52)))
    shapes.append((polygon(root, y - 0.1, tip, y + 0.06, root, y + 0.16), bill))
    if bird["crest"] == "pointed":
        shapes.append((polygon(x + 0.12, y - 0.24, x - 0.28, y - 0.6, x - 0.26, y - 0.02), color))
    shapes.append((ellipse(x, y, radius, radius), color))
    if bird["eye_ring"] == "white":
        shapes.append((ellipse(x + 0.11, y - 0.04, 0.13, 0.13), (250, 250, 250)))
    return [*shapes, (ellipse(x + 0.11, y - 0.04, 0.06, 0.06), (12, 10, 12))]


def place_bird(shapes: list[Shape], bird: Bird, look: Look, rng: random.Random) -> list[tuple[list[tuple], Color]]:
    """From units to the canvas: scale, tilt, mirror and shift."""
    scale = rng.uniform(*look.scale) * (1.2 if bird["size"] == "large" else 1)
    angle, reach = rng.uniform(-look.tilt, look.tilt), look.offset * CANVAS
    flip = -1 if rng.random() < look.mirrored else 1
    turn = scale * np.array([[flip * math.cos(angle), math.sin(angle)], [-flip * math.sin(angle), math.cos(angle)]])
    center = np.array([CANVAS / 2 + rng.uniform(-reach, reach), CANVAS / 2 + rng.uniform(-reach, reach) + 4])
    counts = np.cumsum([len(points) for points, _ in shapes])[:-1]
    placed = np.split(np.concatenate([points for points, _ in shapes]) @ turn + center, counts)
    return [(list(map(tuple, points.tolist())), color) for points, (_, color) in zip(placed, shapes, strict=True)]


def twig(rng: random.Random) -> tuple[list[tuple], Color]:
    """A leaf in front of everything, near the middle."""
    x, y = (CANVAS / 2 + rng.uniform(-0.3, 0.3) * CANVAS for _ in range(2))
    return leaf(x, y, rng.uniform(14, 34), rng.uniform(2, 6), rng), vary((70, 110, 60), rng, 24)


def finish(image: Image.Image, look: Look, rng: random.Random, size: int) -> Image.Image:
    """What lies between the scene and the picture: blur, reduction, weather, light and camera."""
    if (radius := rng.uniform(*look.blur)) > 0.2:
        image = image.filter(ImageFilter.BoxBlur(radius))
    if look.pencil:
        image = sketch(image, look.pencil)
    image = image.reduce(CANVAS // size)
    if look == Look(**{**vars(look), "gain": (1, 1), "cast": (1, 1, 1), "haze": (0, 0), "noise": 0, "grey": (0, 0)}):
        return image
    pixels = np.asarray(image, dtype=np.float32)
    grey = rng.uniform(*look.grey)
    pixels = (1 - grey) * pixels + grey * pixels.mean(-1, keepdims=True)
    haze = rng.uniform(*look.haze)
    pixels = (1 - haze) * pixels + haze * np.array(look.haze_color, dtype=np.float32)
    pixels = pixels * rng.uniform(*look.gain) * np.array(look.cast, dtype=np.float32)
    if look.noise:
        normal = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, dtype=np.float32)
        pixels = pixels + rng.uniform(0.4, 1) * look.noise * normal
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sketch(image: Image.Image, strength: float) -> Image.Image:
    """Coloured pencil: dark outlines, pale colours on paper."""
    edges = image.convert("L").filter(ImageFilter.FIND_EDGES).filter(ImageFilter.BoxBlur(1.5))
    paper = Image.blend(image, Image.new("RGB", image.size, (250, 246, 236)), strength)
    return Image.composite(Image.new("RGB", image.size, (60, 56, 54)), paper, edges.point(lambda v: min(255, 2 * v)))


def ellipse(x: float, y: float, width: float, height: float, angle: float = 0) -> np.ndarray:
    """Points of an ellipse with half axes `width` and `height`, shape (22, 2)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return _CIRCLE * (width, height) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def polygon(*coordinates: float) -> np.ndarray:
    """Points from x, y, x, y, ..., shape (n, 2)."""
    return np.array(coordinates, dtype=float).reshape(-1, 2)


def leaf(x: float, y: float, length: float, width: float, rng: random.Random) -> list[tuple[float, float]]:
    """A pointed leaf around a place on the canvas, at any angle."""
    angle = rng.uniform(0, 2 * math.pi)
    along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    corners = np.array([-length * along, width * across, length * along, -width * across])
    return list(map(tuple, (corners + np.array([x, y])).tolist()))


def vary(color: Color, rng: random.Random, amount: float) -> Color:
    """The colour a little lighter or darker, each channel a little its own way."""
    light = rng.uniform(-amount, amount)
    return tuple(int(min(255, max(0, value + light + rng.uniform(-amount / 2, amount / 2)))) for value in color)
