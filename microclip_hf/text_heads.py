"""Class names, templates and descriptions become the two text heads (arXiv:2510.02270, section 3.3)."""

import difflib
import itertools
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, MetaClip2Model, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from .configuration_microclip import TOKENIZER_FILES, abbreviate, naming_damaged_file
from .saliency import check_finite


AnyCLIP = CLIPModel | MetaClip2Model
DEFAULT_TEMPLATES = ("a photo of a {}.",)
# A class's name weights are refused if they cancel to less than this share of their magnitudes.
MIN_WEIGHT_SHARE = 1e-3
# Old CLIP configurations name this end-of-text id, OpenAI's among them; the tower then pools the largest id. Of a
# MetaCLIP 2 it's the end-of-text id.
LEGACY_EOS_TOKEN_ID = 2


def normalize_name(name: str) -> str:
    """The rule by which class names, labels and description keys match: case, `_`, `-` and spacing don't count."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def whole_characters(text: str) -> str:
    """The text without lost characters, of which language models and JSON's escapes sometimes leave a half.

    Two halves (surrogates) become their character; a lone one, which no tokenizer and no file in UTF-8 takes, is left
    out with the space before it, and so is U+FFFD, the sign for a lost character.
    """
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return re.sub(r"\s*\ufffd+", "", joined)


def contrast_spellings(name: str, others: Sequence[str], place: str) -> str:
    """A sentence for an error's text, with a space before it: which of the names in a place a name that is none of
    them is most like, as either may be misspelt. Empty if it is like none.
    """
    spellings = {normalize_name(other): other for other in others}
    near = difflib.get_close_matches(normalize_name(name), spellings, 1, cutoff=0.75)
    if not near:
        return ""
    return f" The nearest to {name!r} in {place} is {spellings[near[0]]!r}: make the two the same."


def name_positions(names: Sequence[str]) -> dict[str, int]:
    """The index of each name, by [`normalize_name`]."""
    return {normalize_name(name): index for index, name in enumerate(names)}


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The class names as a list; an error unless they are whole, two or more, and differ under [`normalize_name`]."""
    if isinstance(class_names, (str, Mapping)) or not isinstance(class_names, Sequence):
        raise TypeError(f"class_names is a {type(class_names).__name__}; pass a list of strings, one a class.")
    for name in class_names:
        if not isinstance(name, str):
            raise TypeError(f"class_names holds {name!r}, a {type(name).__name__}; every class name must be a string.")
        check_whole("class_names", name)
    if len(class_names) < 2:
        raise ValueError(f"class_names is {list(class_names)!r}; a classifier needs at least two classes.")
    earlier: dict[str, str] = {}
    for name in class_names:
        key = normalize_name(name)
        if not key:
            raise ValueError(f"class_names holds {name!r}; give every class a name with at least one letter.")
        if key in earlier:
            raise ValueError(
                f"class_names holds the duplicate {name!r} (the same as {earlier[key]!r}: case, '_' and '-' don't "
                "count). Remove one or make them differ."
            )
        earlier[key] = name
    return list(class_names)


def check_templates(templates: str | Sequence[str] | None) -> list[str]:
    """The prompt templates as a list, by default `DEFAULT_TEMPLATES`; an error if one isn't whole or has no `{}`."""
    if templates is None:
        return list(DEFAULT_TEMPLATES)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError(f"templates is empty; pass strings such as {DEFAULT_TEMPLATES[0]!r}, or None for that one.")
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f"templates holds {template!r}, a {type(template).__name__}; pass strings.")
        check_whole("templates", template)
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no '{{}}' for the class name, as in 'a photo of a {{}}.'")
    return templates


