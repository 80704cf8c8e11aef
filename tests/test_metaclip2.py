"""MetaCLIP 2: features and heads against transformers alone; adapted, saved, loaded and used; and what is refused."""

import re
import shutil

import pytest
import torch
from adaptation import CLASS_NAMES, adapt
from decisions import ClearDecisions
from test_adapt import UNIFORM, flags
from test_hub import assert_remote_code_works, picture
from tiny_inputs import LOGIT_SCALE, TOKENIZERS, make_clip, make_world_tokenizer, save_clip
from tolerances import within
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, MetaClip2Config, MetaClip2Model, pipeline

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification
from microclip_hf.commands import adapt as adapt_command
from microclip_hf.commands import evaluate as evaluate_command
from microclip_hf.descriptions.sentences import fits_text_tower
from microclip_hf.text_heads import encode_heads, encode_texts


TEXTS = ["a", "ein Vogel, der im Röhricht brütet", "zzz", "Ça va"]
PROJECTIONS = {f"fg_pooling.{name}_proj.weight" for name in ("query", "key", "value")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metaclip2")
    save_clip(folder, kind=MetaClip2Model)
    return folder


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """A run of three steps, saved with its Trainer."""
    trainer = adapt(folder, tmp_path_factory.mktemp("adapted"), num_train_epochs=1)
    trainer.save_model()
    return trainer


@torch.no_grad()
def text_feature(folder, text):
    """By transformers alone: one text, without padding."""
    clip = MetaClip2Model.from_pretrained(folder)
    return clip.get_text_features(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).pooler_output[0]


def from_clip(clip, **kwargs):
    return MicroCLIPForImageClassification.from_clip(clip, CLASS_NAMES, **kwargs)


@pytest.mark.numerical
@torch.no_grad()
def test_features_are_metaclips_own(folder, pixel_values):
    """From a folder, and from a model in memory; of texts that are padded to the longest."""
    clip, tokenizer = MetaClip2Model.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    image_features = normalize(clip.get_image_features(pixel_values).pooler_output, dim=-1)
    text_features = torch.stack([text_feature(folder, text) for text in TEXTS])
    for model in (from_clip(folder, keep_text_model=True), from_clip(clip, tokenizer=tokenizer, keep_text_model=True)):
        assert type(model.clip) is MetaClip2Model
        assert_close(model.coarse_embeds(pixel_values), image_features, **within())
        found = encode_texts(model.clip, model.tokenizer, TEXTS)
        assert_close(found, text_features, **within(text_features.abs().max()))


@pytest.mark.numerical
@torch.no_grad()
def test_the_end_of_text_is_pooled(folder):
    """Its id, 2, is the one by which old CLIPs pool the largest id: another token's feature."""
    clip, tokenizer = MetaClip2Model.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id == 2
    tokens = tokenizer(TEXTS[1], return_tensors="pt")
    states = clip.text_model(**tokens).last_hidden_state[0]
    largest = int(tokens["input_ids"].argmax())
    assert largest != len(states) - 1
    found = encode_texts(clip, tokenizer, TEXTS[1:2])[0]
    assert_close(found, clip.text_projection(states[-1]), **within(found.abs().max()))
    assert (found - clip.text_projection(states[largest])).abs().max() > 0.01 * found.abs().max()


@pytest.mark.numerical
@pytest.mark.parametrize("weighting", ["name", "uniform"])
def test_heads_are_those_of_metaclips_texts(folder, weighting):
    descriptions = {name: [f"jede {name}", f"zwei {name}", f"vier {name}"] for name in CLASS_NAMES}
    classifier, prior_head = [], []
    for name in CLASS_NAMES:
        prompt = normalize(text_feature(folder, f"eine {name}"), dim=-1)
        described = [normalize(text_feature(folder, sentence), dim=-1) for sentence in descriptions[name]]
        weights = [sentence @ prompt if weighting == "name" else 1.0 for sentence in described]
        assert sum(weights) > 1  # a random tower relates texts that are as long
        classifier.append(normalize(sum(described), dim=-1))
        weighted = sum(weight * sentence for weight, sentence in zip(weights, described, strict=True))
        prior_head.append(normalize(weighted / sum(weights), dim=-1))
    texts = {"templates": "eine {}", "descriptions": descriptions}
    model = from_clip(folder, prior_weighting=weighting, **texts)
    assert_close(model.classifier.weight.detach(), torch.stack(classifier), **within())
    assert_close(model.prior_head.weight, torch.stack(prior_head), **within())


def test_a_plain_checkpoint_is_wrapped(folder):
    """As a plain CLIP's: its towers, and new heads."""
    model, report = MicroCLIPForImageClassification.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert isinstance(model.config.clip_config, MetaClip2Config)
    assert set(report["missing_keys"]) == {"classifier.weight", "prior_head.weight", *PROJECTIONS}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    own = MetaClip2Model.from_pretrained(folder).vision_model.state_dict()
    assert all(value.equal(own[name]) for name, value in model.clip.vision_model.state_dict().items())


def test_configurations(tmp_path):
    config = MicroCLIPConfig(clip_config={"model_type": "metaclip_2", "projection_dim": 64})
    config.save_pretrained(tmp_path)
    loaded = MicroCLIPConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.clip_config, MetaClip2Config) and loaded.to_dict() == config.to_dict()
    assert MicroCLIPConfig.from_dict(MetaClip2Config(projection_dim=64).to_dict()).clip_config.projection_dim == 64


