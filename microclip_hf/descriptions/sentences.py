"""What a language model replied -> sentences that a text tower can use: no lists, markup, preambles, refusals."""
# ruff: noqa: RUF001 - the punctuation that models write

import json
import re
import unicodedata
from collections.abc import Callable, Iterable

from ..configuration_microclip import HUB_PREFIX, MicroCLIPConfig
from ..model_sources import describe_problem
from ..open_clip import is_bare_file, read_open_clip
from ..text_heads import load_tokenizer, whole_characters


Fits = Callable[[str], bool]

# Reasoning that some models put before their answer; the opening tag may be part of the prompt, and so missing.
_THOUGHTS = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*+•–—·‣▪●]\s+|[•‣▪●]|\(?\d{1,3}[.):]\)?\s+|\(?[a-zA-Z][.)]\s+(?=[A-Z]))")
_NUMBERED_INLINE = re.compile(r"\s+(?=\(?\d{1,2}[.)]\s+\S)")
_MARKUP = re.compile(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=[\w.!?])[*_](?!\w)")
_LINK = re.compile(r"\[([^\[\]]*)\]\([^)]{0,1000}\)")
_CODE_BLOCK = re.compile(r"```\w*(.*?)(?:```|\Z)", re.DOTALL)
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?…])\s+(?=[^a-z\s])|(?<=[.!?…][\"')\]])\s+(?=[^a-z\s])|(?<=[。！？])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:[A-Z]|e\.g|i\.e|approx|ca|cf|vs|sp|spp|ssp|subsp|var|dr|mr|mrs|ms|st|mt)\.$", re.IGNORECASE
)
_ENDS = re.compile(r"[.!?…。！？][\"')\]]*$")
_REFUSAL = re.compile(
    r"(?:(?:i'm|i am|we're|we are)? ?(?:very |truly |so )?sorry\b|apologies\b|unfortunately, (?:i|there is no|no )\b"
    r"|(?:but |however, |unfortunately,? )*(?:i|we) (?:apologi[sz]e|regret|can(?:no|')t|can not|could(?:n't| not)"
    r"|(?:am|are) (?:not |un)(?:able|aware|familiar|sure)|won't|will not|do(?:n't| not) (?:have|know))\b"
    r"|i'm (?:not |un)(?:able|aware|familiar|sure)\b|as an? (?:ai|artificial|(?:large )?language model|assistant)\b)"
    r"|.*\b(?:ai|language) (?:language )?model\b",
    re.IGNORECASE,
)
# Words around the answer, and about the one who answers.
_CHATTER = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|ok|great|great question|no problem)(?:[,!.:]|$)"
    r"|(?:here|below|these|the following) (?:are|is) (?:\w+ )?(?:\w+ )?(?:sentences?|descriptions?|lists?|answers?)\b"
    r"|(?:here are|here is|here's|below are|below is)\b|i(?:'m|'d|'ll|'ve)? |let me\b|let's\b|hope (?:this|these)\b"
    r"|(?:please )?(?:note|keep in mind|remember) that\b|(?:would you|do you|is there anything|feel free|if you)\b",
    re.IGNORECASE,
)
_CLAUSES = re.compile(r"\s*(?:[;:,–—]|\s-)\s+|(?<=[.!?])\s+")


def extract_sentences(reply: str, cut_off: bool = False, fits: Fits | None = None) -> list[str]:
    """The usable sentences of one reply, in its order; none where the model refuses or says nothing.

    Args:
        cut_off (`bool`): whether the model ran into its limit of tokens; its last sentence is then dropped unless it
            ends like one. So it is too where other sentences end with a full stop and the last doesn't.
        fits (`Callable[[str], bool]`, *optional*): whether a sentence isn't too long, as from [`fits_text_tower`].
            Those that are end at an earlier clause, or are dropped where even the first clause is too long.
    """
    text = unicodedata.normalize("NFC", _THOUGHTS.sub("", reply)).replace("’", "'")
    text = re.sub(r"[^\S\n]+", " ", text)  # also keeps the patterns below from long runs
    pieces = [(sentence, is_item) for line, is_item in _lines(text) for sentence in _split(line)]
    ends = [_ENDS.search(sentence) is not None for sentence, _ in pieces]
    if pieces and not ends[-1] and (cut_off or any(ends)):
        pieces.pop()
    # After a refusal only a list is an answer: what else follows is advice to the one who asked.
    refused = any(_REFUSAL.match(sentence) for sentence, _ in pieces)
    usable = [sentence for sentence, is_item in pieces if _is_usable(sentence) and (is_item or not refused)]
    if fits is not None:
        usable = filter(None, (shorten_sentence(sentence, fits) for sentence in usable))
    return unique_sentences(usable)


