"""Class names of any script in pictures: which installed fonts have their letters."""

import contextlib
import functools
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font


# Fonts that have every character, as an empty box.
BOXES = ("lastresort", "adobeblank")
CJK = "Noto Sans CJK"
# What to install, by the first word of a character's name; other scripts' fonts are called like them.
NOTO = {"CJK": CJK, "HIRAGANA": CJK, "KATAKANA": CJK, "HANGUL": CJK, "FULLWIDTH": CJK, "IDEOGRAPHIC": CJK}


def readable(names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The names of all classes as texts for a picture, and the arguments of matplotlib's `Text` to draw them with.

    The settings' font draws what it can, other installed fonts the rest. Where there is none, `class 3` stands for the
    name of class 3, and a warning says what to install.
    """
    # Control characters have no shape.
    texts = ["".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in name) for name in names]
    lacking = _letters(texts) - _letters_of(*matplotlib.rcParams["font.family"])
    families, lost = _find_fonts(frozenset(lacking))
    unreadable = [index for index, text in enumerate(texts) if not lost.isdisjoint(text)]
    if unreadable:
        _warn(tuple(sorted({_script(letter) for letter in lost})))
    for index in unreadable:
        texts[index] = f"class {index}"
    # Two dollars in a name would be taken for a formula.
    return texts, {"fontfamily": [*matplotlib.rcParams["font.family"], *families], "parse_math": False}


def _letters(texts: Sequence[str]) -> set[str]:
    """What has to be drawn: not marks of direction and the like, nor the choice between shapes of a letter."""
    return {
        letter
        for letter in set().union(*texts)
        if unicodedata.category(letter) != "Cf" and not "\ufe00" <= letter <= "\ufe0f"
    }


def _letters_of(*families: str) -> set[str]:
    """The characters of the fonts that matplotlib takes for these families."""
    return set().union(*(_charmap(findfont(FontProperties(family=[family]))) for family in families))


def _charmap(path: str) -> set[str]:
    try:
        return set(map(chr, get_font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # a damaged file
        return set()


@functools.cache
def _find_fonts(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Installed families that have these letters, and the letters that no font has."""
    if not letters:
        return (), letters
    _add_new_fonts()
    candidates: dict[str, frozenset[str]] = {}
    for family, path in _installed_fonts():
        if not letters.isdisjoint(_charmap(path)):
            candidates[family] = letters & _letters_of(family)  # of the font that matplotlib takes, perhaps another
        if candidates.get(family) == letters:
            return (family,), frozenset()
    families = []
    lost = letters
    # The family first that has most of the letters, then what others add to it.
    while any(not lost.isdisjoint(covered) for covered in candidates.values()):
        families.append(max(candidates, key=lambda family: len(lost & candidates[family])))
        lost -= candidates[families[-1]]
    return tuple(families), lost


def _installed_fonts() -> list[tuple[str, str]]:
    """One upright font of each family, as `(family, path)`, those without serifs first."""
    fonts = {}
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.fname)):
        if not any(box in font.name.replace(" ", "").lower() for box in BOXES):
            fonts.setdefault(font.name, font.fname)
    return sorted(fonts.items(), key=lambda font: ("sans" not in font[0].lower(), font[0]))


def _add_new_fonts() -> None:
    """Fonts installed since matplotlib's first run, whose list it keeps."""
    listed = {font.fname for font in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - listed):
        with contextlib.suppress(Exception):  # matplotlib can't draw all: coloured ones, damaged ones
            fontManager.addfont(path)


def _script(letter: str) -> str:
    """A character's script, or what else it is."""
    if unicodedata.category(letter).startswith("S"):
        return "emoji and symbols"
    return unicodedata.name(letter, "unnamed characters").split(" ")[0]


@functools.cache
def _warn(scripts: tuple[str, ...]) -> None:
    """Once: a run draws many pictures."""
    fonts = {
        "Noto Emoji" if script == "emoji and symbols" else NOTO.get(script, f"Noto Sans {script.title()}")
        for script in scripts
    }
    warnings.warn(
        f"No font here has the letters of some class names ({', '.join(scripts)}), so in pictures their numbers stand "
        f"in, as in 'class 0', the first. Install fonts such as {', '.join(sorted(fonts))} "
        "(https://fonts.google.com/noto) to see the names.",
        stacklevel=3,
    )
