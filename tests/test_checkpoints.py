"""Checkpoints with damaged, missing or foreign files, and the keywords of `from_clip`."""

import json
import shutil

import pytest
import torch
from conftest import CLASS_NAMES
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification
from microclip_hf.loading import load_adapted, load_clip, read_model_type


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 605247071\n"
PAGE = b"<!DOCTYPE html><html><body>Not found</body></html>"


def from_clip(folder, **kwargs):
    return MicroCLIPForImageClassification.from_clip(folder, CLASS_NAMES, **{"prior_weighting": "uniform", **kwargs})


@pytest.fixture
def clip_copy(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


@pytest.fixture(scope="module")
def adapted_folder(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    from_clip(clip_folder, keep_text_model=True).save_pretrained(folder)
    return folder


@pytest.fixture
def adapted_copy(adapted_folder, tmp_path):
    return shutil.copytree(adapted_folder, tmp_path / "adapted")


def torn(content):
    return content[: len(content) * 2 // 3]


DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "pointer": (lambda content: POINTER, "is a Git LFS pointer"),
    "page": (lambda content: PAGE, "is a web page"),
    "torn": (torn, "(isn't JSON|is damaged), for example an incomplete download"),
    "list": (lambda content: b"[1, 2]", "(holds a list|is damaged)"),
}
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(clip_copy, adapted_copy, file, damage):
    """By from_clip, from_pretrained and what the commands load with; the advice is to download it again."""
    change, message = DAMAGES[damage]
    message = rf"{file} {message}.*Download it again .*git lfs pull"
    for folder in (clip_copy, adapted_copy):
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=message):
        from_clip(clip_copy)
    with pytest.raises(ValueError, match=message):
        load_clip(str(clip_copy), {"class_names": CLASS_NAMES, "templates": None}, {})
    with pytest.raises(ValueError, match=message):
        MicroCLIPForImageClassification.from_pretrained(adapted_copy)
    with pytest.raises(ValueError, match=message):
        load_adapted(str(adapted_copy))


def test_a_damaged_configuration_is_named_wherever_it_is_read(clip_copy):
    (clip_copy / "config.json").write_text("3")
    for read in (MicroCLIPConfig.from_pretrained, lambda folder: read_model_type(str(folder))):
        with pytest.raises(ValueError, match=r"config.json holds a int"):
            read(clip_copy)


def pickle_weights(folder, **kwargs):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **kwargs)
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "list"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_named_without_advice_to_run_it(clip_copy, damage, zipped):
    file = pickle_weights(clip_copy, _use_new_zipfile_serialization=zipped)
    assert from_clip(clip_copy).dtype == torch.float32
    file.write_bytes(DAMAGES[damage][0](file.read_bytes()))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is .*Download it again") as caught:
        from_clip(clip_copy)
    assert "weights_only" not in str(caught.value)


def test_a_pickle_of_more_than_weights(clip_copy):
    torch.save({"args": clip_copy}, pickle_weights(clip_copy))
    with pytest.raises(ValueError, match="holds more than weights") as caught:
        from_clip(clip_copy)
    assert "weights_only" not in str(caught.value)


def test_a_damaged_pickle_beside_safetensors_is_not_read(clip_copy):
    (clip_copy / "pytorch_model.bin").write_bytes(POINTER)
    from_clip(clip_copy)
    change_weights(clip_copy, lambda weights: weights.pop("logit_scale"))
    with pytest.raises(ValueError, match="lacks the weights 'logit_scale'"):
        from_clip(clip_copy)


SHARDS = {
    "missing": (lambda folder: second_shard(folder).unlink(), r"index.json names model-00002.*, which is missing"),
    "pointer": (lambda folder: second_shard(folder).write_bytes(POINTER), r"model-00002-.*safetensors is a Git LFS"),
    "index": (lambda folder: index(folder).write_bytes(POINTER), r"model.safetensors.index.json is a Git LFS"),
    "no map": (lambda folder: index(folder).write_text("{}"), r"model.safetensors.index.json lacks the weight_map"),
}


def second_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def index(folder):
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", SHARDS)
def test_shards(clip_copy, name):
    CLIPModel.from_pretrained(clip_copy).save_pretrained(clip_copy, max_shard_size="60KB")
    (clip_copy / "model.safetensors").unlink(missing_ok=True)
    from_clip(clip_copy)
    damage, message = SHARDS[name]
    damage(clip_copy)
    with pytest.raises(ValueError, match=message):
        from_clip(clip_copy)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("name", "number"), [("fc1.weight", torch.nan), ("layer_norm1.bias", torch.inf)])
def test_weights_that_are_no_numbers(clip_copy, adapted_copy, name, number):
    def change(weights):
        key = next(key for key in weights if "vision_model" in key and key.endswith(name))
        weights[key].view(-1)[3] = number

    for folder, load in ((clip_copy, from_clip), (adapted_copy, load_adapted)):
        change_weights(folder, change)
        with pytest.raises(ValueError, match=rf"'.*vision_model.*{name}' .*holds NaN or infinite values"):
            load(folder if load is from_clip else str(folder))


