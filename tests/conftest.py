"""Small real parts that many tests share: a tiny CLIP on disk, the golden numbers, real photos where they exist."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
# Threads of torch, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "passive"  # a thread that waits by counting takes a core from another process's tests

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adaptation import adapt
from hypothesis import HealthCheck, settings
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_inputs import make_clip, make_tokenizer, save_clip, write_inputs
from transformers import CLIPConfig, CLIPModel

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification
from microclip_hf.text_heads import build_heads


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# The same examples in every run, and no health checks: those look at the clock.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")

# Each of other weights, images and settings.
RECORDINGS = sorted(Path(__file__).parent.glob("golden*.safetensors"))
# The published code fixes the logit scale.
PUBLISHED_SCALE = 100
FLOWERS = Path(__file__).parents[2] / "shared" / "data" / "flowers12"
CLASS_NAMES = ["red disc", "green square", "blue bar"]
DESCRIPTIONS = {"red disc": ["a round thing", "it is red"], "Green_Square": ["four sides"], "blue-bar": ["a stripe"]}


@pytest.fixture(scope="session")
def flowers():
    """The folder of real photos, which doesn't come with the project."""
    if not FLOWERS.is_dir():
        pytest.skip("the flowers12 photos aren't part of the project")
    return FLOWERS


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def clip(tokenizer):
    return make_clip(tokenizer)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(clip_folder, tmp_path_factory):
    """Runs that many tests compare theirs with, each made once."""
    return functools.cache(lambda **options: adapt(clip_folder, tmp_path_factory.mktemp("whole"), **options))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """`clip/`, `photos/`, `test/`, `names.txt` and `descriptions.json`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def model(clip, tokenizer):
    """Three classes, uniform prior: to random text towers names mean nothing."""
    return MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, descriptions=DESCRIPTIONS, tokenizer=tokenizer, prior_weighting="uniform"
    )


@pytest.fixture
def pixel_values():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", params=RECORDINGS, ids=lambda path: path.stem)
def golden(request):
    """The published implementation's numbers: `tensors`, `meta`, and its CLIP."""
    with safe_open(request.param, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    tensors = load_file(request.param)
    clip = CLIPModel(CLIPConfig(**meta["clip_config"])).eval()
    weights = {name.removeprefix("clip."): value for name, value in tensors.items() if name.startswith("clip.")}
    embedding = torch.zeros(meta["text"]["vocab"], meta["text"]["width"])
    embedding[tensors["text.token_ids"]] = tensors["text.token_rows"]
    weights["text_model.embeddings.token_embedding.weight"] = embedding
    clip.load_state_dict(weights)
    return SimpleNamespace(tensors=tensors, meta=meta, clip=clip)


@pytest.fixture(scope="session")
def golden_features(golden):
    """Raw text features of the golden prompts and descriptions, two lists of C tensors."""
    tensors = golden.tensors
    with torch.no_grad():
        prompts = [golden.clip.get_text_features(ids).pooler_output for ids in tensors["text.template_ids"]]
        descriptions = [
            golden.clip.get_text_features(ids[:count]).pooler_output
            for ids, count in zip(tensors["text.description_ids"], tensors["text.description_counts"], strict=True)
        ]
    return prompts, descriptions


@pytest.fixture
def golden_model(golden, golden_features):
    """The model of the golden run before its first step."""
    config = MicroCLIPConfig(
        clip_config=golden.clip.config.to_dict(),
        num_labels=golden.meta["num_labels"],
        fusion_ratio=golden.meta["fusion"],
        logit_scale=PUBLISHED_SCALE,
    )
    model = MicroCLIPForImageClassification(config)
    model.clip.load_state_dict(golden.clip.state_dict(), strict=False)
    classifier, prior_head = build_heads(*golden_features)
    model.classifier.weight.data.copy_(classifier)
    model.prior_head.weight.copy_(prior_head)
    return model.eval()


@pytest.fixture(scope="session")
def adapted(clip_folder, tmp_path_factory):
    """A folder with a model of the names alone."""
    folder = tmp_path_factory.mktemp("adapted")
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    model.save_pretrained(folder)
    return folder
