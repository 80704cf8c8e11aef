"""CLIPs in open_clip's format against open_clip itself: features, tokens, pixels; what is refused, and how."""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from filelock import FileLock
from hub_server import HubServer, run_client
from PIL import Image
from safetensors.torch import load_file, save_file
from test_adapt import UNIFORM, flags
from test_hub import assert_remote_code_works, expected_scores, picture
from tiny_inputs import make_tokenizer
from tolerances import within
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt, evaluate
from microclip_hf.commands import convert as convert_command
from microclip_hf.descriptions.sentences import fits_text_tower
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
    return shutil.copytree(oracle / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("answers.*"))


def forms(folder, target):
    """The three forms of a case: as saved, with a pickle and without a tokenizer, and a training's bare file."""
    weights = load_file(folder / "open_clip_model.safetensors")
    with_pickle = target / "with_pickle"
    with_pickle.mkdir()
    shutil.copy(folder / "open_clip_config.json", with_pickle)
    torch.save(weights, with_pickle / "open_clip_pytorch_model.bin")
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
    for folder in (oracle / name, tmp_path):  # large
        shutil.rmtree(folder)


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


def read_configs():
    """Of all architectures that open_clip names."""
    return {path.stem: json.loads(path.read_text()) for path in ORACLES.glob("open_clip/model_configs/*.json")}


def refusal(settings):
    """What is said of settings that are refused; `None` of others."""
    try:
        check_settings("it", settings, {})
    except ValueError as error:
        return str(error)
    return None


def test_every_architecture_of_open_clip_is_taken_or_refused(clip_tokenizer):
    """In one line, which names what to take instead; those that are taken are the native ones."""
    configs = read_configs()
    refusals = {name: text for name, settings in configs.items() if (text := refusal(settings)) is not None}
    assert configs.keys() - refusals.keys() == {name for name, settings in configs.items() if native(settings)}
    assert not refusals.keys() & {"ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-bigG-14", "ViT-e-14"}
    assert all(reason in refusals[name] for name, reason in REFUSED.items())
    assert all("take" in text.lower() and "\n" not in text for text in refusals.values())
    assert "facebook/metaclip-2-" in refusals["ViT-H-14-worldwide"]


def test_the_heads_of_a_bare_file_are_those_of_open_clip(clip_tokenizer):
    """Of all its architectures, where weights' shapes are all that is known."""
    for name, settings in read_configs().items():
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


@pytest.fixture(scope="module")
def adapted(oracle, inputs, tmp_path_factory):
    """A run of the command on open_clip's folder."""
    folder = tmp_path_factory.mktemp("adapted")
    adapt.main(flags(inputs, folder, model_name_or_path=oracle / "tiny", config_overrides=UNIFORM))
    return folder


def test_an_adapted_model_needs_open_clip_no_more(adapted, tmp_path):
    """Reloaded by the package, and by remote code and the pipeline without it."""
    names = {path.name for path in adapted.glob("*.py")}
    assert names == {
        f"{name}.py" for name in ("configuration_microclip", "modeling_microclip", "saliency", "text_heads")
    }
    config = load_adapted(str(adapted)).config
    assert config.clip_config.vision_config.hidden_act == "quick_gelu"
    assert_remote_code_works(adapted, config.class_names, expected_scores(adapted, [picture()])[0], tmp_path)


def test_the_card_names_the_original(adapted, oracle):
    assert "from `tiny` to 48 images" in (adapted / "README.md").read_text()
    model = from_clip(oracle / "tiny")
    assert model.clip.config._name_or_path == str(oracle / "tiny")  # which a Trainer's own card takes


def test_evaluate_takes_it_as_the_clip_and_as_the_model(adapted, oracle, inputs, tmp_path, capsys):
    images = ["--test_dir", str(inputs / "test"), "--num_crops", "0"]
    compared = ["--model_name_or_path", str(adapted), "--clip", str(oracle / "tiny")]
    plain = ["--model_name_or_path", str(oracle / "tiny"), "--class_names", str(inputs / "names.txt")]
    plain += ["--config_overrides", UNIFORM]
    results = []
    for number, arguments in enumerate((compared, plain)):
        evaluate.main([*arguments, *images, "--output_dir", str(tmp_path / str(number))])
        results.append(json.loads((tmp_path / str(number) / "results.json").read_text()))
    assert results[0]["ways"]["zero_shot"]["accuracy"] == results[1]["ways"]["zero_shot"]["accuracy"]


