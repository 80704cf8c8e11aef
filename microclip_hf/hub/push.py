"""A saved model folder, pushed to the Hub: what is in it, whether it is whole, and one commit of it."""

import json
import os
import re
import shlex
from collections.abc import Iterable
from concurrent.futures import Future
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_microclip import MicroCLIPConfig
from ..modeling_microclip import MicroCLIPForImageClassification, check_loading_report, check_weights
from ..text_heads import abbreviate


CONFIG = "config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
CARD = "README.md"
PICTURE = "adaptation.png"
DESCRIPTIONS = "descriptions.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What is pushed of a model besides its code, and replaces what the repository has of it.
MODEL = (
    *(CONFIG, *WEIGHTS, "model-?????-of-?????.safetensors", IMAGE_PROCESSOR),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *(PICTURE, DESCRIPTIONS, "training_args.json", "trainer_state.json"),
    *("all_results.json", "train_results.json", "eval_results.json"),
)
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
# All that is pushed but code. Nothing else is: no checkpoints, optimizer states, pickles, tokens.
PUSHED = (*MODEL, CARD, *LICENSES, "runs/*events.out.tfevents.*")
# What a repository of no model yet may hold.
HARMLESS = {".gitattributes", CARD, *LICENSES}


def _read_config(folder: str | os.PathLike) -> dict[str, Any]:
    try:
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{Path(folder, CONFIG)} isn't JSON; save the model again. ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{Path(folder, CONFIG)} holds a {type(config).__name__}; save the model again.")
    return config


def _code_files(folder: str | os.PathLike, config: dict[str, Any]) -> set[str]:
    """The modules in the config's `auto_map`, and those that they import, whether or not they are there."""
    modules = [Path(folder, f"{name.split('.')[0]}.py") for name in (config.get("auto_map") or {}).values()]
    imported = [file for module in modules if module.exists() for file in _imports(module)]
    return {os.path.basename(file) for file in (*modules, *imported)}


def _imports(module: Path) -> list[str]:
    try:
        return get_relative_import_files(module)
    except FileNotFoundError as error:
        # Of a module that isn't there it can't be known what it imports itself.
        return [error.filename]


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """Paths relative to the folder, sorted: the model, its code and card, and what training wrote beside them."""
    folder = Path(folder)
    code = _code_files(folder, _read_config(folder))
    paths = (path for path in (*folder.iterdir(), *(folder / "runs").rglob("*")) if path.is_file())
    files = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(file for file in files if file in code or _is_listed(file, PUSHED))


def _is_listed(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in patterns)


def check_model_folder(folder: str | os.PathLike) -> None:
    """Whether a folder holds all that others need to load and understand the model; an error where it isn't a
    microCLIP, lacks something, or its weights can't be loaded.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} isn't a folder; pass one that an adapted model was saved in.")
    names = os.listdir(folder)
    config = _read_config(folder) if CONFIG in names else {}
    if config and config.get("model_type") != MicroCLIPConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}; pass a microCLIP that was adapted or made "
            "by from_clip, and saved."
        )
    # Of the weights one file is enough, whole or the index of its parts.
    weights = WEIGHTS[:1] if not set(WEIGHTS) & set(names) else ()
    wanted = [CONFIG, *weights, IMAGE_PROCESSOR, *sorted(_code_files(folder, config)), CARD]
    missing = [name for name in wanted if name not in names]
    if config and not config.get("auto_map"):
        missing.append(f"auto_map in {CONFIG}")
    if missing:
        raise ValueError(
            f"{folder} lacks {abbreviate(missing)}, which others need to use the model. microclip adapt writes all of "
            "it; from Python, save_model or save_pretrained writes the model and create_model_card the README.md."
        )
    try:
        # Sizes that don't fit are reported below with all else that is wrong.
        model, report = MicroCLIPForImageClassification.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"The model in {folder} can't be loaded: {error}") from error
    check_loading_report(report, os.fspath(folder), "save it again")
    check_weights(model)


def check_repository(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> set[str]:
    """The files of an existing repository that may be pushed to; an error where it holds something else than a
    microCLIP, or is public where `private` asks for the contrary.
    """
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists on the Hub and is public; make it private there, or choose another repository."
        )
    files = {file.rfilename for file in info.siblings}
    foreign = files - HARMLESS
    if not foreign:
        return files
    content = f"other files ({abbreviate(sorted(foreign))})"
    if CONFIG in foreign:
        config, _ = PreTrainedConfig.get_config_dict(repo_id, revision=info.sha, token=token)
        if config.get("model_type") == MicroCLIPConfig.model_type:
            return files
        content = f"a model of type {config.get('model_type')!r}"
    raise ValueError(
        f"{repo_id} on the Hub holds {content}, which a push would mix with this one; choose another repository."
    )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    blocking: bool = True,
) -> CommitInfo | Future:
    """Push what [`files_to_push`] lists in one commit, to a repository that is made where there is none.

    The card's example loads the repository, whatever name it had before. Files that are there already aren't sent
    again. Of an earlier model nothing stays that would count for this one; logs, licences and other files do.

    Args:
        repo_id (`str`): `user/name`, or `name` of the user who is logged in.
        private (`bool`, *optional*): whether a new repository is private; an existing one then has to be.
        revision (`str`, *optional*): a branch that exists. Default: the main one.
        token (`str`, *optional*): default: that of `hf auth login`, or `HF_TOKEN`.
        blocking (`bool`, *optional*, defaults to `True`): wait until all is there, rather than return a `Future`.

    Raises:
        RuntimeError: if the push fails, or the repository holds something else, see [`check_repository`]. It says
            which command does it later; the repository is as before, a new one perhaps empty.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        earlier = check_repository(repo_id, private, revision, token)
        contents = {name: Path(folder, name) for name in files_to_push(folder)}
        if CARD in contents:
            contents[CARD] = _card_of(contents[CARD], repo_id)
        stale = (name for name in sorted(earlier - contents.keys()) if _is_listed(name, MODEL))
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations += map(CommitOperationDelete, stale)
        # upload_folder may split a large folder over several commits.
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, run_as_future=not blocking
        )
    except Exception as error:
        command = ["microclip", "push", os.fspath(folder), "--repo_id", repo_id]
        command += ["--private"] if private else []
        command += ["--revision", revision] if revision else []
        raise RuntimeError(
            f"The push to the Hub failed: {error}\nThe result is safe in {folder}; once that is mended (by "
            f"'hf auth login', if the Hub doesn't know you), push it with\n  {shlex.join(command)}"
        ) from error


def _card_of(path: Path, repo_id: str) -> bytes:
    """The card, whose example loads the repository."""
    example = r'(pipeline\("image-classification", model=")(?:[^"\\]|\\.)*'
    return re.sub(example, rf"\g<1>{repo_id}", path.read_bytes().decode()).encode()