def unique_sentences(sentences: Iterable[str]) -> list[str]:
    """The first of those that say the same, whatever their case and punctuation."""
    first: dict[str, str] = {}
    for sentence in sentences:
        first.setdefault(sentence_key(sentence), sentence)
    return list(first.values())


def sentence_key(sentence: str) -> str:
    """Equal for sentences that differ in case, punctuation and spacing alone."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", sentence).casefold()))


def shorten_sentence(sentence: str, fits: Fits) -> str | None:
    """The sentence up to the last clause with which it fits, or `None` if there is no such clause of three words."""
    if fits(sentence):
        return sentence
    for boundary in reversed(list(_CLAUSES.finditer(sentence))):
        short = sentence[: boundary.start()].rstrip(" ,;:–—-")
        short += "" if _ENDS.search(short) else "."
        if len(short.split()) >= 3 and fits(short):
            return short
    return None


def fits_text_tower(source: str) -> Fits:
    """Whether a text fits the positions of a CLIP's text tower, by its own tokenizer; an `OSError` or `ValueError` if
    `source`, a Hub id or a folder, has no CLIP, or no tokenizer with it.
    """
    source = source.removeprefix(HUB_PREFIX)
    problem = None if is_bare_file(source) else describe_problem(source)
    if problem:
        raise ValueError(problem)
    checkpoint = read_open_clip(source)
    config = MicroCLIPConfig.from_pretrained(source).clip_config if checkpoint is None else checkpoint.config
    advice = "Pass a CLIP that was saved with its tokenizer."
    tokenizer = load_tokenizer(source, {}, advice) if checkpoint is None else checkpoint.load_tokenizer()
    max_length = config.text_config.max_position_embeddings
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"]) <= max_length


def _lines(text: str) -> list[tuple[str, bool]]:
    """The lines without markup, each with whether it is a list's item."""
    items = _json_items(text)
    if items is not None:
        return [(item, True) for item in items]
    lines = []
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "#", "|")):
            continue
        line = _LINK.sub(r"\1", line.lstrip("> \t"))
        if _ITEM.match(line):
            lines += [(_clean(_ITEM.sub("", part, count=1)), True) for part in _NUMBERED_INLINE.split(line)]
        else:
            lines.append((_clean(line), False))
    return lines


def _json_items(text: str) -> list[str] | None:
    """The strings of a reply that is a JSON list, or an object with one list or strings, in a code block or not."""
    block = _CODE_BLOCK.search(text)
    try:
        items = json.loads(block[1] if block else text)
    except (RecursionError, ValueError):
        return None
    if isinstance(items, dict):
        lists = [value for value in items.values() if isinstance(value, list)]
        items = lists[0] if len(lists) == 1 else list(items.values())
    return [_clean(item) for item in items if isinstance(item, str)] if isinstance(items, list) else None


def _clean(line: str) -> str:
    """One line without emphasis, quotes around it, runs of spaces and lost characters."""
    line = " ".join(_MARKUP.sub("", whole_characters(line)).split())
    quoted = re.fullmatch(r"[\"'“”«„](.*?)[\"'“”»],?", line)
    return quoted[1].strip() if quoted and not re.search(r"[\"“”«»]", quoted[1]) else line


def _split(line: str) -> list[str]:
    """The sentences of a line; a full stop after an abbreviation or an initial ends none."""
    sentences: list[str] = []
    for piece in filter(None, map(str.strip, _BETWEEN_SENTENCES.split(line))):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {piece}"
        else:
            sentences.append(piece)
    return sentences


def _is_usable(sentence: str) -> bool:
    """Neither a preamble, nor a refusal, nor without words."""
    has_words = len(re.findall(r"[^\W\d_]{2,}", sentence)) >= 2 or len(re.findall(r"[^\W\d_a-zA-Z]", sentence)) >= 4
    return has_words and not (sentence.endswith((":", "：")) or _REFUSAL.match(sentence) or _CHATTER.match(sentence))
