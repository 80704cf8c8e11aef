"""Text heads against float64, and what bad texts get."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, DESCRIPTIONS
from safetensors.torch import load_file, save_file
from tiny_inputs import LOGIT_SCALE, make_clip
from tolerances import within
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.data.class_names import read_class_names
from microclip_hf.descriptions.files import read_descriptions
from microclip_hf.text_heads import build_heads, encode_heads, encode_texts, normalize_name, stand_in


pytestmark = pytest.mark.numerical


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def text_features(clip, tokenizer, text):
    """One text alone, without padding."""
    with torch.no_grad():
        return clip.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0].double().numpy()


@pytest.mark.parametrize("weighting", ["name", "uniform"])
def test_heads_equal_their_definition_in_float64(weighting):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(3, 8, generator=generator) for _ in range(4)]
    descriptions = [torch.randn(n, 8, generator=generator) for n in (1, 2, 5, 7)]
    classifier, prior = build_heads(prompts, descriptions, weighting)
    for c in range(4):
        name, d = unit(prompts[c].double().numpy().mean(0)), unit(descriptions[c].double().numpy())
        a = d @ name if weighting == "name" else np.ones(len(d))
        np.testing.assert_allclose(classifier[c], unit(d.mean(0)), **within())
        np.testing.assert_allclose(prior[c], unit((a[:, None] * d).sum(0) / a.sum()), **within())


def test_broken_features_give_no_head(clip, tokenizer):
    with pytest.raises(ValueError, match="cancel"):
        build_heads([torch.ones(1, 4)] * 2, [torch.zeros(1, 4)] * 2)
    with pytest.raises(ValueError, match="prior_weighting is 'nmae'"):
        build_heads([torch.ones(1, 4)] * 2, [torch.ones(1, 4)] * 2, "nmae")
    torch.nn.init.constant_(clip.text_projection.weight, float("nan"))
    with pytest.raises(ValueError, match=r"The text features .* NaN"):
        encode_texts(clip, tokenizer, ["a"])


def test_negative_name_weights_keep_the_formula():
    """All weights negative: their signs cancel in the quotient."""
    prior = build_heads([torch.tensor([[-1.0, 0]])] * 2, [torch.tensor([[1.0, 0.5], [1.0, -0.25]])] * 2)[1]
    assert prior[0, 0] > 0


def test_cancelling_name_weights_name_the_class():
    prompts = [torch.tensor([[1.0, 0]])] * 2
    descriptions = [torch.tensor([[1.0, 1]]), torch.tensor([[1.0, 1], [-1, 1]])]
    with pytest.raises(ValueError, match=r"class 'b' cancel.*uniform"):
        build_heads(prompts, descriptions, class_names=["a", "b"])
    build_heads(prompts, descriptions, "uniform")


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_texts_are_encoded_alike_in_any_batch(clip, tokenizer, batch_size):
    texts = ["a", "a much longer text", "b c", "d", "e f g h i"]
    features = encode_texts(clip, tokenizer, texts, batch_size)
    for text, row in zip(texts, features, strict=True):
        expected = text_features(clip, tokenizer, text)
        np.testing.assert_allclose(row, expected, **within(np.abs(expected).max()))


def test_from_clip_builds_both_heads(model, clip, tokenizer):
    """Keys match whatever their case, _ and -; a class without descriptions gets its templates."""
    for row, name in zip(model.classifier.weight.detach(), CLASS_NAMES, strict=True):
        own = next(s for key, s in DESCRIPTIONS.items() if normalize_name(key) == name)
        expected = unit(np.mean([unit(text_features(clip, tokenizer, sentence)) for sentence in own], 0))
        np.testing.assert_allclose(row, expected, **within())
    torch.testing.assert_close(model.prior_head.weight, model.classifier.weight.detach(), **within())  # uniform prior
    assert model.config.id2label == dict(enumerate(CLASS_NAMES))
    assert model.config.label2id == {name: i for i, name in enumerate(CLASS_NAMES)}


def test_classes_without_descriptions_get_moved_templates_and_one_warning(clip, tokenizer):
    with pytest.warns(UserWarning, match="so their names stand in.*: green_square, blue bar") as caught:
        model = MicroCLIPForImageClassification.from_clip(
            clip,
            ["red disc", "green_square", "blue bar"],
            templates=["a {}", "one {}."],
            descriptions={"red disc": ["round"]},
            tokenizer=tokenizer,
            prior_weighting="uniform",
        )
    assert len(caught) == 1
    red, green = (
        np.stack([text_features(clip, tokenizer, text) for text in (f"a {name}", f"one {name}.")])
        for name in ("red disc", "green square")
    )
    step = unit(text_features(clip, tokenizer, "round")) - unit(red.mean(0))
    expected = unit(unit(unit(green) + step).mean(0))
    np.testing.assert_allclose(model.classifier.weight[1].detach(), expected, **within())


def test_a_class_without_descriptions_takes_no_photos_of_the_others():
    """Names lie 0.3 nearer to all photos than descriptions, as in CLIP; left as they are, one takes every photo."""
    rng = np.random.default_rng(0)
    photos, shared = np.eye(8)[:4], np.ones(8) * 0.3
    descriptions = [torch.tensor(photo + 0.05 * rng.normal(size=(3, 8))) for photo in photos]
    # A name says little of its class.
    prompts = [torch.tensor((0.2 * photo + shared)[None]) for photo in photos]
    last_is_missing = [*descriptions[:3], None]
    moved = stand_in(prompts, last_is_missing)
    classifier, _ = build_heads(prompts, moved, "uniform")
    similarities = photos @ classifier.numpy().T
    assert similarities.argmax(-1).tolist() == [0, 1, 2, 3]
    assert all(own.equal(given) for own, given in zip(moved[:3], descriptions[:3], strict=True))


def test_without_any_description_names_stay_where_they_are():
    prompts = [torch.randn(2, 4) for _ in range(3)]
    assert all(own.equal(given) for own, given in zip(stand_in(prompts, [None] * 3), prompts, strict=True))


def test_names_alone_are_enough_and_silent(clip, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MicroCLIPForImageClassification.from_clip(clip, CLASS_NAMES, tokenizer=tokenizer)


def test_half_characters_in_descriptions_are_left_out(clip, tokenizer):
    whole = {"red": ["A red disc, 🍎."], "blue": ["It is blue."]}
    halves = {"red": ["A red \udf4e disc, \ud83c\udf4e."], "blue": ["It is blue \ud83c."]}
    heads = [
        torch.cat(encode_heads(clip, tokenizer, ["red", "blue"], None, own, "uniform")) for own in (whole, halves)
    ]
    assert torch.equal(*heads)


def test_long_descriptions_are_cut_with_one_warning(clip, tokenizer):
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than the 77 positions") as caught:
        features = encode_texts(clip, tokenizer, ["short", "long " * 60, "longer " * 99], batch_size=1)
    assert len(caught) == 1 and features.shape == (3, 16)


def test_set_classes_rebuilds_the_heads(clip, tokenizer, pixel_values, tmp_path):
    model = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, tokenizer=tokenizer, keep_text_model=True, prior_weighting="uniform"
    )
    model.save_pretrained(tmp_path)
    model = MicroCLIPForImageClassification.from_pretrained(tmp_path)  # the tokenizer was saved beside it
    model.set_classes(
        ["one", "two", "three", "four"], descriptions={name: ["x"] for name in ("one", "two", "three", "four")}
    )
    assert model(pixel_values).logits.shape == (4, 4) and model.config.num_labels == 4
    fresh = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, tokenizer=tokenizer, prior_weighting="uniform"
    )
    model.set_classes(CLASS_NAMES)
    torch.testing.assert_close(model(pixel_values).logits, fresh(pixel_values).logits, **within(LOGIT_SCALE))


def test_set_classes_needs_the_text_tower(model):
    with pytest.raises(ValueError, match="keep_text_model=True"):
        model.set_classes(["a", "b"])


BAD_TEXTS = {
    "empty class list": ({"class_names": []}, ValueError, "at least two"),
    "one class": ({"class_names": ["a"]}, ValueError, "at least two"),
    "no list": ({"class_names": "a b c"}, TypeError, "list of strings"),
    "duplicate": ({"class_names": ["Sea-Lily", "sea lily"]}, ValueError, "duplicate 'sea lily'"),
    "number": ({"class_names": ["a", 3]}, TypeError, "holds 3, a int"),
    "blank": ({"class_names": ["a", " _ "]}, ValueError, "at least one letter"),
    "unknown class": ({"descriptions": {"c": ["x"]}}, ValueError, "key 'c', which is none of the 2"),
    "empty descriptions": ({"descriptions": {"a": []}}, ValueError, r"descriptions\['a'\] is empty"),
    "empty sentence": ({"descriptions": {"a": ["x", " "]}}, ValueError, "empty sentence"),
    "no sentence list": ({"descriptions": {"a": "x"}}, TypeError, "pass a list of sentences"),
    "number as sentence": ({"descriptions": {"a": ["x", 3]}}, TypeError, "holds 3, a int"),
    "list as descriptions": ({"descriptions": [["x"]]}, TypeError, "is a list; pass a dictionary"),
    "one class twice": ({"descriptions": {"a": ["x"], "A": ["y"]}}, ValueError, "two keys for the class 'a'"),
    "half a character": ({"class_names": ["a", "caf\udce9"]}, ValueError, r"holds 'caf\\udce9' with half a character"),
    "half a character in a template": ({"templates": ["\ud83d {}"]}, ValueError, "templates holds .*half a character"),
    "half a character as sentence": ({"descriptions": {"a": ["\ud83d"]}}, ValueError, "empty sentence"),
    "no template": ({"templates": []}, ValueError, "templates is empty"),
    "template without name": ({"templates": ["a photo"]}, ValueError, "has no '{}'"),
    "template no string": ({"templates": [3]}, TypeError, "holds 3"),
}


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_bad_texts_are_refused_before_anything_is_loaded(kwargs, error, message):
    with pytest.raises(error, match=message):
        MicroCLIPForImageClassification.from_clip("no/such-model", **{"class_names": ["a", "b"], **kwargs})


def bert_like_tokenizer(vocab_size, end):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocab_size - 2)} | {"[UNK]": vocab_size - 2, end: vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("vocab_size", "message"), [(9000, "the text tower has 514"), (100, "end-of-text")])
def test_a_foreign_tokenizer_is_refused(tokenizer, vocab_size, message, legacy):
    clip = make_clip(tokenizer)
    if legacy:
        clip.config.text_config.eos_token_id = clip.text_model.eos_token_id = 2
    with pytest.raises(ValueError, match=message):
        MicroCLIPForImageClassification.from_clip(clip, ["a", "b"], tokenizer=bert_like_tokenizer(vocab_size, "[SEP]"))


def test_old_checkpoints_that_pool_the_largest_id(tokenizer):
    """OpenAI's name 2 as their end-of-text id."""
    clip = make_clip(tokenizer)
    expected = encode_texts(clip, tokenizer, CLASS_NAMES)
    clip.config.text_config.eos_token_id = clip.text_model.eos_token_id = 2
    torch.testing.assert_close(encode_texts(clip, tokenizer, CLASS_NAMES), expected, **within(expected.abs().max()))


