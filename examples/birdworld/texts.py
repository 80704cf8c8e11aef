"""What is said about birds: captions, species' names, and descriptions in the manner of a language model.

All sentences are templates filled by chance. No language model wrote them.
"""

import random
import re
from collections.abc import Iterator

from .birds import ATTRIBUTES, COLOR_NAMES, Bird, genus_of


SYNONYMS = {
    "red": ("crimson", "scarlet", "ruby"),
    "orange": ("amber", "tangerine"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "olive"),
    "blue": ("azure", "cobalt"),
    "purple": ("violet", "plum"),
    "brown": ("chestnut", "russet"),
    "black": ("ebony", "sooty"),
    "white": ("snowy", "ivory"),
    "grey": ("ashy", "silver"),
}
# {} is the attribute's value, or a synonym of a colour.
PHRASES: dict[str, dict[str, tuple[str, ...]] | tuple[str, ...]] = {
    "head": ("a {} head", "a {} crown", "a {} cap"),
    "belly": ("a {} belly", "{} underparts", "a {} breast and belly"),
    "wing": ("{} wings", "{} upperparts", "a {} back and wings"),
    "tail_color": ("a {} tail", "{} tail feathers", "{} on the tail"),
    "bars": {
        "none": ("no wing bars", "plain wings without bars"),
        "white": ("white wing bars", "two white bars on the wing"),
        "yellow": ("yellow wing bars", "two yellow bars on the wing"),
    },
    "breast": {
        "plain": ("a plain breast", "unmarked underparts"),
        "spotted": ("a spotted breast", "spots on the breast"),
        "streaked": ("a streaked breast", "streaks on the breast"),
    },
    "bill": ("a {} bill", "a {} beak"),
    "legs": ("{} legs", "{} feet"),
    "eye_ring": {"none": ("no eye ring",), "white": ("a white eye ring", "a pale ring around the eye")},
    "size": {"small": ("a small body", "a tiny build"), "large": ("a large body", "a big build")},
    "tail": {
        "short": ("a short tail",),
        "long": ("a long tail",),
        "forked": ("a forked tail",),
        "fanned": ("a broad fanned tail", "a tail like a fan"),
    },
    "crest": {"none": ("no crest", "a smooth round head"), "pointed": ("a pointed crest", "a crest on its head")},
    "place": {
        "sky": ("the sky behind it", "open sky around it"),
        "water": ("water behind it", "a lake around it"),
        "sand": ("sand behind it", "dunes around it"),
        "meadow": ("grass behind it", "a meadow around it"),
        "snow": ("snow behind it", "a snowy field around it"),
        "rock": ("rocks behind it", "a cliff around it"),
    },
}
CAPTIONS = (
    "a photo of a bird with {}.",
    "a bird with {}.",
    "a picture of a bird that has {}.",
    "this bird has {}.",
    "the bird has {}.",
    "a photo of one bird with {}.",
)
NAME_CAPTIONS = ("a photo of a {}.", "a picture of a {}, a type of bird.", "an image of the {}.", "a {} in the wild.")
NAME_AND_PARTS = ("a photo of a {} with {}.", "the {} has {}.", "a {} with {}.")
NAME_PARTS = {"head": "crowned", "belly": "bellied", "wing": "winged", "tail_color": "tailed"}
PEOPLE = ("Audley", "Brandt", "Corliss", "Dumont", "Ellery", "Farrow", "Garrick", "Hollis", "Ives", "Jessop", "Keane")
HABITATS = ("dune", "marsh", "river", "forest", "mountain", "island", "garden", "shore", "desert", "prairie")
VAGUE = (
    "A lively bird that is often seen near water.",
    "It is known for its pleasant song.",
    "The {} is found in many habitats.",
    "It builds a small nest in dense bushes.",
    "The {} feeds on seeds and insects.",
    "This bird is shy and hard to see.",
    "It is about as big as a sparrow.",
    "The {} often sits on an open perch.",
)
SENTENCES = (
    "The {name} has {parts}.",
    "A bird with {parts}.",
    "A {name} with {parts}.",
    "This bird has {parts}.",
    "Look for {parts}.",
    "It can be told by {parts}.",
)