@pytest.mark.numerical
def test_adapted_saved_and_loaded(folder, adapted, pixel_values):
    """Only what microCLIP adapts has moved; weights that are loaded are bit-equal."""
    model, start = adapted.model.eval(), from_clip(folder, prior_weighting="uniform")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    vision = [name for name in start.state_dict() if name.startswith("clip.vision_model.")]
    norms = {name for name in vision if "norm" in name or "layrnorm" in name}
    assert trained == {*norms, "classifier.weight", *PROJECTIONS}
    state = model.state_dict()
    moved = {name for name, value in start.state_dict().items() if not value.equal(state[name])}
    assert moved == trained
    loaded = MicroCLIPForImageClassification.from_pretrained(adapted.args.output_dir)
    assert type(loaded.clip) is MetaClip2Model and loaded.config.class_names == CLASS_NAMES
    assert all(value.equal(state[name]) for name, value in loaded.state_dict().items())
    assert_close(loaded(pixel_values).logits, model(pixel_values).logits, **within(LOGIT_SCALE))


@pytest.mark.numerical
def test_pipeline_and_remote_code(adapted, tmp_path):
    """By name, by object, and in a process that can't import microclip_hf."""
    source = adapted.args.output_dir
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    model = MicroCLIPForImageClassification.from_pretrained(source)
    with torch.no_grad(), ClearDecisions():
        expected = model(**processor(picture(), return_tensors="pt")).logits.softmax(-1)[0]
    for given in (source, model):
        answer = pipeline("image-classification", model=given, image_processor=processor)(picture())
        scores = {each["label"]: each["score"] for each in answer}
        assert_close(torch.tensor([scores[name] for name in CLASS_NAMES]), expected, **within(LOGIT_SCALE / 2))
    assert_remote_code_works(source, CLASS_NAMES, expected, tmp_path)


@pytest.mark.numerical
def test_other_classes_with_a_kept_text_tower(folder, tmp_path):
    """The tokenizer is saved, too."""
    model = from_clip(folder, keep_text_model=True, prior_weighting="uniform")
    model.save_pretrained(tmp_path)
    loaded = MicroCLIPForImageClassification.from_pretrained(tmp_path)
    assert type(loaded.tokenizer) is type(make_world_tokenizer())
    names = ["Möwe", "Rohrdommel"]
    loaded.set_classes(names)
    clip = MetaClip2Model.from_pretrained(folder)
    expected, _ = encode_heads(clip, AutoTokenizer.from_pretrained(folder), names)
    assert_close(loaded.classifier.weight.detach(), expected, **within())
    assert loaded.config.class_names == names


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_of_the_other_kind_is_refused(kind):
    """CLIP's tokenizer has ids that this text tower lacks, and the other way round no such end of text."""
    (other,) = (make for owner, make in TOKENIZERS.items() if owner is not kind)
    message = "the text tower has 163 tokens" if kind is MetaClip2Model else "end-of-text token that the text tower"
    with pytest.raises(ValueError, match=message):
        from_clip(make_clip(TOKENIZERS[kind](), kind=kind), tokenizer=other())


def test_the_longest_text(folder):
    """Both ends and the 75 letters between them; a word's beginning is a token, too."""
    fits = fits_text_tower(str(folder))
    assert fits("w" * 74) and not fits("w" * 75)


def test_a_damaged_vocabulary_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").unlink()
    (tmp_path / "clip" / "sentencepiece.bpe.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"sentencepiece.bpe.model is a Git LFS pointer"):
        from_clip(tmp_path / "clip")


def test_by_commands(folder, inputs, tmp_path, capsys):
    """Adapted, and evaluated against the MetaCLIP 2."""
    output, test = tmp_path / "adapted", inputs / "test"
    adapt_command.main(flags(inputs, output, model_name_or_path=folder, test_dir=test, config_overrides=UNIFORM))
    assert type(MicroCLIPForImageClassification.from_pretrained(output).clip) is MetaClip2Model
    capsys.readouterr()
    options = {"model_name_or_path": output, "clip": folder, "test_dir": test, "output_dir": tmp_path / "results"}
    evaluate_command.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    assert "12 images of all 3 classes." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("siglip", "SigLIP has no [CLS] token"),
        ("siglip2", "SigLIP 2 has no [CLS] token"),
        ("siglip2_vision_model", "SigLIP 2 has no [CLS] token"),
        ("tipsv2", "TIPSv2 has a DINOv2 for its vision tower"),
    ],
)
def test_what_is_no_clip_is_refused_by_name(inputs, tmp_path, model_type, reason):
    """From Python and by command, in one line that says what to take."""
    source = tmp_path / "other"
    AutoConfig.for_model(model_type).save_pretrained(source)
    message = re.escape(f"model type {model_type!r}, and microCLIP adapts CLIP; {reason}. Pass one that loads as")
    for load in (from_clip, MicroCLIPConfig.from_pretrained, MicroCLIPForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(source)
    with pytest.raises(SystemExit, match=message) as end:
        adapt_command.main(flags(inputs, tmp_path / "adapted", model_name_or_path=source))
    assert "\n" not in str(end.value).strip() and "'openai/clip-vit-base-patch32'" in str(end.value)