def test_what_is_no_vit_clip_is_refused(tmp_path, tokenizer):
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'bert', and microCLIP adapts CLIP"):
        MicroCLIPForImageClassification.from_clip(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match="'RN50' is a CLIP with a ResNet"):
        MicroCLIPForImageClassification.from_clip("RN50", ["a", "b"])
    with pytest.raises(TypeError, match="a Hub id, a folder, or a transformers CLIPModel"):
        MicroCLIPForImageClassification.from_clip(torch.nn.Linear(2, 2), ["a", "b"])
    config = make_clip(tokenizer).config.to_dict()
    config["vision_config"]["layers"] = [3, 4, 6, 3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ResNet, which has no patch tokens"):
        MicroCLIPForImageClassification.from_clip(tmp_path, ["a", "b"])
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50_clip"}))
    with pytest.raises(ValueError, match=r"no config.json with a 'model_type'"):
        MicroCLIPForImageClassification.from_clip(tmp_path, ["a", "b"])


def test_an_adapted_folder_is_no_clip(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is an adapted microCLIP. Load it with from_pretrained"):
        MicroCLIPForImageClassification.from_clip(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"nowhere can't be loaded: there is no such folder here"):
        MicroCLIPForImageClassification.from_clip("./nowhere", ["a", "b"])


def test_a_checkpoint_without_its_text_tower_is_refused(model, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    vision = {name: value for name, value in weights.items() if not name.startswith("text_model")}
    save_file(vision, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights 'text_model"):
        MicroCLIPForImageClassification.from_clip(tmp_path / "clip", ["a", "b"])
    model.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match="has no text tower"):
        MicroCLIPForImageClassification.from_pretrained(tmp_path / "adapted", keep_text_model=True)


def test_a_clip_without_a_known_tokenizer_asks_for_it(clip):
    with pytest.raises(ValueError, match="Pass tokenizer="):
        MicroCLIPForImageClassification.from_clip(clip, ["a", "b"])


def test_from_clip_leaves_the_given_clip_alone(clip, tokenizer):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    model = MicroCLIPForImageClassification.from_clip(clip, CLASS_NAMES, tokenizer=tokenizer)
    model.freeze_for_adaptation()
    torch.nn.init.zeros_(model.clip.vision_model.post_layernorm.weight)
    assert all(value.equal(before[name]) for name, value in clip.state_dict().items())
    assert all(parameter.requires_grad for parameter in clip.parameters())


def test_files_of_names_and_descriptions(tmp_path):
    names, sentences = tmp_path / "names.txt", tmp_path / "descriptions.json"
    names.write_bytes("Möwe".encode("latin-1"))
    with pytest.raises(ValueError, match="isn't text in UTF-8"):
        read_class_names(names)
    names.write_text("\ufeffSea Lily\n\n  Rose\n", encoding="utf-8")
    assert read_class_names(names) == ["Sea Lily", "Rose"]
    sentences.write_text('\ufeff{"sea_lily": ["blüht"]}', encoding="utf-8")
    assert read_descriptions(sentences, ["Sea Lily", "Rose"]) == {"Sea Lily": ["blüht"]}
    sentences.write_text('{"Rose": ["red"], "Rose": ["thorns"]}', encoding="utf-8")
    with pytest.raises(ValueError, match="the key 'Rose' twice"):
        read_descriptions(sentences, ["Sea Lily", "Rose"])
    sentences.write_text('{"Sea Lily": ["blue"], "Roze": ["red"], "Iris": ["tall"]}', encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_descriptions(sentences, ["Sea Lily", "Rose"], "names.txt")
    assert str(caught.value) == (
        f"{sentences} has the key 'Roze', which is none of the 2 class names ('Sea Lily', 'Rose'). 2 keys are none, "
        "also 'Iris'. The nearest to 'Roze' in names.txt is 'Rose': make the two the same."
    )
    assert normalize_name("Blu\u0308te") == normalize_name("BL\u00dcTE")
    sentences.write_text("{'sea_lily'", encoding="utf-8")
    with pytest.raises(ValueError, match="isn't a JSON file"):
        read_descriptions(sentences, ["Sea Lily", "Rose"])
