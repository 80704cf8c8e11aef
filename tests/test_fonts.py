"""Class names of any script in pictures: drawn by a font that has them, or replaced with one warning."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image

from microclip_hf import fonts
from microclip_hf.explain.explanation import explain
from microclip_hf.explain.figure import plot
from microclip_hf.plots import plot_adaptation, plot_confusion


STIX = "\u1d84"  # matplotlib ships two fonts: STIX has this letter, DejaVu Sans doesn't
NAMES = ["红色圆盘", "green square", "🍎", "Ωμέγα"]


@pytest.fixture
def installed(monkeypatch):
    """Sets which fonts are installed, besides the default one."""

    def install(*families):
        known = [(family, findfont(FontProperties(family=[family]))) for family in families]
        monkeypatch.setattr(fonts, "_installed_fonts", lambda: known)
        fonts._find_fonts.cache_clear()
        fonts._warn.cache_clear()

    yield install
    fonts._find_fonts.cache_clear()
    fonts._warn.cache_clear()


def draw(text, **settings):
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, text, **settings)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return np.asarray(Image.open(content))


@pytest.mark.filterwarnings("error")
def test_a_font_that_has_the_letters_is_found(installed):
    """The letter is drawn as by that font alone; Latin text as always."""
    installed("cmr10", "STIXGeneral", "DejaVu Serif")
    texts, settings = fonts.readable(["red disc", STIX, "שלום\u200f ❤\ufe0f"])
    assert texts == ["red disc", STIX, "שלום\u200f ❤\ufe0f"]
    assert np.array_equal(draw(STIX, **settings), draw(STIX, fontfamily=["STIXGeneral"]))
    assert np.array_equal(draw("red disc", **settings), draw("red disc"))


def test_no_font_of_boxes_counts():
    assert not any("Last Resort" in family for family, _ in fonts._installed_fonts())


def test_several_fonts_together(monkeypatch, installed):
    installed("cmr10", "STIXGeneral", "DejaVu Serif", "DejaVu Sans Mono")
    letters = {"cmr10": "ab", "STIXGeneral": "bcd", "DejaVu Serif": "e", "DejaVu Sans Mono": "cd"}
    paths = {path: letters[family] for family, path in fonts._installed_fonts()}
    monkeypatch.setattr(fonts, "_charmap", lambda path: set(paths[path]))
    assert fonts._find_fonts(frozenset("bcd")) == (("STIXGeneral",), frozenset())
    assert fonts._find_fonts(frozenset("abcde?")) == (("STIXGeneral", "cmr10", "DejaVu Serif"), frozenset("?"))


def test_a_font_installed_since_the_first_run(monkeypatch, tmp_path):
    """matplotlib keeps a list of fonts, and wouldn't look again."""
    added = []
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "new.ttf"), str(tmp_path / "damaged.ttf")])
    monkeypatch.setattr(fonts.fontManager, "addfont", added.append)
    fonts._add_new_fonts()
    assert added == [str(tmp_path / "damaged.ttf"), str(tmp_path / "new.ttf")]
    monkeypatch.undo()
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf")])
    fonts._add_new_fonts()


def test_letters_without_a_font_give_one_warning(installed, model, tmp_path):
    """Nothing is drawn as a box, about which matplotlib warns letter by letter."""
    installed("STIXGeneral")
    labels = np.arange(4)
    images = [Image.new("RGB", (40, 40))] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fonts.readable(NAMES)[0] == ["class 0", "green square", "class 2", "Ωμέγα"]
        plot_confusion(tmp_path / "confusion.png", labels, labels[::-1], [0, 1, 2, 3], NAMES)
        model.config.id2label = dict(enumerate(NAMES[:3]))
        explanations = explain(model, images)
        plot_adaptation(tmp_path / "adaptation.png", [], {}, explanations, explanations, [None, 1])
        figure = plot(explanations[0], num_classes=3)
        figure.savefig(tmp_path / "why.png")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "letters of some class names (CJK, emoji and symbols)" in messages[0]
    assert "Install fonts such as Noto Emoji, Noto Sans CJK" in messages[0]
    shown = {label.get_text() for label in figure.axes[-1].get_yticklabels()}
    assert shown == {"class 0", "green square", "class 2"}


@pytest.mark.filterwarnings("error")
def test_an_explanation_that_is_saved_later(installed, model, tmp_path):
    installed("STIXGeneral")
    model.config.id2label = {0: STIX, 1: "green square", 2: "blue\tbar"}
    figure = plot(explain(model, [Image.new("RGB", (40, 40))])[0], num_classes=3)
    figure.savefig(tmp_path / "why.png")
    assert {label.get_text() for label in figure.axes[-1].get_yticklabels()} == {STIX, "green square", "blue bar"}


@pytest.mark.parametrize(
    ("letter", "script"),
    [("红", "CJK"), ("カ", "KATAKANA"), ("ก", "THAI"), ("हि"[0], "DEVANAGARI"), ("🍎", "emoji and symbols")],
)
def test_scripts_are_named(letter, script):
    assert fonts._script(letter) == script
