"""Options that several commands share: what they may be, and how they are read."""

import json
import os
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers.hf_argparser import HfArg

from ..configuration_microclip import MicroCLIPConfig
from ..data.sources import load_images
from ..descriptions.files import read_descriptions
from ..loading import choose_device
from ..passes.row_pass import join_processes
from ..presets import Preset, list_presets, load_preset, load_split
from ..text_heads import check_templates
from . import naming_options


@dataclass
class AdaptedOptions:
    """The model, and what it is computed on, of the commands that use an adapted one."""

    model: str = HfArg(help="An adapted model: Hub id or folder.", aliases=["--model_name_or_path"])
    # So that classes below can have fields without a default.
    _: KW_ONLY
    device: str | None = HfArg(
        default=None, help="Such as cpu or cuda:1. Default: a GPU if there is one, else the CPU."
    )


@dataclass
class ImageOptions:
    """The model, the images and the texts, of the commands that adapt and evaluate."""

    # The option that names the data set's split to measure on.
    TEST_SPLIT: ClassVar[str] = "dataset_split"

    model_name_or_path: str = HfArg(help="Hub id or folder.")
    _: KW_ONLY
    preset: str | None = HfArg(
        default=None,
        help=f"A benchmark by name. It is one of {', '.join(list_presets())}, and stands for its data set on the Hub, "
        "splits, columns, class names and prompts; other options replace them.",
    )
    test_dir: str | None = HfArg(
        default=None,
        help="Folder of images with labels, to measure accuracy on. They lie in sub-folders named like the classes, "
        "or in Arrow, Parquet or WebDataset (.tar) files.",
    )
    dataset_name: str | None = HfArg(
        default=None, help="Images of a data set on the Hub. The folder of a copy of its repository does too."
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of --dataset_name.")
    dataset_revision: str | None = HfArg(default=None, help="Its commit, branch or tag.")
    dataset_split: str | None = HfArg(
        default=None,
        help="Split of --dataset_name. Default: the preset's, or 'train' to adapt to and 'test' to evaluate on.",
    )
    image_column: str | None = HfArg(default=None, help="Column of images. Default: the preset's, or the only one.")
    label_column: str | None = HfArg(
        default=None, help="Column of labels; they only measure. Default: the preset's, or 'label'."
    )
    class_names: str | None = HfArg(
        default=None,
        help="Text file with one class name a line, or JSON. Default: the preset's; an adapted model has its own.",
    )
    descriptions: str | None = HfArg(
        default=None,
        help='File of sentences about each class. JSON {"class": ["sentence", ...]}, or .txt of lines "class: '
        'sentence". Default: the templates.',
    )
    templates: list[str] | None = HfArg(
        default=None, help="Prompts with {} for the class name. Default: the preset's, or 'a photo of a {}.'"
    )
    config_overrides: str | None = HfArg(
        default=None,
        help="Architecture of the microCLIP that a CLIP becomes, as JSON, for example "
        '\'{"prior_weighting": "uniform"}\'.',
    )

    def check(self, split: str) -> None:
        """Refuse missing files, prompts without {} and images (of "train" or "test") that are named twice or never."""
        check_files(self, "class_names", "descriptions")
        check_templates(self.templates)
        folder = vars(self)[f"{split}_dir"]
        num_sources = (folder is not None) + (self.dataset_name is not None)
        if num_sources == 2 or (num_sources == 0 and self.preset is None):
            raise ValueError(f"Pass the images with either --{split}_dir or --dataset_name, or with --preset.")
        names = ("dataset_config", "dataset_revision", "dataset_split")
        refused = [f"--{name}" for name in names if vars(self)[name] is not None]
        if folder is not None and refused:
            raise ValueError(f"{', '.join(refused)} can't go with --{split}_dir; leave out one or the other.")

    def read_overrides(self) -> dict[str, Any]:
        """The architecture's settings from JSON; an error where it isn't JSON, or [`MicroCLIPConfig`] hasn't such."""
        text = self.config_overrides
        try:
            overrides = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"--config_overrides {text} isn't JSON: {error}") from error
        if not isinstance(overrides, dict):
            example = '{"fg_query": "cls"}'
            raise ValueError(f"--config_overrides {text} is no JSON object; pass one such as '{example}'.")
        names = sorted(MicroCLIPConfig.architecture_names())
        unknown = ", ".join(repr(name) for name in sorted(set(overrides) - set(names)))
        if unknown:
            raise ValueError(f"--config_overrides has {unknown}; the settings are {', '.join(names)}.")
        # It knows which values are none.
        MicroCLIPConfig(**overrides)
        return overrides

    def apply_preset(self, folder: str | None, **splits: str | None) -> Preset | None:
        """The preset, if any, with what other options put in its place; those that aren't given become the preset's.

        A `folder` holds one's own images in place of its data set; `splits` are `train_split` and `test_split`.
        """
        if self.preset is None:
            return None
        preset = load_preset(self.preset).override(
            dataset=self.dataset_name,
            config=self.dataset_config,
            revision=self.dataset_revision,
            image_column=self.image_column,
            label_column=self.label_column,
            templates=self.templates,
            **splits,
        )
        self.templates = list(preset.templates)
        if folder is None:
            self.dataset_name = preset.dataset
            self.dataset_config = preset.config
            self.dataset_revision = preset.revision
        return preset

    def read_texts(self, class_names: list[str]) -> dict[str, Any]:
        """What a CLIP's heads are made of: `class_names`, `templates`, and `descriptions` or `None`."""
        descriptions = None
        if self.descriptions is not None:
            place = self.class_names or "the class names"
            descriptions = read_descriptions(self.descriptions, class_names, place)
        return {"class_names": class_names, "templates": self.templates, "descriptions": descriptions}

    def read_images(
        self, split: str, preset: Preset | None, class_names: list[str] | None, **reading: Any
    ) -> Dataset | IterableDataset:
        """Images of the folder `<split>_dir`, of the preset, or of the Hub, with labels numbered like the classes.

        `class_names` are by default those of the preset's data set; `reading` goes to `open_dataset`.
        """
        folder = vars(self)[f"{split}_dir"]
        split_option = "dataset_split" if split == "train" else self.TEST_SPLIT
        if preset is not None:
            options = {"source": f"{split}_dir", "dataset": "dataset_name", f"{split}_split": split_option}
            with naming_options("class_names", **options):
                return load_split(preset.override(class_names=class_names), split, folder, **reading)
        reading |= {"image_column": self.image_column, "label_column": self.label_column}
        if folder is None:
            reading |= {"hub": True, "config_name": self.dataset_config, "revision": self.dataset_revision}
            reading["split"] = vars(self)[split_option] or split
        return load_images(folder or self.dataset_name, class_names, **reading)


def start_processes(name: str | None) -> tuple[PartialState, torch.device]:
    """The processes of this launch, and this one's device, of --device `name`: of one process any, of several a GPU
    each, or the CPU.
    """
    device = choose_device(name, "--device")
    state = join_processes(device)
    if state.num_processes == 1:
        return state, device
    if name is not None and device != state.device and device.type != "cpu":
        raise ValueError(f"--device {name} is one; of {state.num_processes} processes each has its own.")
    return state, state.device


def check_files(options: Any, *names: str) -> None:
    """Refuse files that aren't there, of the options of these names."""
    for name in names:
        path = vars(options)[name]
        if path is not None and not os.path.isfile(path):
            problem = "that is a folder; pass a file" if os.path.isdir(path) else "there is no such file"
            raise ValueError(f"--{name} {path}: {problem}.")
