"""Questions about each class to a chat model, and its replies as a descriptions file."""

import json
import os
import tempfile
import threading
import warnings
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain, takewhile, zip_longest
from typing import TextIO

from tqdm.auto import tqdm

from ..text_heads import abbreviate, check_templates, check_whole, normalize_name
from .chat import EndpointChat, LocalChat
from .files import save_descriptions
from .replies import AnswerFile
from .sentences import Fits, extract_sentences, sentence_key, unique_sentences


# The last one sets a class apart from those that its name is similar to.
DEFAULT_QUESTIONS = (
    "What does {} look like in a photo?",
    "By which visible features, such as shape, colour, pattern and parts, is {} recognised?",
    "How does {} differ in a photo from {similar}?",
)
NOTHING_SIMILAR = "what is most easily confused with it"
MIN_SIMILARITY = 0.6  # difflib's ratio of names that share no word


class SimilarNames:
    """For each class name those that are most like it, in a time that doesn't grow with their number.

    Only names that share a word, or the first or last four letters of one, are compared, and of many such names those
    next to it in alphabetical order.

    Args:
        class_names (`Sequence[str]`): all of them.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = class_names
        self._normalized = [normalize_name(name) for name in class_names]
        order = sorted(range(len(class_names)), key=self._normalized.__getitem__)
        self._rank = {index: rank for rank, index in enumerate(order)}
        self._sharing: dict[str, list[int]] = defaultdict(list)
        for index in order:
            for part in self._parts(index):
                self._sharing[part].append(index)

    def find(self, index: int, count: int = 3, num_compared: int = 40) -> list[str]:
        """The names most like the one at `index`, at most `count`, best first; same last words come first."""
        words, candidates = self._normalized[index].split(), {}
        for part in sorted(self._parts(index), key=lambda part: (len(self._sharing[part]), part)):
            sharing = self._sharing[part]
            place = bisect_left(sharing, self._rank[index], key=self._rank.__getitem__)
            start = max(0, place - num_compared // 4)
            candidates.update(dict.fromkeys(sharing[start : start + num_compared // 2]))
            if len(candidates) >= num_compared:
                break
        candidates.pop(index, None)
        scored = []
        for other in candidates:
            other_words = self._normalized[other].split()
            ratio = SequenceMatcher(None, self._normalized[index], self._normalized[other]).ratio()
            if ratio >= MIN_SIMILARITY or set(words) & set(other_words):
                scored.append((words[-1] == other_words[-1], ratio, -other))
        return [self._names[-other] for _, _, other in sorted(scored, reverse=True)[:count]]

    def _parts(self, index: int) -> set[str]:
        words = self._normalized[index].split()
        long = [word for word in words if len(word) > 4]
        return {*words, *(f"{word[:4]}*" for word in long), *(f"*{word[-4:]}" for word in long)}


class Questions(Sequence[str]):
    """All questions about all classes, class by class, made when they are asked for.

    Args:
        class_names (`Sequence[str]`): the C class names; underscores become spaces.
        templates (`Sequence[str]`, *optional*): Q questions with `{}` for the class name and, where wanted,
            `{similar}` for similarly named ones. Default `DEFAULT_QUESTIONS`.
        domain (`str`, *optional*): what each class is, as in `"a species of flower"`.
        num_sentences (`int`): sentences asked for by the questions about one class together.

    Raises:
        ValueError: if a template has no `{}`, or a text holds half a character.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        templates: Sequence[str] | None = None,
        domain: str | None = None,
        num_sentences: int = 12,
    ) -> None:
        self.class_names = class_names
        self.templates = check_templates(DEFAULT_QUESTIONS if templates is None else templates)
        check_whole("domain", domain or "")
        self.domain = domain and domain.strip().rstrip(".")
        self.num_sentences = num_sentences
        self._similar = SimilarNames(class_names)

    def __len__(self) -> int:
        return len(self.class_names) * len(self.templates)

    def __getitem__(self, number: int) -> str:
        index, template = number // len(self.templates), self.templates[number % len(self.templates)]
        name = _as_words(self.class_names[index])
        if "{similar}" in template:
            similar = map(_as_words, self._similar.find(index))
            template = template.replace("{similar}", ", ".join(similar) or NOTHING_SIMILAR)
        about = f"{name} is {self.domain}. " if self.domain else ""
        count = -(-self.num_sentences // len(self.templates))
        lines = "one sentence" if count == 1 else f"{count} different sentences, one a line,"
        return (
            f"{about}{template.replace('{}', name)} Answer with {lines} and nothing else. Each begins with the name, "
            "has at most 25 words and says only what can be seen."
        )


def _as_words(class_name: str) -> str:
    return class_name.replace("_", " ")


def ask(questions: Questions, chat: LocalChat | EndpointChat, answers: AnswerFile, stop: threading.Event) -> None:
    """Ask what wasn't answered yet, with a progress bar, until all is answered or `stop` is set."""
    todo = ((number, questions[number]) for number in range(len(questions)) if number not in answers)
    with tqdm(total=len(questions), initial=answers.num_answered, desc="Asking", unit="reply") as progress:
        for number, reply in chat.replies(takewhile(lambda _: not stop.is_set(), todo)):
            answers.add(number, reply)
            progress.update()


@dataclass
class Outcome:
    """What was written.

    Args:
        sha256 (`str`): of the file.
        num_sentences (`int`): in it.
        missing (`list[str]`): classes about which the model said nothing usable.
        shared (`dict[str, int]`): sentences left out, with the number of classes of which they were said.
    """

    sha256: str
    num_sentences: int
    missing: list[str]
    shared: dict[str, int]


def write_descriptions(
    path: str | os.PathLike, questions: Questions, answers: AnswerFile, fits: Fits | None
) -> Outcome:
    """Clean the replies and write them in the classes' order as `{"class": ["sentence", ...]}`, class by class.

    Args:
        path (`str` or `os.PathLike`): the JSON file.
        questions ([`Questions`]): all of them.
        answers ([`AnswerFile`]): with a reply to each.
        fits (`Callable[[str], bool]`, *optional*): see [`extract_sentences`].

    Returns:
        [`Outcome`]: with warnings about classes without sentences, and sentences without a class of their own.

    Raises:
        ValueError: if nothing is left of all replies.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as cleaned:
        shared = _clean_replies(questions, answers, fits, cleaned)
        for sentence, count in shared.items():
            warnings.warn(
                f"{sentence!r} was said of {count} of {len(questions.class_names)} classes, more than half, and is "
                "left out, since it tells none of them apart. Is the model too small, or the question too general?",
                stacklevel=2,
            )
        outcome = Outcome("", 0, [], shared)
        outcome.sha256 = save_descriptions(path, _described(questions, cleaned, outcome))
    if not outcome.num_sentences:
        os.remove(path)
        raise ValueError(
            f"Nothing usable is left of the {len(questions)} replies; the first one is {answers[0].text[:300]!r}. "
            "Try another model, other --questions or more --max_new_tokens, with another --output or after removing "
            f"the replies, which are kept in {answers.path}."
        )
    if outcome.missing:
        number = questions.class_names.index(outcome.missing[0]) * len(questions.templates)
        warnings.warn(
            f"Nothing usable was said of {len(outcome.missing)} of {len(questions.class_names)} classes, whose prompt "
            f"templates will stand in: {abbreviate(outcome.missing)}. The first of these replies is "
            f"{answers[number].text[:300]!r}.",
            stacklevel=2,
        )
    return outcome


def _clean_replies(questions: Questions, answers: AnswerFile, fits: Fits | None, cleaned: TextIO) -> dict[str, int]:
    """Write each class's sentences as a line of JSON, and count those said of more than half of the classes.

    What is so frequent is found in constant memory (Misra and Gries): of n sentences, k counters keep any that occurs
    more than n / (k + 1) times. They are then counted exactly.
    """
    counters: Counter[str] = Counter()
    per_class = len(questions.templates)
    for start in tqdm(range(0, len(questions), per_class), "Cleaning", unit="class"):
        replies = [answers[number] for number in range(start, start + per_class)]
        found = [extract_sentences(reply.text, reply.cut_off, fits) for reply in replies]
        in_turns = filter(None, chain.from_iterable(zip_longest(*found)))
        sentences = unique_sentences(in_turns)[: questions.num_sentences]
        cleaned.write(json.dumps(sentences) + "\n")
        for key in map(sentence_key, sentences):
            if key in counters or len(counters) < 2 * questions.num_sentences:
                counters[key] += 1
            else:
                counters = Counter({key: count - 1 for key, count in counters.items() if count > 1})
    shown, exact = {}, Counter()
    for sentences in _cleaned_sentences(cleaned):
        frequent = {key: sentence for sentence in sentences if (key := sentence_key(sentence)) in counters}
        shown = {**frequent, **shown}
        exact.update(frequent.keys())
    return {shown[key]: count for key, count in exact.items() if count > len(questions.class_names) / 2}


def _described(questions: Questions, cleaned: TextIO, outcome: Outcome) -> Iterator[tuple[str, list[str]]]:
    """Each class with its sentences, those that are shared left out; what is missing is noted in the outcome."""
    shared = set(map(sentence_key, outcome.shared))
    for name, sentences in zip(questions.class_names, _cleaned_sentences(cleaned), strict=True):
        own = [sentence for sentence in sentences if sentence_key(sentence) not in shared]
        outcome.num_sentences += len(own)
        if own:
            yield name, own
        else:
            outcome.missing.append(name)


def _cleaned_sentences(file: TextIO) -> Iterator[list[str]]:
    file.seek(0)
    return map(json.loads, file)
