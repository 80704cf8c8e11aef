"""How options are read: help, what is missing, wrong or unknown, and what options are called elsewhere."""

import importlib
import re
import runpy
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from microclip_hf import __version__
from microclip_hf.commands import COMMANDS, USAGE_ERROR
from microclip_hf.commands import main as microclip
from microclip_hf.commands.adapt import HELP_GROUPS
from microclip_hf.commands.words import SYNONYMS, VALUES, WORDS


ROOT = Path(__file__).parents[1]
ADAPT = ["adapt", "--model_name_or_path", "clip", "--output_dir", "out"]


class ParserError(Exception):
    """Ends a command with its parser."""


@pytest.fixture
def run(monkeypatch, capsys):
    """`microclip` with arguments: its exit code, and what it printed and complained."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["microclip", *arguments])
        code = 0
        try:
            microclip()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def names():
    """Options and arguments of each command."""

    def end(self, *args, **kwargs):
        raise ParserError({action.dest for action in self._actions})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_known_args", end)
        # `adapt` asks for --config before with a parser of its own.
        patch.setattr("microclip_hf.commands.adapt._expand_config", lambda arguments: arguments)
        names = {}
        for command in COMMANDS:
            with pytest.raises(ParserError) as found:
                importlib.import_module(f"microclip_hf.commands.{command}").main([])
            (names[command],) = found.value.args
    return names


def test_the_version(run):
    assert run("--version") == (0, f"microclip {__version__}\n", "")


def test_the_short_help_names_the_groups_and_the_long_one(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, printed, _ = run("adapt", "--help")
    options = re.findall(r"^  (--\w+)", printed, re.MULTILINE)
    assert not code and options == [f"--{name}" for group in HELP_GROUPS.values() for name in group]
    assert re.findall(r"^(\w.*):$", printed, re.MULTILINE) == list(HELP_GROUPS)
    assert "--help_all" in printed.splitlines()[-1] and len(printed.splitlines()) <= 45
    assert "--model_name_or_path" in printed.splitlines()[0] and "--output_dir" in printed.splitlines()[0]
    assert "Passes over the images (default: 15)" in printed


def test_the_long_help_has_every_setting(run, names):
    code, printed, _ = run("adapt", "--help_all")
    options = set(re.findall(r"^  --(\w+)", printed, re.MULTILINE))
    assert not code and names["adapt"] <= options and "warmup_steps" in options
    # Both sentences of it, where the short one has the first.
    assert "Folder of images to adapt to. It may hold" in " ".join(printed.split())


def test_the_script_helps_like_the_command(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adapt.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / "adapt.py"), run_name="__main__")
    assert capsys.readouterr().out == run("adapt", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ("adapt", "--model_name_or_path, --output_dir"),
        ("adapt --model_name_or_path clip --train_dir photos", "--output_dir"),
        ("evaluate --output_dir out", "--model_name_or_path"),
        ("describe --llm name", "--class_names, --output"),
        ("export", "--model_name_or_path, --output"),
        ("predict photos", "--model"),
        ("predict --model adapted", "photos"),
        ("push", "--repo_id, folder"),
        ("report", "folder"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, arguments, missing):
    code, _, complaint = run(*arguments.split())
    command = arguments.split()[0]
    assert code == USAGE_ERROR == 2
    assert complaint == (
        f"microclip {command}: Missing: {missing}. Pass what is missing; microclip {command} --help explains it.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ADAPT, "--prior_refresh", "nver"], r"--prior_refresh: invalid choice: 'nver' \(choose from .*never.*\)"),
        ([*ADAPT, "--seed", "x"], "--seed: invalid int value: 'x'"),
        ([*ADAPT, "--seed"], "--seed: expected one argument"),
        ([*ADAPT, "--config"], "--config: expected one argument"),
        ([*ADAPT, "--bf16", "maybe"], "--bf16: .*yes/no, true/false"),
        ([*ADAPT, "--train_dir", "my", "photos"], "'photos' belongs to no option; quote a value that has spaces"),
        ([*ADAPT, "--lerning_rate", "1"], r"no setting --lerning_rate; did you mean --learning_rate\?"),
        ([*ADAPT, "--learning-rat=1"], r"no setting --learning-rat; did you mean --learning_rate\?"),
        ([*ADAPT, "--frobnicate"], "no setting --frobnicate; --help_all lists all settings"),
        (["evaluate", "--test_dri", "test"], r"no setting --test_dri; did you mean --test_dir\?"),
        (["predict", "photos", "--model", "m", "--outptu", "a.csv"], r"--outptu; did you mean --output\?"),
        (["export", "--int4", "true"], r"no setting --int4; did you mean --int8\?"),
        (["push", "folder", "--repoid", "b"], r"no setting --repoid; did you mean --repo_id\?"),
        (["push", "folder", "--frobnicate"], "no setting --frobnicate; --help lists all settings"),
    ],
)
def test_usage_errors_are_one_line(run, arguments, message):
    code, _, complaint = run(*arguments)
    assert code == USAGE_ERROR and re.search(message, complaint) and len(complaint.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("adapt --epochs 3", "pass --num_train_epochs"),
        ("adapt --model clip --images photos", "pass --model_name_or_path"),
        ("adapt --train-data photos", "pass --train_dir"),
        ("adapt --batch-size=8", "pass --per_device_train_batch_size"),
        ("adapt --output out", "pass --output_dir"),
        ("adapt --device cpu", "pass --use_cpu true for the CPU, or put CUDA_VISIBLE_DEVICES=0 before"),
        ("adapt --threads 4", "put OMP_NUM_THREADS=4, say, before the command"),
        ("adapt --resume", "pass --resume_from_checkpoint"),
        ("evaluate --names names.txt", "pass --class_names"),
        ("evaluate --gpu 1", "pass --device"),
        ("evaluate --data photos", "pass --test_dir"),
        ("describe --model llama", "pass --llm"),
        ("describe --prompt what", "pass --questions"),
        ("predict --images photos --model m", "pass the photos, or their folder, without an option's name"),
        ("predict photos --model m --output_dir out", "pass --output."),
        ("push --output_dir out", "pass the folder without an option's name"),
    ],
)
def test_words_of_elsewhere_lead_to_the_option(run, arguments, said):
    code, _, complaint = run(*arguments.split())
    assert code == USAGE_ERROR and said in complaint and len(complaint.splitlines()) == 1


def test_words_lead_to_options_that_there_are(names):
    everywhere = set.union(*names.values())
    said = {option for options in SYNONYMS.values() for option in options if " " not in option}
    assert said <= everywhere and VALUES.keys() <= said
    assert len(WORDS) == sum(len(words.split()) for words in SYNONYMS)
    # A word that every command has as an option would never be looked up.
    assert not set.intersection(*names.values()) & WORDS.keys()


def test_without_arguments_the_script_is_the_demo(monkeypatch):
    """It would leave out bars in all that comes after."""
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr("datasets.disable_progress_bars", lambda: None)
    calls = []
    monkeypatch.setattr("microclip_hf.commands.adapt.main", calls.append)
    monkeypatch.setattr("birdworld.domains.DOMAINS", {"dusk": type("Domain", (), {"write": lambda self, _: None})()})
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "argv", ["adapt.py"])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "examples" / "adapt.py"), run_name="__main__")
    assert calls == [["--config", "examples/configs/birdworld.yaml"]]
