"""What a language model is asked about each class."""

from bisect import bisect_left
from collections.abc import Sequence
from difflib import get_close_matches

from ..text_heads import check_templates, check_whole, normalize_name


# The last one sets a class apart from those that its name is similar to.
DEFAULT_QUESTIONS = (
    "What does {} look like in a photo?",
    "By which visible features, such as shape, colour, pattern and parts, is {} recognised?",
    "How does {} differ in a photo from {similar}?",
)
NOTHING_SIMILAR = "what is most easily confused with it"
MIN_SIMILARITY = 0.6  # difflib's ratio of names with different last words
NUM_NEIGHBOURS = 20  # names compared on either side, so that the time for a name doesn't grow with their number


class SimilarNames:
    """For each class name those that are most like it, by [`normalize_name`] and `difflib`."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._normalized = [normalize_name(name) for name in class_names]
        self._class_names = dict(zip(self._normalized, class_names, strict=True))
        # Similar names mostly begin or end alike, and so are neighbours in one of these two.
        self._by_start = sorted(self._normalized)
        self._by_end = sorted(name[::-1] for name in self._normalized)

    def find(self, index: int, count: int = 3) -> list[str]:
        """The names most like the one at `index`, at most `count`, best first; those with its last word come first."""
        name = self._normalized[index]
        candidates = set(_neighbours(self._by_start, name))
        candidates.update(reverse[::-1] for reverse in _neighbours(self._by_end, name[::-1]))
        candidates.remove(name)
        last_word = name.split()[-1]
        kin = {other for other in candidates if other.split()[-1] == last_word}
        closest = get_close_matches(name, kin, count, cutoff=0)
        closest += get_close_matches(name, candidates - kin, count, MIN_SIMILARITY)
        return [self._class_names[other] for other in closest[:count]]


def _neighbours(ordered: list[str], name: str) -> list[str]:
    place = bisect_left(ordered, name)
    return ordered[max(0, place - NUM_NEIGHBOURS) : place + NUM_NEIGHBOURS + 1]


class Questions(Sequence[str]):
    """All questions about all classes, class by class, made when they are asked for.

    A template without `{}` for the class name is an error, and so is a text with half a character (a surrogate).

    Args:
        templates (`Sequence[str]`, *optional*): questions with `{}` and, where wanted, `{similar}` for similarly named
            classes. Default `DEFAULT_QUESTIONS`.
        domain (`str`, *optional*): what each class is, as in `"a species of flower"`.
        num_sentences (`int`): sentences asked for by the questions about one class together.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        templates: Sequence[str] | None = None,
        domain: str | None = None,
        num_sentences: int = 12,
    ) -> None:
        check_whole("domain", domain or "")
        self.class_names = class_names
        self.templates = check_templates(DEFAULT_QUESTIONS if templates is None else templates)
        self.num_sentences = num_sentences
        self.domain = (domain or "").strip().rstrip(".")
        self._similar = SimilarNames(class_names)

    def __len__(self) -> int:
        return len(self.class_names) * len(self.templates)

    def __getitem__(self, number: int) -> str:
        index, template_index = divmod(number, len(self.templates))
        template = self.templates[template_index]
        name = _as_words(self.class_names[index])
        about = f"{name} is {self.domain}. " if self.domain else ""
        if "{similar}" in template:
            similar = ", ".join(map(_as_words, self._similar.find(index)))
            template = template.replace("{similar}", similar or NOTHING_SIMILAR)
        count = -(-self.num_sentences // len(self.templates))
        lines = "one sentence" if count == 1 else f"{count} different sentences, one a line,"
        return (
            f"{about}{template.replace('{}', name)} Answer with {lines} and nothing else. Each begins with the name, "
            "has at most 25 words and says only what can be seen."
        )


def _as_words(class_name: str) -> str:
    return class_name.replace("_", " ")
