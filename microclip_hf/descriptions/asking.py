"""Every question to a chat model, then its replies as a descriptions file."""

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, takewhile, zip_longest

from tqdm.auto import tqdm

from ..text_heads import abbreviate
from .chat import EndpointChat, LocalChat
from .files import save_descriptions
from .questions import Questions
from .replies import ReplyFile
from .sentences import Fits, extract_sentences, sentence_key, unique_sentences


def ask(questions: Questions, chat: LocalChat | EndpointChat, replies: ReplyFile, stop: threading.Event) -> None:
    """Ask what wasn't answered yet, with a progress bar, until all is answered or `stop` is set."""
    unanswered = ((number, questions[number]) for number in range(len(questions)) if number not in replies)
    with tqdm(total=len(questions), initial=len(replies), desc="Asking", unit="reply") as progress:
        for number, reply in chat.replies(takewhile(lambda _: not stop.is_set(), unanswered)):
            replies.add(number, reply)
            progress.update()


@dataclass(frozen=True)
class Outcome:
    """What was written, and what wasn't."""

    sha256: str  # of the file
    num_sentences: int  # in it
    missing: list[str]  # classes about which the model said nothing usable
    shared: dict[str, int]  # sentences left out, with the number of classes of which they were said


def write_descriptions(
    path: str | os.PathLike, questions: Questions, replies: ReplyFile, fits: Fits | None
) -> Outcome:
    """Clean the replies and write them in the classes' order as `{"class": ["sentence", ...]}`; for `fits` see
    [`extract_sentences`]. An error where nothing is left of all replies; warnings about classes without sentences, and
    sentences without a class of their own.
    """
    sentences = _clean_replies(questions, replies, fits)
    shared = _count_shared(sentences.values())
    for sentence, count in shared.items():
        warnings.warn(
            f"{sentence!r} was said of {count} of {len(sentences)} classes, more than half, and is left out, since it "
            "tells none of them apart. Is the model too small, or the question too general?",
            stacklevel=2,
        )
    shared_keys = set(map(sentence_key, shared))
    described = {}
    for name, usable in sentences.items():
        distinctive = [sentence for sentence in usable if sentence_key(sentence) not in shared_keys]
        if distinctive:
            described[name] = distinctive
    missing = [name for name in questions.class_names if name not in described]
    if not described:
        raise ValueError(
            f"Nothing usable is left of the {len(questions)} replies; the first one is {replies[0].text[:300]!r}. "
            "Try another model, other `questions` or more `max_new_tokens`, with another `output` or after removing "
            f"the replies, which are kept in {replies.path}."
        )
    if missing:
        number = questions.class_names.index(missing[0]) * len(questions.templates)
        warnings.warn(
            f"Nothing usable was said of {len(missing)} of {len(sentences)} classes, whose prompt templates will "
            f"stand in: {abbreviate(missing)}. The first of these replies is {replies[number].text[:300]!r}.",
            stacklevel=2,
        )
    return Outcome(save_descriptions(path, described.items()), sum(map(len, described.values())), missing, shared)


def _clean_replies(questions: Questions, replies: ReplyFile, fits: Fits | None) -> dict[str, list[str]]:
    """The usable sentences about each class, no more than were asked for, from its questions in turn."""
    per_class = len(questions.templates)
    sentences = {}
    for index, name in enumerate(tqdm(questions.class_names, "Cleaning", unit="class")):
        of_class = [replies[number] for number in range(index * per_class, (index + 1) * per_class)]
        usable = [extract_sentences(reply.text, reply.cut_off, fits) for reply in of_class]
        in_turn = filter(None, chain.from_iterable(zip_longest(*usable)))
        sentences[name] = unique_sentences(in_turn)[: questions.num_sentences]
    return sentences


def _count_shared(sentences: Iterable[list[str]]) -> dict[str, int]:
    """Sentences said of more than half of the classes, in their first wording, with the number of these classes."""
    classes = list(sentences)
    wordings: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for sentence in chain.from_iterable(classes):
        key = sentence_key(sentence)
        wordings.setdefault(key, sentence)
        counts[key] += 1
    return {wordings[key]: count for key, count in counts.items() if count > len(classes) / 2}