def check_whole(argument: str, text: str) -> None:
    """Refuse half a character (a surrogate), which no tokenizer takes."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{argument} holds {text!r} with half a character (a surrogate); write that text anew.")


def match_descriptions(
    class_names: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None,
    place: str = "descriptions",
    names_place: str = "the class names",
) -> list[list[str] | None]:
    """For each class its descriptions by [`whole_characters`], or `None` where there are none.

    Keys of `{class: [sentence, ...]}` match class names by [`normalize_name`]; an error if one is no class, two are
    the same class, or a list or sentence is empty. It says that they stand in `place`, and the names in `names_place`.
    """
    if descriptions is None:
        return [None] * len(class_names)
    if not isinstance(descriptions, Mapping):
        raise TypeError(
            f"descriptions is a {type(descriptions).__name__}; pass a dictionary {{class name: [sentence, ...]}}."
        )
    positions = name_positions(class_names)
    matched: list[list[str] | None] = [None] * len(class_names)
    for key, sentences in descriptions.items():
        index = positions.get(normalize_name(key)) if isinstance(key, str) else None
        if index is None:
            unknown = [other for other in descriptions if normalize_name(str(other)) not in positions]
            others = f" {len(unknown)} keys are none, also {abbreviate(unknown[1:])}." if len(unknown) > 1 else ""
            advice = contrast_spellings(str(key), class_names, names_place) or " Rename or remove it."
            raise ValueError(
                f"{place} has the key {key!r}, which is none of the {len(class_names)} class names "
                f"({abbreviate(class_names)}).{others}{advice}"
            )
        if matched[index] is not None:
            raise ValueError(f"{place} has two keys for the class {class_names[index]!r}; merge them into one.")
        matched[index] = _check_sentences(key, sentences)
    return matched


def _check_sentences(key: str, sentences: Sequence[str]) -> list[str]:
    place = f"descriptions[{key!r}]"
    if isinstance(sentences, str) or not isinstance(sentences, Sequence):
        raise TypeError(f"{place} is a {type(sentences).__name__}; pass a list of sentences.")
    if not sentences:
        raise ValueError(f"{place} is empty; add a sentence, or remove the key to use the templates.")
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise TypeError(f"{place} holds {sentence!r}, a {type(sentence).__name__}; pass strings.")
        if not whole_characters(sentence).strip():
            raise ValueError(f"{place} holds an empty sentence; remove it.")
    return [whole_characters(sentence) for sentence in sentences]


def load_tokenizer(
    source: str | None,
    hub_kwargs: dict[str, Any],
    advice: str = "Pass tokenizer=, the one that belongs to this CLIP (for example "
    "AutoTokenizer.from_pretrained(<its id>)).",
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a CLIP; an error, ending with `advice`, if there is none or its files are damaged."""
    if source is None:
        raise ValueError(f"This CLIP wasn't loaded from a Hub id or a folder, so its tokenizer isn't known. {advice}")
    with naming_damaged_file(source, TOKENIZER_FILES, hub_kwargs):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
        except Exception as error:  # the tokenizers library knows no other
            raise ValueError(f"No tokenizer could be loaded from {source!r}. {advice}") from error
    # Where there are no files, transformers makes a tokenizer without words.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{source!r} holds no tokenizer. {advice}")
    return tokenizer


