"""The card: read back by huggingface_hub, its snippet run, its claims true to the files beside it."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adaptation import CLASS_NAMES, adapt, draw_images
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from microclip_hf import MicroCLIPTrainingArguments
from microclip_hf.hub.model_card import CardFacts, write_model_card


RESULTS = {"cupl_accuracy": 0.25, "adapted_accuracy": 0.5, "adapted_top5_accuracy": 1.0}


@pytest.fixture
def args(tmp_path):
    folder = tmp_path / "a: b"
    folder.mkdir()
    return MicroCLIPTrainingArguments(str(folder))


def read(args):
    return ModelCard.load(os.path.join(args.output_dir, "README.md"))


def test_words_that_mean_something_to_yaml_markdown_or_jinja(model, args, tmp_path):
    model.config.id2label = {0: "red: disc", 1: "{{ green }} #1", 2: "blue 'bar'"}
    write_model_card(model.config, args, CardFacts(str(tmp_path), str(tmp_path / "photos"), results=RESULTS), 12)
    card = read(args)
    assert (card.data.model_name, card.data.base_model, card.data.datasets) == ("a: b", None, None)
    assert "red: disc, {{ green }} #1, blue 'bar'." in card.text
    assert "| CLIP with the descriptions | 25.0 |\n| this model | 50.0 |" in card.text
    assert "in percent: top-5 accuracy 100.0." in card.text
    # The folder that the code loads is the only one that is told.
    assert card.text.count(str(tmp_path)) == 1 and f'model="{args.output_dir}"' in card.text
    assert "prior_weighting: uniform" in card.text


def test_metadata(model, args):
    """What the Hub reads; results survive its own form of them."""
    args.hub_model_id = "me/birds"
    write_model_card(
        model.config, args, CardFacts("someone/clip", "someone/photos", "mit", "en", results=RESULTS), None
    )
    data = read(args).data
    assert (data.base_model, data.datasets, data.license, data.language) == (
        "someone/clip",
        ["someone/photos"],
        "mit",
        "en",
    )
    assert (data.pipeline_tag, data.library_name, data.tags) == ("image-classification", "transformers", ["microclip"])
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"accuracy": 0.5, "top5_accuracy": 1.0} and data.model_name == "birds"
    index = eval_results_to_model_index("birds", data.eval_results)
    assert model_index_to_eval_results(index) == ("birds", data.eval_results)
    assert 'model="me/birds"' in read(args).text and "a stream of images" in read(args).text


def test_without_results(model, args):
    write_model_card(model.config, args, CardFacts(), 12)
    card = read(args)
    assert not card.data.eval_results and "%" not in card.text and "adaptation.png" not in card.text
    assert "\n\n\n" not in card.text


@pytest.mark.parametrize(
    ("results", "caption"), [({}, "Images before and after"), (RESULTS, "Accuracies, and images before and after")]
)
def test_a_run_without_training(model, tmp_path, results, caption):
    """Settings of training had no effect, and the picture has no curves."""
    (tmp_path / "adaptation.png").write_bytes(b"")
    trained, fitted = (
        MicroCLIPTrainingArguments(str(tmp_path), class_mixture=True, use_cpu=True, num_train_epochs=epochs)
        for epochs in (1, 0)
    )
    settings = []
    for args, text in ((trained, "Curves of the training, and images before and after"), (fitted, caption)):
        write_model_card(model.config, args, CardFacts(results=results), 12)
        assert f"![{text}](adaptation.png)" in read(args).text
        settings.append(set(re.findall(r"^- (\w+): ", read(args).text, re.M)))
    assert {"learning_rate", "fairness_weight", "prior_refresh", "weight_decay"} <= settings[0] - settings[1]
    assert {"num_train_epochs", "num_crops", "prior_ratio", "class_mixture", "class_frequencies"} <= settings[1]
    assert settings[1] < settings[0]


def test_what_lies_beside_it_is_told(model, args):
    for name in ("descriptions.json", "adaptation.png"):
        with open(os.path.join(args.output_dir, name), "w") as file:
            file.write("{}")
    write_model_card(model.config, args, CardFacts(), 12)
    assert (
        "](adaptation.png)\n\nOf photos in this picture, what the model doesn't find salient is dimmed."
        in read(args).text
    )
    assert "SHA-256" not in read(args).text  # descriptions of somebody else
    write_model_card(model.config, args, CardFacts(descriptions="descriptions.json"), 12)
    assert f"SHA-256 {hashlib.sha256(b'{}').hexdigest()}" in read(args).text


def test_a_card_of_somebody_else_is_kept(clip_folder, tmp_path):
    """Also one that was edited; what the Trainer wrote itself it may write again."""
    trainer = adapt(clip_folder, tmp_path, num_train_epochs=1)
    trainer.save_model()
    (tmp_path / "README.md").write_text("# My notes")
    trainer.create_model_card()
    trainer.create_model_card(license="mit")
    assert (tmp_path / "README.old.md").read_text() == "# My notes"
    assert read(trainer.args).data.license == "mit"
    edited = (tmp_path / "README.md").read_text() + "My notes"
    (tmp_path / "README.md").write_text(edited)
    trainer.create_model_card()
    assert (tmp_path / "README.old-2.md").read_text() == edited
    assert sorted(path.name for path in tmp_path.glob("README*")) == ["README.md", "README.old-2.md", "README.old.md"]


def test_a_trainer_writes_its_card(clip_folder, tmp_path, monkeypatch):
    """With the results of its last evaluation, and a picture; the snippet of the card runs from any folder, also where
    the run was told a relative one."""
    monkeypatch.chdir(tmp_path)
    images = draw_images()
    trainer = adapt(clip_folder, 'all "my" birds', images, num_train_epochs=1)
    trainer.save_model()
    accuracy = trainer.evaluate(images)["eval_accuracy"]
    trainer.create_model_card(license="mit")
    card = read(trainer.args)
    assert card.data.eval_results[0].metric_value == accuracy
    assert card.data.license == "mit" and ", ".join(CLASS_NAMES) in card.text and "20 images" in card.text
    assert (tmp_path / 'all "my" birds' / "adaptation.png").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    images[0]["image"].save(elsewhere / "photo.png")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", snippet]
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and all(f"'label': '{name}'" in result.stdout for name in CLASS_NAMES), result.stderr


def test_the_example_card_is_what_is_written_today(model, args):
    """The same headings, table and metadata; its numbers are `make demo`'s."""
    example = ModelCard.load(Path(__file__).parents[1] / "model_cards" / "birdworld-dusk.md")
    results = {"zero_shot_accuracy": 0.1, "adapted_harmonic_mean": 0.2, **RESULTS}
    write_model_card(model.config, args, CardFacts(results=results), 12)
    for pattern in (r"^#+ [A-Z].*", r"^\| [^0-9]*"):
        assert re.findall(pattern, example.text, re.M) == re.findall(pattern, read(args).text, re.M)
    assert example.data.to_dict().keys() == read(args).data.to_dict().keys()
    assert [result.metric_type for result in example.data.eval_results][:2] == ["accuracy", "top5_accuracy"]
