"""What a bird is: twelve attributes. Species are attribute combinations, in groups of look-alikes."""

import random
import zlib


COLORS = {
    "red": (206, 38, 42),
    "orange": (240, 132, 28),
    "yellow": (246, 218, 50),
    "green": (50, 148, 64),
    "blue": (46, 92, 208),
    "purple": (138, 60, 172),
    "brown": (122, 78, 44),
    "black": (30, 28, 32),
    "white": (244, 244, 240),
    "grey": (140, 142, 148),
}
COLOR_NAMES = tuple(COLORS)
ATTRIBUTES = {
    "head": COLOR_NAMES,
    "belly": COLOR_NAMES,
    "wing": COLOR_NAMES,
    "tail_color": COLOR_NAMES,
    "bars": ("none", "white", "yellow"),
    "breast": ("plain", "spotted", "streaked"),
    "bill": ("black", "yellow", "orange", "grey"),
    "legs": ("black", "yellow", "red", "grey"),
    "eye_ring": ("none", "white"),
    "size": ("small", "large"),
    "tail": ("short", "long", "forked", "fanned"),
    "crest": ("none", "pointed"),
}
# A genus is a shape of tail, with or without a crest.
GENERA = {
    "finch": ("short", "none"),
    "thrush": ("long", "none"),
    "swallow": ("forked", "none"),
    "wren": ("fanned", "none"),
    "kingfisher": ("short", "pointed"),
    "jay": ("long", "pointed"),
    "tern": ("forked", "pointed"),
    "hoopoe": ("fanned", "pointed"),
}
# Look-alikes differ in these; the shape is the genus's.
DISTINGUISHING = ("bars", "breast", "bill", "legs", "eye_ring", "head", "belly", "wing", "tail_color")

Bird = dict[str, str]


def genus_of(bird: Bird) -> str:
    """The genus that the bird's tail and crest belong to."""
    return next(genus for genus, shape in GENERA.items() if shape == (bird["tail"], bird["crest"]))


def random_bird(rng: random.Random) -> Bird:
    """Every attribute drawn alike and independently."""
    return {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()}


def is_held_out(bird: Bird) -> bool:
    """Whether the bird's colours of head, belly and wing are kept for target species: a quarter of the triples is.

    The source domain holds no such bird, so no target species was seen in pre-training, nor its main colours together.
    """
    return zlib.crc32(f"{bird['head']} {bird['belly']} {bird['wing']}".encode()) % 4 == 0


def source_bird(rng: random.Random) -> Bird:
    """A bird of the source domain."""
    while is_held_out(bird := random_bird(rng)):
        pass
    return bird


def make_species(rng: random.Random, count: int, group_size: int = 3, num_differences: int = 2) -> list[Bird]:
    """Held-out birds, all different, in groups of look-alikes.

    Args:
        rng (`random.Random`): the source of chance.
        count (`int`): number of species.
        group_size (`int`): species that share a shape and most colours.
        num_differences (`int`): attributes in which a look-alike differs from the first of its group, and at least in
            as many from the others.
    """
    species: list[Bird] = []
    while len(species) < count:
        group: list[Bird] = []
        while len(group) < group_size:
            bird = dict(group[0]) if group else random_bird(rng)
            for attribute in rng.sample(DISTINGUISHING, num_differences if group else 0):
                bird[attribute] = rng.choice([value for value in ATTRIBUTES[attribute] if value != bird[attribute]])
            distinct = all(differences(bird, other) >= num_differences for other in species + group)
            if is_held_out(bird) and distinct:
                group.append(bird)
        species += group
    return species[:count]


def differences(one: Bird, other: Bird) -> int:
    """The number of attributes in which two birds differ."""
    return sum(one[attribute] != other[attribute] for attribute in ATTRIBUTES)