@torch.no_grad()
def encode_texts(
    clip: AnyCLIP, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Projected text features `(len(texts), projection_dim)`, not normalised, float32, on the CPU.

    Texts longer than the tower's positions are cut, with one warning; the tokenizer of another tower is an error.
    """
    max_length = clip.config.text_config.max_position_embeddings
    device = clip.text_model.device
    features = []
    num_cut = 0
    for start in tqdm(range(0, len(texts), batch_size), "Encoding texts", disable=len(texts) <= batch_size):
        batch = list(texts[start : start + batch_size])
        # Once without truncation, to tell of it.
        num_cut += sum(len(ids) > max_length for ids in tokenizer(batch, verbose=False)["input_ids"])
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        _check_tokens(clip, tokenizer, tokens["input_ids"])
        outputs = clip.get_text_features(tokens["input_ids"].to(device), tokens["attention_mask"].to(device))
        features.append(outputs.pooler_output.float().cpu())
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(texts)} texts are longer than the {max_length} positions of the text tower and "
            "were truncated; shorter sentences use all of their words.",
            stacklevel=2,
        )
    features = torch.cat(features)
    check_finite(features, "The text features", "Check the weights of the text tower, and load them in float32.")
    return features


def _check_tokens(clip: AnyCLIP, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> None:
    """A foreign tokenizer gives ids that the tower lacks, or no end-of-text token where the tower pools."""
    config = clip.config.text_config
    advice = f"Pass the tokenizer that was saved with this CLIP; got a {type(tokenizer).__name__}"
    end = tokenizer.eos_token_id
    if input_ids.max() >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gave the id {int(input_ids.max())}, but the text tower has {config.vocab_size} tokens. "
            f"{advice}."
        )
    if isinstance(clip, CLIPModel) and config.eos_token_id == LEGACY_EOS_TOKEN_ID:
        pools_the_end = end is not None and (input_ids.amax(-1) == end).all()
    else:
        pools_the_end = (input_ids == config.eos_token_id).any(-1).all()
    if not pools_the_end:
        raise ValueError(
            f"The tokenizer doesn't end texts with the end-of-text token that the text tower pools "
            f"(id {config.eos_token_id}). {advice} whose end-of-text id is {end}."
        )


def build_heads(
    prompt_features: Sequence[torch.Tensor],
    description_features: Sequence[torch.Tensor],
    prior_weighting: str = "name",
    class_names: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two heads from text features (arXiv:2510.02270, section 3.3).

    With `t_c` the unit mean of class c's raw prompt features, `d_ci` its unit description features and
    `a_ci = d_ci . t_c`, the learnable head starts at `unit(mean_i d_ci)` and the frozen head is
    `unit(sum_i a_ci d_ci / sum_i a_ci)`. With the prior weighting "uniform" every `a_ci` is 1.

    Features are raw, one tensor a class, `(num_templates, embed_dim)` and `(num_descriptions_c, embed_dim)`; the heads
    `(classifier, prior_head)`, each `(num_classes, embed_dim)`, have unit rows. An error if the weights of a class
    cancel, `|sum a| < 1e-3 sum |a|`.

    Example:
    ```python
    >>> prompt_features = [torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])]
    >>> description_features = [torch.tensor([[3.0, 4.0], [3.0, -4.0]]), torch.tensor([[0.0, 2.0]])]
    >>> classifier, prior_head = build_heads(prompt_features, description_features)
    >>> prior_head
    tensor([[1., 0.],
            [0., 1.]])
    ```
    """
    if prior_weighting not in ("name", "uniform"):
        raise ValueError(f'prior_weighting is {prior_weighting!r}; it must be "name" or "uniform".')
    classifier = []
    prior_head = []
    for index, (prompts, descriptions) in enumerate(zip(prompt_features, description_features, strict=True)):
        units = normalize(descriptions, dim=-1)
        weights = units.new_ones(len(units))
        if prior_weighting == "name":
            weights = units @ normalize(prompts.mean(0), dim=-1)
        if weights.sum().abs() <= MIN_WEIGHT_SHARE * weights.abs().sum():
            name = repr(class_names[index]) if class_names else str(index)
            raise ValueError(
                f"The name weights of class {name} cancel: they sum to {weights.sum():.2e} where their magnitudes "
                f"sum to {weights.abs().sum():.2e}. The text tower doesn't relate this name to its descriptions; "
                'check them, or use prior_weighting="uniform".'
            )
        classifier.append(normalize(units.mean(0), dim=-1))
        prior_head.append(normalize((weights @ units) / weights.sum(), dim=-1))
    return torch.stack(classifier), torch.stack(prior_head)


def stand_in(
    prompt_features: Sequence[torch.Tensor], description_features: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Description features of every class: where it has none (`None`), its prompts, moved to where descriptions lie.

    A prompt lies closer to all images than a description does, and its class would take the photos of the others. So
    unit prompts `p` become `p + mean_k (unit(mean_i d_ki) - t_k)`: the mean step from name to description over the
    classes k that have both, `t_k` and `d_ki` as in [`build_heads`]. Ours, not the paper's; where no class has
    descriptions, prompts stay as they are. Shapes are those of [`build_heads`].
    """
    steps = [
        normalize(normalize(descriptions, dim=-1).mean(0), dim=-1) - normalize(prompts.mean(0), dim=-1)
        for prompts, descriptions in zip(prompt_features, description_features, strict=True)
        if descriptions is not None
    ]
    if not steps:
        return list(prompt_features)
    step = torch.stack(steps).mean(0)
    return [
        normalize(prompts, dim=-1) + step if descriptions is None else descriptions
        for prompts, descriptions in zip(prompt_features, description_features, strict=True)
    ]


def encode_heads(
    clip: AnyCLIP,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: str | Sequence[str] | None = None,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    prior_weighting: str = "name",
    batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two heads of [`build_heads`] from texts; [`stand_in`] makes up for missing descriptions, with one warning.

    Underscores of class names become spaces in the prompts.
    """
    class_names = check_class_names(class_names)
    templates = check_templates(templates)
    matched = match_descriptions(class_names, descriptions)
    missing = [name for name, sentences in zip(class_names, matched, strict=True) if sentences is None]
    if missing and descriptions is not None:
        warnings.warn(
            f"{len(missing)} of {len(class_names)} classes have no descriptions, so their names stand in, which say "
            f"less: {', '.join(missing)}. Write a few sentences on each.",
            stacklevel=2,
        )
    prompts = [template.replace("{}", name.replace("_", " ")) for name in class_names for template in templates]
    described = [sentences for sentences in matched if sentences is not None]
    # All at once, so that batches are full.
    features = encode_texts(clip, tokenizer, prompts + list(itertools.chain(*described)), batch_size)
    prompt_features = features[: len(prompts)].split(len(templates))
    in_turn = iter(features[len(prompts) :].split([len(sentences) for sentences in described]))
    description_features = [None if sentences is None else next(in_turn) for sentences in matched]
    description_features = stand_in(prompt_features, description_features)
    return build_heads(prompt_features, description_features, prior_weighting, class_names)
