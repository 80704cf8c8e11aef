"""Recipes by name: what they hold, what wins over them, and where they are named."""

import configparser
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_adapt import flags

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification, MicroCLIPTrainingArguments
from microclip_hf.commands import adapt
from microclip_hf.hub.model_card import CardFacts, write_model_card
from microclip_hf.recipes import list_recipes, load_recipe


ROOT = Path(__file__).parents[1]
NAMES = ["published", "quick", "recommended"]
UNIFORM = {"prior_weighting": "uniform", "fusion_ratio": 0.75}
MIXTURE = {"class_mixture": True, "class_frequencies": "estimated"}
TAUGHT = {"crop_ratio": [0.85, 1.0], "num_train_epochs": 4, "label_refresh": "never", "fairness_weight": 0}


class StoppedError(Exception):
    """A command has read its options, so that it may stop."""


@pytest.fixture
def read(monkeypatch):
    """What `microclip adapt` makes of its options: architecture and arguments."""
    check = adapt._check_options

    def check_and_stop(options, training_args):
        overrides, _ = check(options, training_args)
        raise StoppedError(overrides, training_args)

    monkeypatch.setattr(adapt, "_check_options", check_and_stop)

    def read(*arguments):
        with pytest.raises(StoppedError) as stopped:
            adapt.main([*map(str, arguments)])
        return stopped.value.args

    return read


@pytest.fixture
def needed(inputs, tmp_path):
    """The options that a run needs, without settings of learning."""
    options = flags(inputs, tmp_path / "out")
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for pair in pairs if pair[0] != "--num_train_epochs" for word in pair]


def test_what_the_recipes_are():
    assert list_recipes() == NAMES
    assert load_recipe("published").config == load_recipe("published").args == {}
    assert load_recipe("quick").config == load_recipe("recommended").config == UNIFORM
    assert load_recipe("quick").args == {"num_train_epochs": 0, "num_crops": 0, **MIXTURE}
    assert load_recipe("recommended").args == {**MIXTURE, **TAUGHT}