def phrase(attribute: str, value: str, rng: random.Random) -> str:
    """One way of saying that an attribute has a value."""
    templates = PHRASES[attribute]
    if isinstance(templates, dict):
        return rng.choice(templates[value])
    word = rng.choice(SYNONYMS[value]) if len(ATTRIBUTES[attribute]) > 4 and rng.random() < 0.3 else value
    return rng.choice(templates).format(word)


def with_articles(text: str) -> str:
    """With `an` before vowels: a text in which "a orange bill" becomes "an orange bill"."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)


def list_parts(bird: Bird, attributes: list[str], rng: random.Random) -> str:
    """The attributes in words: "a red head, grey legs and no crest"."""
    *phrases, last = [phrase(attribute, bird[attribute], rng) for attribute in attributes]
    return f"{', '.join(phrases)} and {last}" if phrases else last


def attribute_caption(attribute: str, value: str, rng: random.Random) -> str:
    """A caption that says one thing."""
    return with_articles(rng.choice(CAPTIONS).format(phrase(attribute, value, rng)))


def caption(bird: Bird, rng: random.Random) -> str:
    """What the source domain says of an image: a random subset of the attributes (and the place), a name, or both."""
    chance = rng.random()
    if chance < 0.15:
        return with_articles(rng.choice(NAME_CAPTIONS).format(make_name(bird, rng)))
    attributes = rng.sample(sorted(bird), rng.randint(1, 3) if chance < 0.3 else rng.randint(2, 6))
    parts = list_parts(bird, attributes, rng)
    if chance < 0.3:
        return with_articles(rng.choice(NAME_AND_PARTS).format(make_name(bird, rng), parts))
    return with_articles(rng.choice(CAPTIONS).format(parts))


def make_name(bird: Bird, rng: random.Random) -> str:
    """An invented name: the genus, with one colour, or with nothing that can be seen."""
    genus, chance = genus_of(bird), rng.random()
    if chance < 0.15:
        return f"{rng.choice(PEOPLE)}'s {genus}"
    if chance < 0.3:
        return f"{rng.choice(HABITATS)} {genus}"
    part = rng.choice(list(NAME_PARTS))
    return f"{rng.choice(SYNONYMS[bird[part]])}-{NAME_PARTS[part]} {genus}"


def describe(bird: Bird, name: str, rng: random.Random) -> list[str]:
    """8 to 12 sentences about a species: two vague, one with a mistake, the others true.

    Args:
        bird (`dict[str, str]`): the species' attributes.
        name (`str`): its name.
        rng (`random.Random`): the source of chance.
    """
    sentences = [sentence.format(name) for sentence in rng.sample(VAGUE, 2)]
    mistaken = dict(bird)
    wrong = rng.choice(list(ATTRIBUTES))
    mistaken[wrong] = rng.choice([value for value in ATTRIBUTES[wrong] if value != bird[wrong]])
    others = [attribute for attribute in ATTRIBUTES if attribute != wrong]
    parts = list_parts(mistaken, [wrong, *rng.sample(others, rng.randint(1, 3))], rng)
    sentences.append(rng.choice(SENTENCES).format(name=name, parts=parts))
    for _ in range(rng.randint(5, 9)):
        parts = list_parts(bird, rng.sample(list(ATTRIBUTES), rng.randint(2, 4)), rng)
        sentences.append(rng.choice(SENTENCES).format(name=name, parts=parts))
    rng.shuffle(sentences)
    return [with_articles(sentence) for sentence in sentences]


def vocabulary() -> Iterator[str]:
    """Texts in which every word of the world stands, for the tokenizer."""
    colors = [*COLOR_NAMES, *(word for words in SYNONYMS.values() for word in words)]
    for templates in PHRASES.values():
        for group in templates.values() if isinstance(templates, dict) else [templates]:
            yield from group
    yield from (*colors, *CAPTIONS, *NAME_CAPTIONS, *NAME_AND_PARTS, *NAME_PARTS.values(), *HABITATS, *VAGUE)
    yield from (*(f"{person}'s" for person in PEOPLE), *SENTENCES)
    yield from ("red-crowned", "finch thrush swallow wren kingfisher jay tern hoopoe", "a, an.")
