"""`microclip evaluate`: its numbers against CLIPModel, the pipeline and the evaluator; its report, card and errors."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny_inputs
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from decisions import ClearDecisions, assert_clear_answers
from evaluate import evaluator
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from scipy.stats import binom
from tolerances import assert_clear, within
from torch.nn.functional import normalize
from transformers import AutoProcessor, CLIPModel, pipeline

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import evaluate
from microclip_hf.commands import main as microclip
from microclip_hf.data.sources import load_image_folder
from microclip_hf.evaluation.page import report_page, write_results
from microclip_hf.evaluation.predictions import EvaluationSettings, PlainCLIP, Predictions, predict_all_ways
from microclip_hf.evaluation.results import EvaluationFacts, bootstrap_accuracies, confused_pairs, make_report
from microclip_hf.hub.card_evaluation import add_results, read_card
from microclip_hf.images import crop_box
from microclip_hf.loading import load_adapted, load_clip
from microclip_hf.metrics import MicroCLIPMetric


ROOT = Path(__file__).parents[1]
NAMES = list(tiny_inputs.DESCRIPTIONS)
UNIFORM = '{"prior_weighting": "uniform"}'
HUB_ID = "openai/clip-vit-base-patch32"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Also `adapted/`: other weights than the CLIP's, aligned classes, a card."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_inputs.write_inputs(folder)
    model = MicroCLIPForImageClassification.from_clip(
        folder / "clip", NAMES, descriptions=tiny_inputs.DESCRIPTIONS, prior_weighting="uniform", fusion_ratio=0.3
    )
    generator = torch.Generator().manual_seed(1)
    model.logit_adjustment.bias.copy_(torch.tensor([0.5, -0.4, 0.1]))
    for layer in model.clip.vision_model.encoder.layers:
        layer.layer_norm1.bias.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder / "adapted")
    (folder / "adapted" / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# A model\n\n## How it was made\n\n- so\n"
    )
    return folder


@pytest.fixture(scope="module")
def photos(inputs):
    return load_image_folder(inputs / "test", NAMES, labels_required=True)


def flags(output, **options):
    options = {"num_crops": 1, "output_dir": output, **options}
    return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]


def plain(inputs, output, **options):
    defaults = {
        "model_name_or_path": inputs / "clip",
        "class_names": inputs / "names.txt",
        "test_dir": inputs / "test",
        "config_overrides": UNIFORM,
    }
    return flags(output, **{**defaults, **options})


def adapted(inputs, output, **options):
    return flags(output, **{"model_name_or_path": inputs / "adapted", "test_dir": inputs / "test", **options})


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@torch.no_grad()
def clip_logits(folder, images, texts):
    """By CLIPModel and AutoProcessor, text by text."""
    clip = CLIPModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    features = clip.get_image_features(**processor(images=list(images), return_tensors="pt")).pooler_output
    heads = []
    for own in texts:
        encoded = [
            clip.get_text_features(
                **processor(text=[text], return_tensors="pt", truncation=True, max_length=77)
            ).pooler_output[0]
            for text in own
        ]
        heads.append(normalize(torch.stack([normalize(feature, dim=0) for feature in encoded]).mean(0), dim=0))
    return (clip.logit_scale.exp() * normalize(features, dim=-1) @ torch.stack(heads).T).numpy()


def clear_guesses(logits):
    assert_clear(logits, tiny_inputs.LOGIT_SCALE)
    return logits.argmax(1)


def describe_by_hand(predicted, labels):
    """Top-1, and its mean over classes, by loops."""
    right = [a == b for a, b in zip(predicted, labels, strict=True)]
    by_class = [np.mean([r for r, b in zip(right, labels, strict=True) if b == c]) for c in sorted(set(labels))]
    return {"accuracy": np.mean(right), "mean_class_accuracy": np.mean(by_class)}


# Numbers


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.numerical
def test_every_way_against_an_independent_one(inputs, photos, image_size, tmp_path):
    """Plain CLIP by CLIPModel, also where it prepares images in its own way; [CLS] and [FG] by the model's own
    `fusion_ratio`; the answer by the pipeline; crops by Pillow, one by one."""
    clip = inputs / "clip"
    if image_size != 32:
        clip = tmp_path
        tiny_inputs.save_clip(clip, image_size)
    texts = {"class_names": NAMES, "templates": ["a {}.", "no {}"], "descriptions": tiny_inputs.DESCRIPTIONS}
    other, heads = load_clip(str(clip), texts, {"prior_weighting": "uniform"})
    model = load_adapted(str(inputs / "adapted")).train()
    settings = EvaluationSettings(num_crops=3, seed=5, batch_size=5)
    with ClearDecisions():
        found = predict_all_ways(model, photos, PlainCLIP(other, heads), settings)
    assert model.training and list(found.logits) == ["zero_shot", "cupl", "cls", "fg", "fused", "multi_crop"]
    np.testing.assert_array_equal(found.labels, photos["label"])

    prompts = [[f"a {name}.", f"no {name}"] for name in NAMES]
    close = within(tiny_inputs.LOGIT_SCALE)
    np.testing.assert_allclose(found.logits["zero_shot"], clip_logits(clip, photos["image"], prompts), **close)
    described = clip_logits(clip, photos["image"], tiny_inputs.DESCRIPTIONS.values())
    np.testing.assert_allclose(found.logits["cupl"], described, **close)

    model.eval()
    classify = pipeline("image-classification", model=model, image_processor=model.image_processor)
    for way, ratio in (("fused", 0.3), ("cls", 1.0), ("fg", 0.0)):
        model.config.fusion_ratio = ratio
        answers = [{own["label"]: own["score"] for own in classify(image)} for image in photos["image"]]
        expected = [[answer[name] for name in NAMES] for answer in answers]
        shares = torch.from_numpy(found.logits[way]).softmax(-1)
        np.testing.assert_allclose(shares, expected, **within(tiny_inputs.LOGIT_SCALE / 2))
    np.testing.assert_allclose(found.logits["multi_crop"], crop_logits(model, photos["image"], 3, 5), atol=0.03)


@torch.no_grad()
def crop_logits(model, images, num_crops, seed):
    """`unit(sum_k softmax_k(z_k . g) z_k)` against the frozen head, times the scale."""
    scale, head, rows = model.clip.logit_scale.exp(), normalize(model.prior_head.weight, dim=-1), []
    for index, image in enumerate(images):
        rng = np.random.default_rng((seed, index))
        boxes = [crop_box(*image.size, (0.5, 0.9), rng) for _ in range(num_crops)]
        views = [image.crop(box).resize((32, 32), PILImage.Resampling.BICUBIC) for box in boxes]
        whole, *crops = model.coarse_embeds(
            torch.cat([model.image_processor(view, return_tensors="pt")["pixel_values"] for view in (image, *views)])
        )
        relevance = torch.stack([crop @ whole for crop in crops]).softmax(0)
        composite = sum(share * crop for share, crop in zip(relevance, crops, strict=True))
        rows.append(scale * head @ (composite / composite.norm()))
    return torch.stack(rows).numpy()


@pytest.mark.numerical
def test_batches_and_processes_change_nothing(inputs, photos):
    model = load_adapted(str(inputs / "adapted"))
    with ClearDecisions():
        one = predict_all_ways(model, photos, settings=EvaluationSettings(num_crops=2, batch_size=1)).logits
    other = predict_all_ways(model, photos, settings=EvaluationSettings(num_crops=2, num_workers=1)).logits
    assert one.keys() == other.keys() == {"cls", "fg", "fused", "multi_crop"}
    for way, logits in one.items():
        np.testing.assert_allclose(logits, other[way], **within(tiny_inputs.LOGIT_SCALE))


@pytest.mark.numerical
def test_the_command_on_a_clip(inputs, photos, tmp_path, capsys):
    """Against CLIPModel by hand; what is printed is what is written."""
    evaluate.main([*plain(inputs, tmp_path / "out", descriptions=inputs / "descriptions.json"), "--all"])
    found, printed = results(tmp_path / "out"), capsys.readouterr().out
    for way, texts in (
        ("zero_shot", [[f"a photo of a {name}."] for name in NAMES]),
        ("cupl", tiny_inputs.DESCRIPTIONS.values()),
        ("cls", tiny_inputs.DESCRIPTIONS.values()),
    ):
        predicted = clear_guesses(clip_logits(inputs / "clip", photos["image"], texts))
        own = found["ways"][way]
        assert own.items() >= describe_by_hand(predicted.tolist(), photos["label"]).items()
        assert re.search(rf"^\| {re.escape(own['title'])} +\| +{100 * own['accuracy']:.1f} \(", printed, re.MULTILINE)
    assert found["num_images"] == 12 and not found["left_out"]
    assert "microCLIP, not adapted" in printed and "The worst classes" in printed
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    table = re.search(r"\| in percent.*?\n\n", page, re.DOTALL)[0]
    assert table in printed
    assert PILImage.open(tmp_path / "out" / "confusion.png").format == "PNG"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "confusion.png"}


def evaluate_by_the_evaluator(folder, data, names, cache):
    """transformers' pipeline within evaluate's evaluator."""
    return evaluator("image-classification").compute(
        model_or_pipeline=str(folder),
        data=data,
        metric=MicroCLIPMetric("labels", cache_dir=str(cache)),
        label_mapping={name: i for i, name in enumerate(names)},
    )


@pytest.mark.numerical
def test_the_answer_against_the_evaluator(inputs, photos, tmp_path, capsys):
    evaluate.main(adapted(inputs, tmp_path / "out", num_crops=0, all="true"))
    found = results(tmp_path / "out")
    assert_clear_answers(inputs / "adapted", photos["image"])
    expected = evaluate_by_the_evaluator(inputs / "adapted", photos, NAMES, tmp_path)
    names = ("accuracy", "mean_class_accuracy", "harmonic_mean")
    assert {name: found["ways"]["fused"][name] for name in names} == {name: expected[name] for name in names}
    assert found["left_out"].keys() == {"zero_shot", "cupl", "multi_crop"} and len(found["ways"]) == 3
    printed = capsys.readouterr().out
    assert "CLIP with the class names: left out, it needs the CLIP that was adapted (--clip)" in printed
    assert "crops, with the frozen head: left out, --num_crops is 0" in printed


def first_cells(text):
    """Of the rows of the first table in Markdown."""
    table = text[text.index("| in percent") :].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


@pytest.mark.parametrize("shown", [[], ["--all"], ["--all", "true"]])
def test_three_ways_are_shown_or_all(inputs, tmp_path, shown, capsys):
    """On the screen, on the page and in the card; the file for programs has all of them either way."""
    shutil.copytree(inputs / "adapted", tmp_path / "adapted")
    options = {"clip": inputs / "clip", "descriptions": inputs / "descriptions.json"}
    command = adapted(inputs, tmp_path / "out", model_name_or_path=tmp_path / "adapted", **options)
    evaluate.main([*command, "--update_card", *shown])
    ways = results(tmp_path / "out")["ways"]
    assert list(ways) == ["zero_shot", "cupl", "cls", "fg", "fused", "multi_crop"]
    expected = [ways[way]["title"] for way in (ways if shown else ("zero_shot", "cupl", "fused"))]
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    card = (tmp_path / "adapted" / "README.md").read_text(encoding="utf-8")
    for text in (printed, page, card):
        assert first_cells(text) == expected
    assert f"| top-1 in percent | images | {' | '.join(expected)} |" in re.sub(" +", " ", page)
    pointer = "- in results.json, and here with --all: [CLS] alone; [FG] alone; crops, with the frozen head\n"
    assert (pointer in printed) == (pointer in page) == (not shown)
    assert "--all" not in card


@pytest.mark.numerical
def test_flowers(flowers, inputs, tmp_path, capsys):
    """Two classes have no descriptions; the pipeline and the evaluator say the same of real photos."""
    names = sorted(path.name for path in (flowers / "test").iterdir())
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = {"class_names": tmp_path / "names.txt", "descriptions": flowers / "descriptions.json"}
    with pytest.warns(UserWarning, match="2 of 12 classes have no descriptions.*: bluebell, lily-valley"):
        evaluate.main(plain(inputs, tmp_path / "out", test_dir=flowers / "test", num_crops=0, **options))
    found = results(tmp_path / "out")
    assert "240 images of all 12 classes." in capsys.readouterr().out
    descriptions = json.loads((flowers / "descriptions.json").read_text())
    model = MicroCLIPForImageClassification.from_clip(
        inputs / "clip", names, descriptions=descriptions, prior_weighting="uniform"
    )
    model.save_pretrained(tmp_path / "saved")
    data = load_image_folder(flowers / "test", names, labels_required=True)
    assert_clear_answers(tmp_path / "saved", data["image"])
    expected = evaluate_by_the_evaluator(tmp_path / "saved", data, names, tmp_path)
    assert found["ways"]["fused"].items() >= {name: expected[name] for name in ("accuracy", "harmonic_mean")}.items()
    assert expected["accuracy"] > 0


@pytest.mark.numerical
def test_a_kept_text_tower_reads_the_names(inputs, photos, tmp_path, capsys):
    model = MicroCLIPForImageClassification.from_clip(
        inputs / "clip", NAMES, prior_weighting="uniform", keep_text_model=True
    )
    model.save_pretrained(tmp_path / "kept")
    command = adapted(inputs, tmp_path / "out", model_name_or_path=tmp_path / "kept", templates="see {}")
    evaluate.main(command)
    found = results(tmp_path / "out")
    predicted = clear_guesses(clip_logits(inputs / "clip", photos["image"], [[f"see {name}"] for name in NAMES]))
    assert found["ways"]["zero_shot"]["accuracy"] == np.mean(predicted == photos["label"])
    assert "as adapted" in found["ways"]["zero_shot"]["title"] and found["left_out"].keys() == {"cupl"}


# Statistics


def test_intervals_against_the_binomial_distribution():
    correct = np.arange(150)[:, None] < [90, 3, 150]
    drawn = bootstrap_accuracies(correct)
    for column, right in zip(drawn.T, (90, 3, 150), strict=True):
        expected = binom.ppf([0.025, 0.975], 150, right / 150) / 150
        np.testing.assert_allclose(np.percentile(column, [2.5, 97.5]), expected, atol=1.01 / 150)


def test_paired_differences_against_a_loop():
    """Image by image; both ways are right together more often than by chance."""
    rng = np.random.default_rng(0)
    first = rng.random(80) < 0.7
    correct = np.stack([first, np.where(rng.random(80) < 0.2, ~first, first)], 1)
    drawn = bootstrap_accuracies(correct, resamples=4000)
    loop = []
    for _ in range(4000):
        chosen = correct[[int(rng.integers(80)) for _ in range(80)]]
        loop.append(chosen[:, 1].mean() - chosen[:, 0].mean())
    paired = drawn[:, 1] - drawn[:, 0]
    assert paired.mean() == pytest.approx(np.mean(loop), abs=0.005)
    assert paired.std() == pytest.approx(np.std(loop), rel=0.06)
    assert np.array_equal(drawn, bootstrap_accuracies(correct, resamples=4000))
    assert not np.array_equal(drawn, bootstrap_accuracies(correct, resamples=4000, seed=1))


@pytest.fixture
def by_hand():
    """Seven images of four classes: `b` has no image, two of `a` are taken for `c|c`, one of `d` for `a`."""
    labels = np.array([0, 0, 0, 2, 2, 3, 3])
    answer = np.array([2, 0, 2, 2, 2, 0, 3])
    logits = {"cls": np.eye(4)[labels], "fg": np.eye(4)[answer], "fused": np.eye(4)[answer]}
    names = ["a", "b", "c|c", "d"]
    facts = EvaluationFacts("model", "photos", names, {"cls": "other"}, {"cupl": "no texts"}, 2, {"num_crops": 8})
    predictions = Predictions(labels, {way: own.astype(np.float32) for way, own in logits.items()}, 1)
    return predictions, make_report(predictions, facts)


def test_a_report_by_hand(by_hand, tmp_path):
    predictions, report = by_hand
    assert confused_pairs(predictions.labels, predictions.logits["fused"].argmax(1)) == [(0, 2, 2), (3, 0, 1)]
    assert [(own["label"], own["predicted"], own["images"]) for own in report["confused_pairs"]] == [
        ("a", "c|c", 2),
        ("d", "a", 1),
    ]
    assert report["confused_pairs"][0]["share"] == 2 / 3
    found = {own["name"]: (own["images"], own["accuracy"]["fused"]) for own in report["classes"]}
    assert found == {"a": (3, 1 / 3), "c|c": (2, 1), "d": (2, 1 / 2)}
    ways = report["ways"]
    assert ways["fused"]["accuracy"] == 4 / 7 and "difference" not in ways["fused"]
    assert ways["cls"]["difference"] == pytest.approx(3 / 7) and ways["cls"]["accuracy_interval"] == [1, 1]
    low, high = ways["cls"]["difference_interval"]
    assert (1 - high, 1 - low) == pytest.approx(ways["fused"]["accuracy_interval"])
    assert ways["fg"]["difference_interval"] == [0, 0]  # the same images are drawn for both
    assert "against" not in report_page(report)  # of one way alone
    page = report_page(report, show_all=True)
    assert "| against this model (+ is better) |" in re.sub(" +", " ", page)
    assert "7 images of 3 of the 4 classes; left out: 1 unreadable and 2 without a label." in page
    assert "Without images: b." in page and "CLIP with the descriptions: left out, no texts" in page
    assert re.search(r"^\| a +\| +3 \| +100.0 \| +33.3 \| +33.3 \|$", page, re.MULTILINE)
    assert re.search(r"^\| a +\| +c\\\|c \| +2 \| +66.7 \|$", page, re.MULTILINE)
    assert page.index("| a ") < page.index("| d ") < page.index("| c\\|c ")  # the worst first
    write_results(tmp_path / "new" / "folder", report, predictions)
    assert results(tmp_path / "new" / "folder") == report


def test_differences_by_hand():
    """Of four images names say 2, descriptions 1, the answer 3 rightly; each is compared with the names."""
    labels = np.array([0, 1, 0, 1])
    guesses = {"zero_shot": [0, 1, 1, 0], "cupl": [0, 0, 1, 0], "cls": [0, 1, 0, 1], "fused": [0, 1, 0, 0]}
    logits = {way: np.eye(2, dtype=np.float32)[own] for way, own in guesses.items()}
    facts = EvaluationFacts("model", "photos", ["a", "b"], {}, {"multi_crop": "none were made"}, 0, {})
    report = make_report(Predictions(labels, logits), facts)
    ways = report["ways"]
    assert {way: own.get("gain") for way, own in ways.items()} == {
        "zero_shot": None,
        "cupl": -0.25,
        "cls": 0.5,
        "fused": 0.25,
    }
    assert ways["cls"]["difference"] == 0.25 and ways["zero_shot"]["difference"] == -0.25
    # 1 of 4 images differs: the number of times it is drawn is binomial.
    drawn = binom.ppf([0.025, 0.975], 4, 1 / 4) / 4
    assert ways["fused"]["gain_interval"] == drawn.tolist() == (-np.flip(ways["cupl"]["gain_interval"])).tolist()
    page = re.sub(" +", " ", report_page(report))
    assert "| against CLIP with the class names (+ is better) |" in page and "none were made" not in page
    assert re.search(r"^\| CLIP with the class names \| 50.0 \([^|]*\) \| - \|", page, re.MULTILINE)
    assert re.search(r"^\| CLIP with the descriptions \| 25.0 \([^|]*\) \| -25.0 \(-75.0 to ", page, re.MULTILINE)
    assert re.search(r"^\| this model \| 75.0 \([^|]*\) \| \+25.0 \(\+0.0 to \+75.0\) \|", page, re.MULTILINE)


def test_nothing_confused(tmp_path):
    predictions = Predictions(np.array([0, 1]), {"fused": np.eye(2, dtype=np.float32)})
    report = make_report(predictions, EvaluationFacts("model", "photos", ["a", "b"], {}, {}, 0, {}))
    write_results(tmp_path, report, predictions)
    assert "No image was taken for another class." in (tmp_path / "results.md").read_text()


# Card


def test_results_in_a_card(inputs, tmp_path):
    """Read back by huggingface_hub; another measurement on the same images replaces, on others it stays beside."""
    folder = tmp_path / "adapted"
    folder.mkdir()
    for path in (inputs / "adapted").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "others").symlink_to(inputs / "test")
    for output, test_dir in (("1", inputs / "test"), ("2", tmp_path / "others"), ("3", inputs / "test")):
        command = adapted(inputs, tmp_path / output, model_name_or_path=folder, test_dir=test_dir, num_crops=0)
        evaluate.main([*command, "--update_card", *(["--clip", str(inputs / "clip")] if output == "3" else [])])
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.model_name == "adapted"
    assert [(own.dataset_name, own.metric_type) for own in card.data.eval_results if "acc" in own.metric_type] == [
        (name, metric)
        for name in ("others", "test")
        for metric in ("accuracy", "top5_accuracy", "mean_class_accuracy")
    ]
    measured = {own.metric_type: own.metric_value for own in card.data.eval_results if own.dataset_name == "test"}
    own = results(tmp_path / "3")["ways"]["fused"]
    assert len(measured) == 5 and own.items() >= measured.items()
    assert re.findall(r"^#.*", card.text, re.MULTILINE) == [
        "# A model",
        "## Measured on test",
        "## Measured on others",
        "## How it was made",
    ]
    assert card.text.count("| CLIP with the class names |") == 1 and card.text.endswith("- so\n")
    assert str(tmp_path) not in str(card) and "\n\n\n" not in card.text


def test_a_data_set_of_the_hub_in_the_card(by_hand, tmp_path):
    """Its configuration and split tell measurements apart."""
    (tmp_path / "README.md").write_text("# A model\n")
    for split in ("test", "validation", "test"):
        options = evaluate.EvaluateArguments(
            "model", "out", dataset_name="user/photos", dataset_config="small", dataset_split=split
        )
        report = {**by_hand[1], "dataset": evaluate._dataset_title(options)}
        add_results(read_card(tmp_path), tmp_path, report, **evaluate._dataset_facts(options))
    card = ModelCard.load(tmp_path / "README.md")
    found = {(own.dataset_type, own.dataset_config, own.dataset_split) for own in card.data.eval_results}
    assert found == {("user/photos", "small", "test"), ("user/photos", "small", "validation")}
    assert len(card.data.eval_results) == 10 and card.data.model_name == tmp_path.name
    assert re.findall(r"^#.*", card.text, re.MULTILINE) == [
        "# A model",
        "## Measured on user/photos, small, test",
        "## Measured on user/photos, small, validation",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "isn't a folder with a card, README.md"),
        ("---\na: [\n---\n", "metadata of .*README.md can't be read"),
        ("---\nmodel-index:\n- name: a\n---\n", "metadata of .*README.md can't be read"),
    ],
)
def test_a_card_that_cannot_be_written_is_found_first(inputs, tmp_path, text, message, monkeypatch):
    monkeypatch.setattr("microclip_hf.commands.options.load_images", None)
    (tmp_path / "config.json").write_bytes((inputs / "adapted" / "config.json").read_bytes())
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    command = adapted(inputs, tmp_path / "out", model_name_or_path=tmp_path, update_card="true")
    with pytest.raises(SystemExit, match=message):
        evaluate.main(command)


# Input


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (plain, {"class_names": None}, "is a CLIP; pass the names of the classes with --class_names"),
        (plain, {"clip": "any"}, "--clip doesn't go with .*, a CLIP: it is compared with itself"),
        (plain, {"update_card": "true"}, "--update_card doesn't go with .*, a CLIP"),
        (plain, {"config_overrides": '{"fusion": 1}'}, "has 'fusion'; the settings are"),
        (plain, {"model_name_or_path": "no/model"}, "no/model can't be loaded"),
        (plain, {"model_name_or_path": "."}, "there is no config.json with a 'model_type'"),
        (plain, {"templates": "a photo"}, "no '{}'"),
        (plain, {"test_dir": None}, "either --test_dir or --dataset_name"),
        (plain, {"dataset_name": "user/photos"}, "either --test_dir or --dataset_name"),
        (plain, {"test_dir": "no folder"}, "isn't a folder"),
        (plain, {"test_dir": "photos"}, "lie in no sub-folder"),
        (plain, {"descriptions": "none.json"}, "--descriptions none.json: there is no such file"),
        (plain, {"num_crops": -1}, "--num_crops is -1; it must be 0 or more"),
        (plain, {"batch_size": 0}, "--batch_size is 0; it must be 1 or more"),
        (plain, {"device": "abacus"}, "--device abacus can't be used"),
        (adapted, {"clip": "no/clip"}, "no/clip can't be loaded"),
        (plain, {"model_name_or_path": "list"}, "list.config.json holds a list"),
        (plain, {"config_overrides": "3"}, "--config_overrides 3 is no JSON object"),
        (adapted, {"device": "meta"}, "--device meta can't be used"),
        (adapted, {"output_dir": ""}, "--output_dir is empty"),
        (adapted, {"dataset_split": "test"}, "--dataset_split can't go with --test_dir"),
        (adapted, {"test_dir": "labels", "label_column": "lists"}, r"labels of labels are List\("),
        (adapted, {"test_dir": "labels", "image_column": "share"}, "column 'share' of labels holds Value.*not images"),
        (adapted, {"test_dir": "labels", "label_column": "image"}, "are both 'image'"),
        (adapted, {"class_names": "names.txt"}, "--class_names doesn't go with .*, an adapted model"),
        (adapted, {"descriptions": "descriptions.json"}, "--descriptions doesn't go with .* pass it with --clip"),
        (adapted, {"templates": "a {}"}, "--templates doesn't go with .* pass it with --clip"),
        (adapted, {"config_overrides": UNIFORM}, "--config_overrides doesn't go with"),
        (
            adapted,
            {"test_dir": "other"},
            "labels 'star' are none of the 3 classes; the classes 'green square', 'blue bar' have no label",
        ),
        (adapted, {"test_dir": None, "dataset_name": "table", "dataset_split": "train"}, "one with label_column"),
        (adapted, {"test_dir": "labels", "label_column": "share"}, "label 0.5 is no whole number; expected names"),
        (adapted, {"test_dir": "labels", "label_column": "none"}, "None of the 3 images of labels has a label"),
        (adapted, {"test_dir": "labels", "label_column": "high"}, "highest label is 3, and there are 3 classes"),
        (adapted, {"output_dir": "done"}, "--output_dir done already holds results.json"),
        (adapted, {"output_dir": "names.txt"}, "--output_dir names.txt is a file"),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(inputs, tmp_path, kind, options, message, monkeypatch):
    monkeypatch.setattr(evaluate, "load_adapted", None)
    monkeypatch.setattr(evaluate, "load_clip", None)
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "names.txt", "descriptions.json"):
        (tmp_path / name).symlink_to(inputs / name)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "other").mkdir()
    for name in ("red_disc", "star"):
        (tmp_path / "other" / name).symlink_to(inputs / "test" / "red disc")
    images = [PILImage.new("RGB", (40, 40))] * 3
    columns = {"image": images, "share": [0.5] * 3, "none": [-1, None, -1], "high": [1, 2, 3], "lists": [[1]] * 3}
    for folder, kept in (("table", ["image"]), ("labels", columns)):
        (tmp_path / folder).mkdir()
        data = Dataset.from_dict({name: columns[name] for name in kept}).cast_column("image", Image())
        data.to_parquet(tmp_path / folder / "train.parquet")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        evaluate.main(kind(inputs, options.pop("output_dir", "out"), **options))
    assert sorted(tmp_path.rglob("*")) == before


def test_unreadable_and_unlabelled_images(inputs, tmp_path, capsys):
    """Of a data set with columns and an order of labels of its own."""
    images = [path.read_bytes() for path in sorted((inputs / "test" / "green square").iterdir())]
    stored = [{"bytes": own, "path": None} for own in (images[0], b"no image", *images[1:3], images[3])]
    features = Features({"picture": Image(), "kind": ClassLabel(names=sorted(NAMES)), "row": Value("int64")})
    data = Dataset.from_dict({"picture": stored, "kind": [1, 1, 1, -1, 1], "row": range(5)}, features=features)
    (tmp_path / "repo").mkdir()
    data.to_parquet(tmp_path / "repo" / "test.parquet")
    options = {"test_dir": None, "dataset_name": tmp_path / "repo", "label_column": "kind"}
    with pytest.warns(UserWarning, match=r"1 of 4 images can't be read \(image 1\) and are left out"):
        evaluate.main(adapted(inputs, tmp_path / "out", **options))
    found = results(tmp_path / "out")
    assert (found["num_images"], found["num_unreadable"], found["num_unlabelled"]) == (3, 1, 1)
    assert "3 images of 1 of the 3 classes; left out: 1 unreadable and 1 without a label." in capsys.readouterr().out
    classify = pipeline("image-classification", model=str(inputs / "adapted"), top_k=1)
    decoded = datasets.Image().decode_example
    right = [classify(decoded(stored[index]))[0]["label"] == "green square" for index in (0, 2, 4)]
    assert [own["accuracy"]["fused"] for own in found["classes"]] == [np.mean(right)]


def test_no_readable_image(inputs, tmp_path):
    (tmp_path / "test" / "red disc").mkdir(parents=True)
    (tmp_path / "test" / "red disc" / "1.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"1 of 1 images can't be read \(.*1.png\), so nothing can be measured"):
        evaluate.main(adapted(inputs, tmp_path / "out", test_dir=tmp_path / "test"))
    assert not list((tmp_path / "out").iterdir())


def test_load_adapted(inputs, tmp_path):
    model = load_adapted(str(inputs / "adapted"))
    assert not model.training and model.dtype == torch.float32 and model.config.fusion_ratio == 0.3
    with pytest.raises(ValueError, match="is a model of type 'clip'; pass a microCLIP"):
        load_adapted(str(inputs / "clip"))
    with pytest.raises(ValueError, match="no-folder can't be loaded"):
        load_adapted(str(tmp_path / "no-folder"))
    (tmp_path / "config.json").write_bytes((inputs / "adapted" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="can't be loaded"):
        load_adapted(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((inputs / "adapted" / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_adapted(str(tmp_path))
    shutil.copytree(inputs / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes((inputs / "clip" / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"clip.model.safetensors is damaged"):
        load_clip(str(tmp_path / "clip"), {"class_names": NAMES, "templates": None}, {})


# Docs


def test_every_code_block_of_the_docs(inputs, tmp_path, monkeypatch, capsys):
    """In a folder with what they name, ids replaced by folders here."""
    for name in ("photos", "test", "names.txt", "descriptions.json", "adapted"):
        (tmp_path / name).symlink_to(inputs / name)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page.replace(HUB_ID, str(inputs / "clip")), re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash", "python"]
    for language, block in blocks:
        if language == "python":
            capsys.readouterr()
            exec(block, {})
            ours, theirs = capsys.readouterr().out.split()[-2:]
            assert ours == theirs
        else:
            uniform = ["--config_overrides", UNIFORM] if "class_names" in block else []
            monkeypatch.setattr(sys, "argv", [*shlex.split(block.replace("\\\n", "")), *uniform])
            microclip()
    table = page[page.index("|---") : page.index("Without `--clip`")]
    titles = re.findall(r"^\| (\S[^|]*\S) +\|", table, re.MULTILINE)
    assert titles == [own["title"] for own in results(tmp_path / "results")["ways"].values()]


def test_the_example_shows_the_command_of_the_docs():
    docs, example = ((ROOT / path).read_text() for path in ("docs/evaluation.md", "examples/evaluate_model.py"))
    commands = [
        re.search(r"--model_name_or_path adapted.*?--output_dir results\n", text, re.DOTALL)[0]
        for text in (docs, example)
    ]
    assert commands[0].split() == commands[1].split()
