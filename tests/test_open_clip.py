"""CLIPs in open_clip's format against open_clip itself: features, tokens, pixels; what is refused, and how."""

import gzip
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation import draw_images
from conftest import CLASS_NAMES
from filelock import FileLock
from hub_server import HubServer, run_client
from PIL import Image
from safetensors.torch import load_file, save_file
from test_adapt import UNIFORM, flags
from test_hub import assert_loads_without_the_package
from tiny_inputs import make_tokenizer
from tolerances import within
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt, evaluate
from microclip_hf.commands import convert as convert_command
from microclip_hf.loading import load_adapted, load_clip, read_config, read_model_type
from microclip_hf.open_clip import checkpoint as checkpoints
from microclip_hf.open_clip import convert, read_open_clip
from microclip_hf.open_clip.settings import check_settings, infer_settings


ORACLES = Path(sys.prefix, "oracles")  # where `make` puts open_clip; see the Makefile
NARROW = {"width": 64, "heads": 1}
TINY = {"width": 64, "image_size": 32, "patch_size": 8, "layers": 2}
CASES = {
    "ViT-B-32": {"model": "ViT-B-32", "vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}},
    "ViT-B-32-quickgelu": {"model": "ViT-B-32-quickgelu", "text_cfg": NARROW},
    "ViT-B-16": {"model": "ViT-B-16", "text_cfg": NARROW, "preprocess_cfg": {"interpolation": "bilinear"}},
    "ViT-L-14": {
        "model": "ViT-L-14",
        "text_cfg": NARROW,
        "preprocess_cfg": {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.4, 0.5, 0.6]},
    },
    "ViT-L-14-336": {"model": "ViT-L-14-336", "text_cfg": NARROW},
    "ViT-H-14": {"model": "ViT-H-14", "text_cfg": NARROW},
    "DFN": {
        "model": "ViT-H-14-378-quickgelu",
        "vision_cfg": {"width": 160},
        "text_cfg": NARROW,
        "preprocess_cfg": {"resize_mode": "squash"},
    },
    "bigG": {
        "model": "ViT-bigG-14",
        "vision_cfg": {"width": 208, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {**NARROW, "norm_kwargs": {"eps": 1e-3}},
    },
    "CustomTextCLIP": {
        "model": "ViT-B-16",
        "settings": {"custom_text": True, "nonscalar_logit_scale": True},
        "vision_cfg": TINY,
        "text_cfg": NARROW,
    },
    "context length": {
        "model": "ViT-B-32",
        "vision_cfg": TINY,
        "text_cfg": {**NARROW, "context_length": 40},
    },
    "hf_tokenizer_name": {"model": "ViT-B-32", "vision_cfg": TINY, "text_cfg": {**NARROW, "vocab_size": 600}},
    "tiny": {"model": "ViT-B-32-quickgelu", "vision_cfg": TINY, "text_cfg": NARROW},
}
# No bare file tells another number of heads than open_clip's own models have, another epsilon or kind of GELU.
NOT_BARE = ("bigG",)
TEXTS = [
    "a photo of a red disc.",
    "Common Blackbird (Turdus merula), male, 24 cm: it's a bird's life!",
    "naïve façade über 東京, 1,000 m² 🦜",
    "word " * 100,
    "",
]
SIZES = [(300, 200), (200, 300), (359, 224)]


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory):
    """CLIP's tokenizer, of the vocabulary that comes with open_clip."""
    package = ORACLES / "open_clip"
    if not package.is_dir():
        pytest.skip("open_clip isn't here; `make test` installs it")
    lines = gzip.decompress((package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(clip_tokenizer, tmp_path_factory):
    """Open_clip's models and answers, a folder a case, made once by the first process that needs them."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "open_clip"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            shared.mkdir()
            make_tokenizer().save_pretrained(shared / "bytes")
            cases = json.loads(json.dumps(CASES))
            cases["hf_tokenizer_name"]["text_cfg"]["hf_tokenizer_name"] = str(shared / "bytes")
            (shared / "order.json").write_text(json.dumps([cases, TEXTS, str(clip_tokenizer)]))
            rng = np.random.default_rng(0)
            for width, height in SIZES:
                noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                noise.resize((width, height), Image.Resampling.BICUBIC).save(shared / f"{width}x{height}.png")
            program = [sys.executable, Path(__file__).with_name("open_clip_oracle.py"), shared / "order.json", shared]
            environment = {**os.environ, "PYTHONPATH": str(ORACLES)}
            ended = subprocess.run(program, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
    return shared


@pytest.fixture
def default_tokenizer(clip_tokenizer, monkeypatch):
    """What stands for OpenAI's, since there is no Hub here."""
    monkeypatch.setattr(checkpoints, "CLIP_TOKENIZER", str(clip_tokenizer))


@pytest.fixture
def tiny(oracle, tmp_path):
    """A folder as open_clip saves it, with its tokenizer, to change."""
    names = shutil.ignore_patterns("*.bin", "answers.safetensors")
    return shutil.copytree(oracle / "tiny", tmp_path / "tiny", ignore=names)


def forms(folder, target):
    """The three forms of a case: as saved, with a pickle and without a tokenizer, and a training's bare file."""
    weights = load_file(folder / "open_clip_model.safetensors")
    with_pickle = target / "with_pickle"
    with_pickle.mkdir()
    shutil.copy(folder / "open_clip_config.json", with_pickle)
    shutil.copy(folder / "open_clip_pytorch_model.bin", with_pickle)
    (folder / "open_clip_pytorch_model.bin").unlink()
    training = {"epoch": 3, "state_dict": {f"module.{name}": weight for name, weight in weights.items()}}
    torch.save(training, target / "bare.pt")
    return {"folder": folder, "pickle": with_pickle, "bare": target / "bare.pt"}


def pixel_difference(found, expected):
    """The largest; the cut-out may lie one pixel beside open_clip's, where halves are rounded."""
    moved = [(found[:, 1:], expected[:, :-1]), (found[..., 1:], expected[..., :-1])]
    return min((one - other).abs().max().item() for one, other in [(found, expected), *moved])


@pytest.mark.usefixtures("default_tokenizer")
@pytest.mark.parametrize("name", [name for name in CASES if name != "tiny"])
@pytest.mark.numerical
def test_agrees_with_open_clip(oracle, tmp_path, name):
    """Features, tokens and, where the form says how photos are prepared, pixels."""
    answers = load_file(oracle / name / "answers.safetensors")
    settings = json.loads((oracle / name / "open_clip_config.json").read_text())["model_cfg"]
    for form, source in forms(oracle / name, tmp_path).items():
        quick_gelu, tokenizer = None, None
        if form == "bare":
            if name in NOT_BARE:
                continue
            quick_gelu = settings.get("quick_gelu", False)
            if name == "hf_tokenizer_name":
                tokenizer = AutoTokenizer.from_pretrained(oracle / "bytes")
        checkpoint = read_open_clip(source, quick_gelu)
        clip, tokenizer = checkpoint.load(torch.float32, tokenizer)
        check_tokens(tokenizer, answers["ids"])
        check_features(clip, tokenizer, answers)
        if form != "bare" or "preprocess_cfg" not in CASES[name]:
            for photo, expected in zip(sorted(oracle.glob("*.png")), answers["pixels"], strict=True):
                found = checkpoint.image_processor(Image.open(photo), return_tensors="pt")["pixel_values"][0]
                assert pixel_difference(found, expected) < 1e-6 * expected.abs().max()
    shutil.rmtree(oracle / name)


def check_tokens(tokenizer, expected):
    """Up to the end of each text, after which open_clip pads with zeros, and CLIP's tokenizer with ends of text."""
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ended = (expected == tokenizer.eos_token_id).cumsum(-1) - (expected == tokenizer.eos_token_id).int() > 0
    assert ids.shape == expected.shape and ended.any() and torch.equal(ids[~ended], expected[~ended])


def check_features(clip, tokenizer, answers):
    texts = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = {
            "image": clip.get_image_features(answers["pixels"]).pooler_output,
            "text": clip.get_text_features(**texts).pooler_output,
            "logit_scale": clip.logit_scale.exp(),
        }
    for name, features in found.items():
        expected = answers[name].reshape(features.shape)
        torch.testing.assert_close(features, expected, **within(expected.abs().max()))


def native(settings):
    """By open_clip's own field names, the architectures that CLIPModel has."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    names = {*settings, *vision, *text}
    strange = {"multimodal_cfg", "init_logit_bias", "timm_model_name", "hf_model_name", "ls_init_value", "no_ln_pre"}
    return not names & {*strange, "attentional_pool", "embed_cls", "pool_type"} and isinstance(vision["layers"], int)


REFUSED = {
    "ViT-B-16-SigLIP": "is a SigLIP",
    "coca_ViT-B-32": "is a CoCa",
    "RN50": "is a CLIP with a ResNet",
    "convnext_base": "has a timm tower",
    "ViT-M-16-alt": "has layer scale",
    "ViT-H-14-CLIPA": "has a setting that CLIP hasn't (no_ln_pre True)",
    "roberta-ViT-B-32": "has another text tower than CLIP's",
    "ViT-H-14-worldwide": "(pool_type 'eos')",
}


def read_configs(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "open_clip" / "model_configs").glob("*.json")}


def test_every_architecture_of_open_clip_is_taken_or_refused(clip_tokenizer):
    """In one line, which names what to take instead; those that are taken are the native ones."""
    refusals, taken = {}, []
    configs = read_configs(ORACLES)
    for name, settings in configs.items():
        try:
            check_settings("it", settings, {})
            taken.append(name)
        except ValueError as error:
            refusals[name] = str(error)
    assert sorted(taken) == sorted(name for name, settings in configs.items() if native(settings))
    assert {"ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-bigG-14", "ViT-e-14"} <= set(taken)
    for name, reason in REFUSED.items():
        assert f"it {reason}" in refusals[name] or reason in refusals[name]
    assert all("\n" not in text and "take" in text.lower() for text in refusals.values())
    assert "facebook/metaclip-2-" in refusals["ViT-H-14-worldwide"]


def test_the_heads_of_a_bare_file_are_those_of_open_clip(clip_tokenizer):
    """Of all its architectures, where weights' shapes are all that is known."""
    for name, settings in read_configs(ORACLES).items():
        if not native(settings):
            continue
        vision, text = settings["vision_cfg"], settings["text_cfg"]
        width, patch = vision["width"], vision["patch_size"]
        mlp = int(width * vision.get("mlp_ratio", 4.0))
        positions = (vision["image_size"] // patch) ** 2 + 1
        shapes = {
            "visual.conv1.weight": (width, 3, patch, patch),
            "visual.positional_embedding": (positions, width),
            "visual.proj": (width, settings["embed_dim"]),
            "positional_embedding": (text["context_length"], text["width"]),
            "token_embedding.weight": (text["vocab_size"], text["width"]),
            "transformer.resblocks.0.mlp.c_fc.weight": (4 * text["width"], text["width"]),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": (mlp, width),
            **{f"visual.transformer.resblocks.{i}.ln_1.weight": (width,) for i in range(vision["layers"])},
            **{f"transformer.resblocks.{i}.ln_1.weight": (text["width"],) for i in range(text["layers"])},
        }
        found = infer_settings(shapes)
        assert found["vision_cfg"]["head_width"] == vision.get("head_width", 64), name
        assert int(width * found["vision_cfg"]["mlp_ratio"]) == mlp
        assert math.isqrt(positions - 1) * patch == found["vision_cfg"]["image_size"]
        for part, names in (("vision_cfg", ("layers", "width")), ("text_cfg", ("layers", "width", "heads"))):
            assert {name: found[part][name] for name in names} == {name: settings[part][name] for name in names}