def test_weights_of_another_shape_or_model(clip_copy, adapted_copy):
    def shorten(weights):
        key = next(key for key in weights if key.endswith("visual_projection.weight"))
        weights[key] = weights[key][:5].clone()

    def rename(weights):
        for key in list(weights):
            weights[f"module.{key}"] = weights.pop(key)

    loads = ((clip_copy, from_clip), (adapted_copy, lambda folder: load_adapted(str(folder))))
    for change, message in ((shorten, r"shape \(5, 32\), .*asks for \(16, 32\)"), (rename, "lacks the weights")):
        for folder, load in loads:
            whole = (folder / "model.safetensors").read_bytes()
            change_weights(folder, change)
            with pytest.raises(ValueError, match=message):
                load(folder)
            (folder / "model.safetensors").write_bytes(whole)


def test_in_the_hubs_cache(clip_copy, tmp_path):
    snapshot = tmp_path / "cache" / "models--some--clip" / "snapshots" / ("a" * 40)
    shutil.copytree(clip_copy, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    from_clip("some/clip", cache_dir=tmp_path / "cache")
    (snapshot / "preprocessor_config.json").write_bytes(PAGE)
    with pytest.raises(ValueError, match=r"snapshots.*preprocessor_config.json is a web page"):
        from_clip("some/clip", cache_dir=tmp_path / "cache")


def test_image_processors_in_other_files(clip_copy, clip_folder):
    """CLIPProcessor's file alone; its older form, which holds none; none at all; a class that nobody knows."""
    file, settings = clip_copy / "processor_config.json", json.loads((clip_copy / FILES[2]).read_text())
    (clip_copy / FILES[2]).unlink()
    own = {**settings, "image_mean": [0.5, 0.4, 0.3]}
    file.write_text(json.dumps({"processor_class": "CLIPProcessor", "image_processor": own}))
    assert from_clip(clip_copy).image_processor.image_mean == (0.5, 0.4, 0.3)
    file.write_bytes(torn(file.read_bytes()))
    with pytest.raises(ValueError, match=r"processor_config.json isn't JSON"):
        from_clip(clip_copy)
    file.write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.warns(UserWarning, match="has no image processor; CLIP's own stands in"):
        assert from_clip(clip_copy).image_processor.crop_size.height == 32
    file.unlink()
    with pytest.warns(UserWarning, match="has no image processor; CLIP's own stands in"):
        assert from_clip(clip_copy).image_processor.image_mean == tuple(settings["image_mean"])
    (clip_copy / FILES[2]).write_text(json.dumps({**settings, "image_processor_type": "FloppyImageProcessor"}))
    with pytest.raises(ValueError, match=r"can't be loaded: .*Mend its preprocessor_config.json"):
        from_clip(clip_copy)


def test_a_missing_tokenizer_of_an_adapted_model_is_no_damage(adapted_copy):
    for file in adapted_copy.glob("tokenizer*"):
        file.unlink()
    assert MicroCLIPForImageClassification.from_pretrained(adapted_copy).tokenizer is None


# Keywords


def test_torch_dtype_is_dtype(clip_folder, clip, tokenizer):
    with pytest.warns(FutureWarning, match="torch_dtype is deprecated; pass dtype"):
        assert from_clip(clip_folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.warns(FutureWarning):
        assert from_clip(clip, tokenizer=tokenizer, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.warns(FutureWarning):  # as in from_pretrained, dtype has the last word
        assert from_clip(clip_folder, torch_dtype="bfloat16", dtype=torch.float16).dtype == torch.float16
    assert from_clip(clip_folder, dtype=None).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["fp16", "Tensor", "int8", torch.int8, 16, {"vision_config": "bfloat16"}])
def test_what_is_no_dtype_for_weights(dtype):
    with pytest.raises(ValueError, match=r'dtype is .*; pass "float32", "bfloat16"'):
        from_clip("no/such-model", dtype=dtype)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prior_weigthing", "'prior_weigthing'; did you mean 'prior_weighting'?"),
        ("template", "'template'; did you mean 'templates'?"),
        ("attn_implementaton", "did you mean 'attn_implementation'?"),
        ("num_labels", "got num_labels, which follows from class_names"),
        ("clip_config", "got clip_config, which follows from"),
    ],
)
def test_misspelt_keywords_are_refused_before_anything_is_loaded(name, message):
    with pytest.raises(TypeError, match=message):
        from_clip("no/such-model", **{name: "uniform"})


def test_keywords_of_transformers_go_on_to_it(clip_folder):
    model = from_clip(clip_folder, attn_implementation="eager", use_safetensors=True, device_map="cpu")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="nonsense"):
        from_clip(clip_folder, nonsense=1)