def from_clip(source, **kwargs):
    return MicroCLIPForImageClassification.from_clip(source, CLASS_NAMES, **{"prior_weighting": "uniform", **kwargs})


def test_what_reads_a_configuration_reads_open_clips(tiny):
    assert read_model_type(str(tiny)) == "clip"
    assert read_config(str(tiny)).clip_config.vision_config.image_size == 32
    model, heads = load_clip(str(tiny), {"class_names": CLASS_NAMES, "templates": None}, {})
    assert heads["zero_shot"].shape == (3, 512) and model.image_processor.crop_size["height"] == 32
    fits = fits_text_tower(str(tiny))
    assert fits("word " * 75) and not fits("word " * 76)  # with both ends 77 tokens


def change_config(folder, change, file="open_clip_config.json"):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(content)))


def test_kinds_of_configurations(tiny, clip_folder):
    """Of the model alone; beside one of timm's; transformers' own wins."""
    expected = from_clip(tiny).classifier.weight
    change_config(tiny, lambda content: content["model_cfg"])
    torch.testing.assert_close(from_clip(tiny).classifier.weight, expected)
    (tiny / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224", "num_classes": 512}')
    torch.testing.assert_close(from_clip(tiny).classifier.weight, expected)
    for file in clip_folder.iterdir():
        shutil.copy(file, tiny)
    assert read_open_clip(tiny) is None and from_clip(tiny).config.clip_config.projection_dim == 16


def test_weights_are_copied_once(tiny):
    """No tensor shares memory with another or with the file, and none is left under its old name."""
    model, _ = read_open_clip(tiny).load(torch.float32)
    pointers = [weight.untyped_storage().data_ptr() for weight in model.parameters()]
    assert len(pointers) == len(set(pointers))
    half = read_open_clip(tiny).load(torch.bfloat16)[0]
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    layer = model.text_model.encoder.layers[0].self_attn.q_proj.weight
    assert layer.untyped_storage().nbytes() == layer.nbytes


REFUSED_SETTINGS = {
    "longest": (lambda content: content["preprocess_cfg"].update(resize_mode="longest"), "resize_mode 'longest'"),
    "layer scale": (lambda content: content["model_cfg"]["vision_cfg"].update(ls_init_value=1e-5), "has layer scale"),
    "unknown": (lambda content: content["model_cfg"]["vision_cfg"].update(sparkle=3), r"CLIP hasn't \(sparkle 3\)"),
    "not square": (
        lambda content: content["model_cfg"]["vision_cfg"].update(image_size=[32, 64]),
        r"image_size \[32, 64\]",
    ),
    "no text": (lambda content: content["model_cfg"].pop("text_cfg"), "lacks text_cfg"),
    "another size": (
        lambda content: content["model_cfg"]["vision_cfg"].update(image_size=64),
        r"position_embedding.weight' of shape \(17, 64\), where its configuration asks for \(65, 64\)",
    ),
    "another depth": (
        lambda content: content["model_cfg"]["text_cfg"].update(layers=2),
        "lacks the weights 'text_model.encoder.layers.1",
    ),
    "less depth": (
        lambda content: content["model_cfg"]["vision_cfg"].update(layers=1),
        "has the weights 'vision_model.encoder.layers.1.*which CLIPModel hasn't",
    ),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_are_refused(tiny, name):
    change, message = REFUSED_SETTINGS[name]

    def changed(content):
        change(content)
        return content

    change_config(tiny, changed)
    with pytest.raises(ValueError, match=message) as error:
        from_clip(tiny)
    assert str(tiny) in str(error.value) and "\n" not in str(error.value)


def fake_weights(*names):
    return {name: torch.zeros(2, 2) for name in names}


VIT = "visual.transformer.resblocks.0.ln_1.weight"
TEXT = "transformer.resblocks.0.ln_1.weight"
FOREIGN = {
    "timm": (("visual.trunk.blocks.0.norm1.weight", f"text.{TEXT}"), "has a timm tower"),
    "SigLIP": (("visual.trunk.blocks.0.norm1.weight", f"text.{TEXT}", "logit_bias"), "is a SigLIP"),
    "CoCa": ((VIT, "visual.attn_pool.query", f"text.{TEXT}"), "has an attentional pool"),
    "ResNet": (("module.visual.layer1.0.conv1.weight", f"module.{TEXT}"), "is a CLIP with a ResNet"),
    "layer scale": ((VIT, "visual.transformer.resblocks.0.ls_1.gamma", TEXT), "has layer scale"),
    "text": ((VIT, "text.transformer.embeddings.word_embeddings.weight"), "has another text tower than CLIP's"),
    "transformers": (("vision_model.embeddings.class_embedding",), "pass the folder that it lies in"),
    "other": (("encoder.weight",), "doesn't hold a CLIP's weights"),
    "part": ((VIT, TEXT), "lacks the weight 'visual.conv1.weight'"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_refused(tmp_path, name, suffix):
    """Bare files, by the names of their weights, whatever they are called."""
    names, message = FOREIGN[name]
    file = tmp_path / f"ViT-B-32{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(fake_weights(*names), file)
    with pytest.raises(ValueError, match=message) as error:
        from_clip(file, quick_gelu=True)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


DAMAGES = {
    "torn": (lambda content: content[: len(content) * 2 // 3], "is damaged, for example an incomplete download"),
    "empty": (lambda content: b"", "is empty"),
    "pointer": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "is a Git LFS pointer",
    ),
    "page": (lambda content: b"<!DOCTYPE html><html></html>", "is a web page"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.pt"])
def test_a_damaged_file_is_named(tmp_path, damage, name):
    change, message = DAMAGES[damage]
    weights = {VIT: torch.zeros(2000), TEXT: torch.zeros(2000)}
    (save_file if name.endswith(".safetensors") else torch.save)(weights, tmp_path / name)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} {message}") as error:
        read_open_clip(tmp_path / name, quick_gelu=True)
    assert "\n" not in str(error.value)


def test_a_damaged_configuration_is_named(tiny):
    for content, message in (("{", "isn't JSON"), ("[1]", "holds a list")):
        (tiny / "open_clip_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"open_clip_config.json {message}"):
            from_clip(tiny)


class Trap:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path, protocol):
    content = {"state_dict": fake_weights(VIT, TEXT), "args": Trap(tmp_path / "was_run")}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=protocol == "zip")
    named = "holds more than weights, 'posix.mkdir'" if protocol == "zip" else "or holds more than weights"
    with pytest.raises(ValueError, match=named) as error:
        from_clip(tmp_path / "model.pt", quick_gelu=True)
    assert not (tmp_path / "was_run").exists() and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"is a TorchScript program.*'openai/clip-vit-base-patch32'"):
        from_clip(tmp_path / "ViT-B-32.pt", quick_gelu=True)


def test_a_configuration_without_weights(tiny):
    (tiny / "open_clip_model.safetensors").rename(tiny / "epoch_32.safetensors")
    assert read_model_type(str(tiny)) == "clip"  # the only one
    (tiny / "epoch_32.safetensors").unlink()
    for read in (from_clip, lambda folder: read_model_type(str(folder))):
        with pytest.raises(ValueError, match=r"tiny has a configuration, open_clip_config.json, and no weights\. Add"):
            read(tiny)


@pytest.mark.usefixtures("default_tokenizer")
def test_the_activation_of_a_bare_file_must_be_said(oracle, tmp_path, capsys):
    file = tmp_path / "RS5M.pt"
    torch.save(load_file(oracle / "tiny" / "open_clip_model.safetensors"), file)
    for read in (from_clip, lambda source: read_model_type(str(source))):
        with pytest.raises(ValueError, match=f"{file} doesn't tell the model's activation.*quick_gelu=True") as error:
            read(file)
    assert "\n" not in str(error.value)
    for quick_gelu, activation in ((True, "quick_gelu"), (False, "gelu")):
        config = from_clip(file, quick_gelu=quick_gelu).config.clip_config
        assert config.vision_config.hidden_act == config.text_config.hidden_act == activation
    with pytest.raises(ValueError, match="quick_gelu is for bare files"):
        from_clip(oracle / "tiny", quick_gelu=True)
    with pytest.raises(TypeError, match="from_clip got quick_gelu"):
        from_clip(read_open_clip(oracle / "tiny").load()[0], quick_gelu=True)
    with pytest.raises(SystemExit, match=r"FOLDER --quick_gelu true"):
        convert_command.main([str(file), str(tmp_path / "converted")])
    convert_command.main([str(file), str(tmp_path / "converted"), "--quick_gelu", "true"])
    assert "a ViT of 2 layers, 1 heads and quick_gelu" in capsys.readouterr().out
    agree(tmp_path / "converted", oracle / "tiny")


def agree(converted, folder):
    """A converted folder is transformers' alone, and gives what open_clip said of the checkpoint."""
    answers = load_file(folder / "answers.safetensors")
    assert not list(converted.glob("*open_clip*")) and not list(converted.glob("_incomplete_*"))
    assert AutoImageProcessor.from_pretrained(converted, backend="pil").size == {"shortest_edge": 32}
    check_features(CLIPModel.from_pretrained(converted), AutoTokenizer.from_pretrained(converted), answers)
    assert read_open_clip(converted) is None


def test_convert(tiny, oracle, tmp_path):
    """All of it or nothing, into a folder that is empty."""
    target = tmp_path / "new" / "converted"
    convert(tiny, target)
    agree(target, oracle / "tiny")
    with pytest.raises(ValueError, match="exists and isn't an empty folder"):
        convert(tiny, target)
    with pytest.raises(ValueError, match="isn't in open_clip's format"):
        convert(target, tmp_path / "again")
    (tiny / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        convert(tiny, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.usefixtures("default_tokenizer")
def test_a_bare_file_of_another_vocabulary(tiny, tmp_path):
    weights = load_file(tiny / "open_clip_model.safetensors")
    weights["token_embedding.weight"] = weights["token_embedding.weight"][:600].clone()
    file = tmp_path / "bare.pt"
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"has 600 tokens, and CLIP's tokenizer, .* has 49408\. Of MetaCLIP 2"):
        from_clip(file, quick_gelu=False)
    with pytest.raises(ValueError, match=r"There is no file .*gone\.pt here"):
        from_clip(tmp_path / "gone.pt", quick_gelu=False)


def test_the_tokenizer_must_end_texts_where_the_model_pools(tiny):
    other = make_tokenizer()
    other.eos_token = "!"
    with pytest.raises(ValueError, match=r"pools a text at its highest token id, 513 in this CLIPTokenizer.* is 0"):
        from_clip(tiny, tokenizer=other)


def test_without_a_hub_the_tokenizer_can_be_named(tiny, clip_tokenizer, tmp_path):
    """Where the checkpoint brings none, and OpenAI's isn't in the cache."""
    for file in tiny.glob("*token*"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"'openai/clip-vit-base-patch32'.*needs it.*--tokenizer of microclip convert"
    ):
        from_clip(tiny)
    tokenizer = AutoTokenizer.from_pretrained(clip_tokenizer)
    assert from_clip(tiny, tokenizer=tokenizer, keep_text_model=True).tokenizer is tokenizer
    convert_command.main([str(tiny), str(tmp_path / "converted"), "--tokenizer", str(clip_tokenizer)])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "converted")) == 49408


FROM_THE_HUB = """
import contextlib, io, pathlib, shutil
from huggingface_hub import constants
from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.loading import load_clip
from microclip_hf.open_clip import read_open_clip
names = ["red disc", "blue bar"]
def load():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        heads = load_clip("hf-hub:user/bioclip", {"class_names": names, "templates": None}, {})[1]
    return said.getvalue().splitlines()[:1], heads["zero_shot"].tolist()
answers = [load()]
constants.HF_HUB_OFFLINE = True
answers.append(load())
model = MicroCLIPForImageClassification.from_clip("user/bioclip", names, prior_weighting="uniform")
# As in a cache that open_clip filled, nothing says any more that there is no config.json.
(notes,) = pathlib.Path(constants.HF_HUB_CACHE).glob("models--user--bioclip/.no_exist")
shutil.rmtree(notes)
result = answers, model.clip.config._name_or_path, read_open_clip("user/bioclip").find_weights().name
"""


def test_from_the_hub_and_then_without_it(tiny, tmp_path):
    """By both spellings of the id; the download is announced, the cache suffices later."""
    expected = load_clip(str(tiny), {"class_names": ["red disc", "blue bar"], "templates": None}, {})[1]["zero_shot"]
    with HubServer() as hub:
        hub.add_commit("user/bioclip", {path.name: path.read_bytes() for path in tiny.iterdir()})
        (online, offline), name, file = run_client(hub, tmp_path, FROM_THE_HUB)
    assert online[0][0].startswith("user/bioclip will be downloaded once: 1") and name == "user/bioclip"
    assert not any("downloaded" in line for line in offline[0]) and file == "open_clip_model.safetensors"
    for _, heads in (online, offline):
        torch.testing.assert_close(torch.tensor(heads), expected, **within())