@pytest.mark.parametrize("name", NAMES)
def test_both_classes_have_the_fields_and_take_them(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.config.keys() <= set(MicroCLIPConfig.architecture_names())
    assert recipe.args.keys() <= {field.name for field in fields(MicroCLIPTrainingArguments)}
    config, args = MicroCLIPConfig(**recipe.config), MicroCLIPTrainingArguments.from_recipe(name, str(tmp_path))
    assert {key: getattr(config, key) for key in recipe.config} == recipe.config
    assert {key: getattr(args, key) for key in recipe.args} == recipe.args
    assert (args.recipe, args.output_dir) == (name, str(tmp_path))


def test_the_published_recipe_is_the_defaults(tmp_path, read, needed):
    default = MicroCLIPTrainingArguments(str(tmp_path))
    args = MicroCLIPTrainingArguments.from_recipe("published", str(tmp_path))
    assert args.to_dict() == {**default.to_dict(), "recipe": "published"}
    (plain, without), (overrides, with_recipe) = read(*needed), read(*needed, "--recipe", "published")
    assert plain == overrides == {}
    assert with_recipe.to_dict() == {**without.to_dict(), "recipe": "published"}


def test_given_arguments_win(tmp_path):
    given = {"fairness_weight": 0.2, "label_refresh": "step", "class_mixture": False, "num_crops": 3}
    args = MicroCLIPTrainingArguments.from_recipe("recommended", str(tmp_path), **given)
    expected = {**MIXTURE, **TAUGHT, **given}
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_recipe_that_is_changed_stays_as_it_was():
    load_recipe("quick").args["num_train_epochs"] = 7
    assert load_recipe("quick").args["num_train_epochs"] == 0


def test_the_constructor_records_and_changes_nothing(tmp_path):
    default = MicroCLIPTrainingArguments(str(tmp_path), fairness_weight=0)
    args = MicroCLIPTrainingArguments(str(tmp_path), fairness_weight=0, recipe="recommended")
    assert args.to_dict() == {**default.to_dict(), "recipe": "recommended"}
    # Made again from what was recorded, with a setting that was the recipe's given.
    again = MicroCLIPTrainingArguments(str(tmp_path), num_train_epochs=3, recipe="quick", **MIXTURE)
    assert again.num_train_epochs == 3


@pytest.mark.parametrize("name", ["quick", "recommended"])
def test_a_recipe_in_name_only_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"none of its settings hold .*from_recipe\('{name}', \.\.\.\)") as error:
        MicroCLIPTrainingArguments(str(tmp_path), recipe=name, learning_rate=1e-3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fast", "Quick", "", "../presets/cub", "quick.yaml"])
def test_unknown_names(name, tmp_path, needed):
    message = rf"There is no recipe '{name}'; pass one of published, quick, recommended\."
    with pytest.raises(ValueError, match=message):
        load_recipe(name)
    with pytest.raises(ValueError, match=message):
        MicroCLIPTrainingArguments.from_recipe(name, str(tmp_path))
    with pytest.raises(ValueError, match=message):
        MicroCLIPTrainingArguments(str(tmp_path), recipe=name)
    with pytest.raises(SystemExit, match=message):
        adapt.main([*needed, f"--recipe={name}"])


def test_options_win_over_the_file_and_the_file_over_the_recipe(tmp_path, read, needed):
    """Each setting of the recipe is left alone, in the file, or in both and given, wherever `--recipe` stands."""
    settings = {"fairness_weight": 0.1, "num_train_epochs": 2, "config_overrides": {"fusion_ratio": 0.3}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    options = (*needed, "--num_train_epochs", "3", "--recipe", "recommended")
    overrides, args = read(*options, "--config", tmp_path / "settings.yaml")
    expected = {**MIXTURE, **TAUGHT, "fairness_weight": 0.1, "num_train_epochs": 3, "recipe": "recommended"}
    assert {name: getattr(args, name) for name in expected} == expected
    assert overrides == {"prior_weighting": "uniform", "fusion_ratio": 0.3}


def test_architecture_is_replaced_key_by_key(read, needed):
    given = {"prior_weighting": "name", "fg_query": "cls"}
    overrides, _ = read(*needed, "--recipe", "quick", "--config_overrides", json.dumps(given))
    assert overrides == {"prior_weighting": "name", "fg_query": "cls", "fusion_ratio": 0.75}


def test_false_and_zero_are_replaced_too(read, needed):
    _, args = read(*needed, "--class_mixture", "false", "--num-train-epochs", "2", "--recipe=quick")
    assert (args.class_mixture, args.num_train_epochs, args.class_frequencies) == (False, 2, "estimated")


def test_the_recipe_of_a_file_and_one_that_is_given(tmp_path, read, needed):
    (tmp_path / "settings.yaml").write_text("recipe: quick\nseed: 3\n")
    options = (*needed, "--config", tmp_path / "settings.yaml")
    overrides, args = read(*options)
    assert (args.recipe, args.num_train_epochs, args.seed, overrides) == ("quick", 0, 3, UNIFORM)
    # Nothing is left of the one in the file.
    overrides, args = read(*options, "--recipe", "published")
    assert (args.recipe, args.num_train_epochs, args.seed, overrides) == ("published", 15, 3, {})
    assert not args.class_mixture


def test_a_file_without_a_recipe(tmp_path, read, needed):
    (tmp_path / "settings.yaml").write_text("recipe: null\n")
    _, args = read(*needed, "--config", tmp_path / "settings.yaml")
    assert args.recipe is None


def test_an_option_without_a_name(needed, capsys):
    with pytest.raises(SystemExit) as end:
        adapt.main([*needed, "--recipe"])
    assert end.value.code == 2 and "--recipe: expected one argument" in capsys.readouterr().err


def test_the_help_lists_the_recipes_first_in_their_group(capsys):
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            adapt.main([option])
        text = " ".join(capsys.readouterr().out.split())
        titles = [f"{name} ({load_recipe(name).title})" for name in NAMES]
        assert "; ".join(titles) in text
        if option == "--help":
            assert "recipe, how it learns: --recipe " in text


def test_the_model_in_python(clip_folder):
    config = load_recipe("recommended").config
    model = MicroCLIPForImageClassification.from_clip(clip_folder, ["red disc", "blue bar"], **config)
    assert (model.config.prior_weighting, model.config.fusion_ratio) == ("uniform", 0.75)


def test_the_card_names_the_recipe_that_there_is(model, tmp_path):
    for recipe in (None, *NAMES):
        args = MicroCLIPTrainingArguments(str(tmp_path))
        if recipe is not None:
            args = MicroCLIPTrainingArguments.from_recipe(recipe, str(tmp_path))
        write_model_card(model.config, args, CardFacts(), 12)
        text = ModelCard.load(tmp_path / "README.md").text
        assert (f"recipe: {recipe}" in text) if recipe else ("recipe:" not in text)


def test_the_wheel_holds_the_files():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    package = ROOT / "microclip_hf" / "recipes"
    held = {path.stem for path in package.glob(setup["options.package_data"]["microclip_hf.recipes"])}
    assert held == set(NAMES) and (package / "__init__.py").exists()
