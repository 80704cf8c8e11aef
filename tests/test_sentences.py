"""Replies as language models write them, with the sentences that a reader would take from them."""
# ruff: noqa: RUF001 - the punctuation that models write

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microclip_hf.descriptions.sentences import (
    extract_sentences,
    fits_text_tower,
    sentence_key,
    shorten_sentence,
    unique_sentences,
)


@pytest.mark.parametrize(
    ("reply", "sentences"),
    [
        (
            "Here are 2 sentences:\n\n1. A daisy is white.\n2) A daisy is small.",
            ["A daisy is white.", "A daisy is small."],
        ),
        ("Sure! A daisy is white. I hope this helps!", ["A daisy is white."]),
        (
            "- **Petals:** A daisy has *white* petals.\n* `Round` and [small](http://x).",
            ["Petals: A daisy has white petals.", "Round and small."],
        ),
        (
            "1. A daisy is white. 2. A daisy is small. 3. It grows.",
            ["A daisy is white.", "A daisy is small.", "It grows."],
        ),
        ('```json\n["A daisy is white.", "A daisy is small."]\n```', ["A daisy is white.", "A daisy is small."]),
        ('{"sentences": ["Red and round."]}', ["Red and round."]),
        (
            'Here it is:\n```json\n{\n "class": "a daisy",\n "sentences": ["Red and round.", "It is small."]\n}\n```',
            ["Red and round.", "It is small."],
        ),
        ('{"1": "Red and round.", "2": "It is small."}', ["Red and round.", "It is small."]),
        ('{"a": ["Red and round."], "b": ["Blue and long."]}', []),
        ("[" * 100_000, []),
        ("### Daisy\n\n> A daisy is white.\n\n---\n| a | b |", ["A daisy is white."]),
        ("“A daisy is white.”\n\"A daisy is 'small'.\"", ["A daisy is white.", "A daisy is 'small'."]),
        (
            "A daisy grows in e.g. Meadows and St. James. R. acris, ca. 3.5 cm, doesn't.",
            ["A daisy grows in e.g. Meadows and St. James.", "R. acris, ca. 3.5 cm, doesn't."],
        ),
        ("A daisy is white. A  DAISY is white! A daisy is small.", ["A daisy is white.", "A daisy is small."]),
        ("A daisy is white. A daisy has a yel", ["A daisy is white."]),
        ("White petals\nYellow centre", ["White petals", "Yellow centre"]),
        ("A daisy is white and 2*3 cm, a_b.", ["A daisy is white and 2*3 cm, a_b."]),
        ("<think>\nThe user wants daisies.\n</think>\n\nA daisy is white.", ["A daisy is white."]),
        ("The user wants daisies.</think>A daisy is white.", ["A daisy is white."]),
        ("<think>The user wants daisies.", []),
        ("I'm sorry, but I can't help with that. Please ask a gardener.", []),
        (
            "I’m sorry, I don't know it. Perhaps:\n- A white flower.\n- A small flower.",
            ["A white flower.", "A small flower."],
        ),
        ("As an AI language model, I have no eyes.", []),
        ("I cannot describe a daisy.", []),
        ("Unfortunately, I am not able to describe it.", []),
        (
            "A sorry sight, it has no leaves. You can tell it by its colour.",
            ["A sorry sight, it has no leaves.", "You can tell it by its colour."],
        ),
        ("它是白色的花。花瓣很长。", ["它是白色的花。", "花瓣很长。"]),
        ("  \n…\nN/A\n42.", []),
        ("", []),
    ],
)
def test_sentences_of_a_reply(reply, sentences):
    assert extract_sentences(reply) == sentences


def test_a_reply_that_was_cut_off():
    assert extract_sentences("White petals\nYellow cen", cut_off=True) == ["White petals"]
    assert extract_sentences("A daisy is whi", cut_off=True) == []
    assert extract_sentences("A daisy is white.", cut_off=True) == ["A daisy is white."]


@given(st.text())
def test_any_text_gives_clean_sentences(reply):
    sentences = extract_sentences(reply)
    assert all(sentence.strip() == sentence and "\n" not in sentence for sentence in sentences)
    assert len({sentence_key(sentence) for sentence in sentences}) == len(sentences)


def test_equal_sentences():
    assert unique_sentences(["A b c.", "a  B, c", "A b d"]) == ["A b c.", "A b d"]


def test_shortening_ends_at_a_clause():
    def fits(text):
        return len(text) <= 24

    assert shorten_sentence("A daisy is small.", fits) == "A daisy is small."
    assert shorten_sentence("A daisy is white, small, and grows in meadows.", fits) == "A daisy is white, small."
    assert shorten_sentence("A daisy that grows in meadows everywhere, white.", fits) is None
    assert shorten_sentence("Daisies, which grow in meadows everywhere.", fits) is None


def test_the_text_tower_sets_the_limit(clip_folder):
    """Its tokenizer has one token a byte but the spaces, and its 77 positions hold the start and the end too."""
    fits = fits_text_tower(str(clip_folder))
    assert fits("a" * 75) and not fits("a" * 76)
    reply = f"It is white, {'very ' * 30}small. {'Very ' * 30}white."
    assert extract_sentences(reply, fits=fits) == ["It is white."]
    with pytest.raises(ValueError, match="there is no such folder here"):
        fits_text_tower(str(clip_folder / "none"))
