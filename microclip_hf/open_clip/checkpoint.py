"""A source in open_clip's format, found and read: a folder, a Hub repository or a bare file of weights."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import cached_file

from ..configuration_microclip import (
    CONFIG_FILES,
    HUB_PREFIX,
    PICKLES,
    TOKENIZER_FILES,
    abbreviate,
    check_loading_report,
    check_weights,
    describe_missing,
    naming_damaged_file,
    pick_hub_kwargs,
)
from ..files import UNFINISHED, check_writable, whole_files
from ..text_heads import load_tokenizer
from .settings import ADVICE, METACLIP_2_ADVICE, check_settings, infer_settings, make_config, make_image_processor
from .weights import load_weights, rename_weights


OPEN_CLIP_CONFIG = "open_clip_config.json"
# The first of these that there is holds the weights.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
BARE_FILES = (".safetensors", *PICKLES)
# Open_clip comes with CLIP's vocabulary; here it is that of this CLIP.
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class OpenClipCheckpoint:
    """A CLIP in open_clip's format, whose settings fit transformers' CLIP; [`read_open_clip`] makes one.

    Args:
        source (`str`): the Hub id, folder or file.
        settings (`dict`): of the model, as open_clip calls them.
        preprocessing (`dict`, *optional*): of photos. Default: open_clip's, which is OpenAI's.
        hub_kwargs (`dict`, *optional*): keywords that say which files of the Hub, such as `revision`.
    """

    source: str
    settings: Mapping[str, Any]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    hub_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> CLIPConfig:
        """As transformers has it."""
        return make_config(self.source, self.settings)

    @cached_property
    def image_processor(self) -> CLIPImageProcessorPil:
        """With the checkpoint's own way to resize, mean and standard deviation."""
        return make_image_processor(self.preprocessing, self.config.vision_config.image_size)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """A folder's own tokenizer, or else the one that the settings name, a repository's own, or CLIP's."""
        named = self.settings["text_cfg"].get("hf_tokenizer_name")
        may_have = os.path.isdir(self.source) or (named is None and not os.path.isfile(self.source))
        if may_have and any(_find_file(self.source, name, self.hub_kwargs) for name in TOKENIZER_FILES):
            tokenizer = load_tokenizer(self.source, dict(self.hub_kwargs))
        else:
            advice = (
                f"{self.source} needs it. Load it once while the Hub is at hand, or say where it is: --tokenizer of "
                "microclip convert, in Python tokenizer= of from_clip."
            )
            # What else the keywords say, such as a revision, is another repository's.
            access = {name: self.hub_kwargs[name] for name in ("cache_dir", "token") if name in self.hub_kwargs}
            tokenizer = load_tokenizer((named or CLIP_TOKENIZER).removeprefix(HUB_PREFIX), access, advice)
            num_tokens = self.config.text_config.vocab_size
            # The bare file of a MetaCLIP 2 looks like a CLIP's, but for its vocabulary.
            if named is None and len(tokenizer) != num_tokens:
                raise ValueError(
                    f"{self.source} has {num_tokens} tokens, and CLIP's tokenizer, which would stand in, has "
                    f"{len(tokenizer)}. {METACLIP_2_ADVICE} Else pass its own tokenizer."
                )
        return tokenizer

    def find_weights(self) -> Path:
        """The file of weights, downloaded if need be. A folder's may have any name, if it is the only one.

        Raises:
            ValueError: if there is none.
        """
        if os.path.isfile(self.source):
            return Path(self.source)
        for name in OPEN_CLIP_WEIGHTS:
            with contextlib.suppress(OSError):  # without the Hub one may not be in the cache, and the next may
                file = _find_file(self.source, name, self.hub_kwargs)
                if file is not None:
                    return file
        if not os.path.isdir(self.source):
            _find_file(self.source, OPEN_CLIP_WEIGHTS[0], self.hub_kwargs)  # for its error, where the Hub is away
        others = [file for file in Path(self.source).glob("*") if file.suffix in BARE_FILES]
        if len(others) == 1:
            return others[0]
        names = " or ".join(OPEN_CLIP_WEIGHTS)
        if others:
            several = abbreviate(sorted(file.name for file in others))
            raise ValueError(f"{self.source} has several files of weights, {several}. Call the right one {names}.")
        raise ValueError(f"{self.source} has a configuration, {OPEN_CLIP_CONFIG}, and no weights. Add {names}.")

    def load(
        self, dtype: torch.dtype | str = "auto", tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
        """The CLIP and its tokenizer.

        Args:
            dtype (`torch.dtype` or `"auto"`, *optional*, defaults to `"auto"`): by default the file's, if it is one.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): default: see [`load_tokenizer`].
            kwargs: for `CLIPModel.from_pretrained`.

        Raises:
            ValueError: if a file is damaged or holds more than weights, if these don't fit the settings, or the
                tokenizer doesn't fit the text tower.
        """
        tokenizer = tokenizer or self.load_tokenizer()
        tokenizer.model_max_length = self.config.text_config.max_position_embeddings
        self._set_end(tokenizer)
        weights = rename_weights(load_weights(self.find_weights(), self.source))
        if dtype == "auto":
            dtypes = {weight.dtype for weight in weights.values()}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        hub_kwargs = pick_hub_kwargs(kwargs)
        others = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
        # Weights of another shape are refused below, by name.
        others |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = CLIPModel.from_pretrained(None, config=self.config, state_dict=weights, dtype=dtype, **others)
        model.config._name_or_path = self.source
        if report["unexpected_keys"]:
            names = abbreviate(sorted(report["unexpected_keys"]))
            raise ValueError(f"{self.source} has the weights {names}, which CLIPModel hasn't. {ADVICE}")
        check_loading_report(report, self.source, "download both again")
        return model, tokenizer

    def _set_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Open_clip pools a text at its highest id, transformers where it ends: these must be one."""
        highest = max(tokenizer.get_vocab().values())
        if tokenizer.eos_token_id != highest:
            raise ValueError(
                f"{self.source} pools a text at its highest token id, {highest} in this {type(tokenizer).__name__}, "
                f"whose end of text is {tokenizer.eos_token_id}. {ADVICE}"
            )
        text_config = self.config.text_config
        text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, highest


def read_open_clip(
    source: str | os.PathLike, quick_gelu: bool | None = None, hub_kwargs: Mapping[str, Any] | None = None
) -> OpenClipCheckpoint | None:
    """The checkpoint that a source is in open_clip's format, read so far as to know that it can be converted.

    Args:
        source (`str` or `os.PathLike`): a Hub id (`hf-hub:user/name` too), a folder, or a file of weights.
        quick_gelu (`bool`, *optional*): whether a bare file's model has OpenAI's activation; weights don't tell.
        hub_kwargs (`dict`, *optional*): keywords that say which files of the Hub, such as `revision`.

    Returns:
        `None` for what is in transformers' format, which wins where there are both, and for what isn't there.

    Raises:
        ValueError: if it can't be converted, a file is damaged, or `quick_gelu` is missing or too much.
    """
    source = os.fspath(source).removeprefix(HUB_PREFIX)
    hub_kwargs = hub_kwargs or {}
    if is_bare_file(source):
        return _read_bare_file(source, quick_gelu)
    if Path(source).suffix in BARE_FILES and not os.path.exists(source):
        raise ValueError(f"There is no file {source} here.")
    if quick_gelu is not None:
        raise ValueError(f"quick_gelu is for bare files; the configuration of {source} says it. Leave it out.")
    file = None if describe_missing(source, dict(hub_kwargs)) else _find_config(source, hub_kwargs)
    if file is None:
        return None
    with naming_damaged_file(file.parent, (file.name,), {}):
        content = json.loads(file.read_bytes())
        # Early configurations are the model's alone.
        settings, preprocessing = content.get("model_cfg", content), content.get("preprocess_cfg") or {}
    check_settings(source, settings, preprocessing)
    checkpoint = OpenClipCheckpoint(source, settings, preprocessing, hub_kwargs)
    if os.path.isdir(source):
        checkpoint.find_weights()
    return checkpoint


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    quick_gelu: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> OpenClipCheckpoint:
    """Write a CLIP of open_clip's as transformers does, with tokenizer and image processor, all of it or nothing.

    Args:
        source, quick_gelu: see [`read_open_clip`].
        folder (`str` or `os.PathLike`): where to; there is nothing in it yet, or no such folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): default: see [`OpenClipCheckpoint`].

    Raises:
        ValueError: if the source isn't open_clip's or can't be converted, or the folder isn't empty.
    """
    check_empty(folder)
    checkpoint = read_open_clip(source, quick_gelu)
    if checkpoint is None:
        raise ValueError(f"{source} isn't in open_clip's format; a CLIP in transformers' format is taken as it is.")
    model, tokenizer = checkpoint.load(tokenizer=tokenizer)
    check_weights(model)
    with whole_files(folder, CONFIG_FILES[0]) as incomplete:
        for part in (model, tokenizer, checkpoint.image_processor):
            part.save_pretrained(incomplete)
    return checkpoint


def check_empty(folder: str | os.PathLike) -> None:
    """Refuse a folder that holds more than what a run that was killed left, or that can't be written."""
    if os.path.isfile(folder) or (os.path.isdir(folder) and not _is_empty(Path(folder))):
        raise ValueError(f"{os.fspath(folder)} exists and isn't an empty folder; choose another, none is overwritten.")
    check_writable(folder, "The folder")


