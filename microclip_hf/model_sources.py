"""Where a model is to come from, before it is loaded: whether it can be, and what a download weighs."""

import os
import sys
from fnmatch import fnmatchcase

from huggingface_hub import HfApi, ModelInfo, constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .configuration_microclip import CONFIG_FILES, PROCESSOR_FILES, TOKENIZER_FILES, checkpoint_files, describe_missing
from .open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS


# The first of these that a repository has are its weights.
WEIGHTS = (
    *("model.safetensors", "model-?????-of-?????.safetensors"),
    *("pytorch_model.bin", "pytorch_model-?????-of-?????.bin"),
    *OPEN_CLIP_WEIGHTS,
)
OTHERS = (*CONFIG_FILES, OPEN_CLIP_CONFIG, *PROCESSOR_FILES, *TOKENIZER_FILES)
TIMEOUT = 10.0  # seconds


def describe_problem(source: str) -> str | None:
    """Why a model, Hub id or folder, can't be loaded, as far as one question tells; `None` where nothing is known."""
    missing = describe_missing(source, {})
    if missing or os.path.isdir(source) or checkpoint_files(source, CONFIG_FILES, {}):
        return missing
    try:
        if not _is_cached(source, OPEN_CLIP_CONFIG):
            _ask_hub(source)
    except (HfHubHTTPError, ValueError):  # which whoever loads it explains
        return None
    except HTTPError as error:
        return (
            f"there is no such folder here, it wasn't downloaded before, and {constants.ENDPOINT} can't be reached "
            f"({error})."
        )
    return None


def announce_download(source: str) -> None:
    """Print to stderr, in the first process, what will be downloaded, where that is a model's weights."""
    if os.path.exists(source) or os.environ.get("RANK", "0") != "0":
        return
    try:
        is_here = any(_is_cached(source, name) for name in WEIGHTS)
        info = None if is_here else _ask_hub(source)
    except (HTTPError, OSError, ValueError):  # it's about a line to read, not about the model
        return
    size = _download_size(source, info) if info is not None else 0
    if size:
        print(f"{source} will be downloaded once: {_describe_size(size)}.", file=sys.stderr)


def _ask_hub(source: str) -> ModelInfo | None:
    """What the Hub has, asked once, without the client's retries; `None` offline."""
    return None if is_offline_mode() else HfApi().model_info(source, files_metadata=True, timeout=TIMEOUT)


def _download_size(source: str, info: ModelInfo) -> int:
    """Bytes that loading has to fetch; 0 where the weights are here."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    candidates = [_matching(sizes, pattern) for pattern in WEIGHTS]
    weights = next(filter(None, candidates), [])
    others = [name for pattern in OTHERS for name in _matching(sizes, pattern)]
    missing = [name for name in (*weights, *others) if not _is_cached(source, name)]
    return sum(sizes[name] for name in missing) if set(weights) & set(missing) else 0


def _matching(names: dict[str, int], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _is_cached(source: str, name: str) -> bool:
    return isinstance(try_to_load_from_cache(source, name), str)


def _describe_size(size: int) -> str:
    """As the Hub's pages say it, in powers of 1000."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"