def _is_empty(folder: Path) -> bool:
    return all(file.name.startswith(UNFINISHED) for file in folder.iterdir())


def is_bare_file(source: str | os.PathLike) -> bool:
    """Whether a source is a file that may hold weights, by its name."""
    return os.path.isfile(source) and Path(source).suffix in BARE_FILES


def _read_bare_file(file: str, quick_gelu: bool | None) -> OpenClipCheckpoint:
    weights = load_weights(Path(file), file)
    if quick_gelu is None:
        raise ValueError(
            f"{file} doesn't tell the model's activation. Say it to from_clip with quick_gelu=True or False, or make "
            f"a folder of it: microclip convert {file} FOLDER --quick_gelu true. It is true if its authors load "
            "the file into OpenAI's model, or into one called -quickgelu, and else false."
        )
    try:
        settings = infer_settings({name: weight.shape for name, weight in weights.items()})
    except KeyError as error:
        raise ValueError(f"{file} lacks the weight {error}. {ADVICE}") from error
    return OpenClipCheckpoint(file, {**settings, "quick_gelu": quick_gelu})


def _find_config(source: str, hub_kwargs: Mapping[str, Any]) -> Path | None:
    """Open_clip's configuration; `None` where there is one of transformers', or none. An `OSError` without the Hub."""
    # Transformers gives timm's configurations this type; the CLIP beside them is open_clip's.
    unreachable, timms = None, "timm_wrapper"
    try:
        with naming_damaged_file(source, CONFIG_FILES, dict(hub_kwargs)):
            if PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0].get("model_type", timms) != timms:
                return None
    except OSError as error:  # the cache may lack this file of a repository, and have the other
        unreachable = error
    try:
        return _find_file(source, OPEN_CLIP_CONFIG, hub_kwargs)
    except OSError as error:
        raise unreachable or error from None


def _find_file(source: str, name: str, hub_kwargs: Mapping[str, Any]) -> Path | None:
    """A file of a folder, or of a repository, then in the cache; `None` if it isn't there."""
    file = cached_file(source, name, **hub_kwargs, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)
