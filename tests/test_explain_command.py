"""`microclip explain`: what it prints and draws is what `explain` finds, and no file is overwritten."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASS_NAMES
from PIL import Image
from tiny_inputs import draw_shape

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import explain as command
from microclip_hf.explain import explain, overlay


PAGE = Path(__file__).parents[1] / "docs" / "explain.md"


@pytest.fixture
def adapted(clip_folder, tmp_path, monkeypatch):
    """A folder with `adapted/` and `photo.png`, in which the command is called."""
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    model.save_pretrained(tmp_path / "adapted")
    draw_shape("red disc", np.random.default_rng(0)).resize((60, 40)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return model.eval()


def test_the_docs_command_prints_the_label_and_draws_why(adapted, capsys):
    (block,) = re.findall(r"```bash\nmicroclip explain (.*)\n```", PAGE.read_text(encoding="utf-8"))
    command.main([*shlex.split(block), "--device", "cpu"])
    (own,) = explain(adapted, [Image.open("photo.png")])
    _, second = sorted(zip(own.scores, CLASS_NAMES, strict=True))[::-1][:2]
    assert capsys.readouterr().out == (
        f"photo.png: {own.label} ({own.scores.max():.1%}), then {second[1]} ({second[0]:.1%})\nSaved to why.png.\n"
    )
    assert Image.open("why.png").width > 1000
    assert {path.name for path in Path().iterdir()} == {"adapted", "photo.png", "why.png"}


@pytest.mark.parametrize("show", ["fg_attention", "saliency_mask"])
def test_one_map_over_the_photo(adapted, show):
    command.main(["photo.png", "--model", "adapted", "--output", "where.PNG", "--show", show, "--device", "cpu"])
    (own,) = explain(adapted, [Image.open("photo.png")])
    drawn = np.asarray(Image.open("where.PNG"), int)
    assert drawn.shape == (40, 60, 3)
    assert np.abs(drawn - np.asarray(overlay(own, show=show), int)).max() <= 1


ERRORS = {  # Arguments, and what the error says.
    "several photos": ("photo.png photo.png --output a.png", "There are 2 photos; pass one"),
    "a folder": ("adapted --output a.png", "adapted is a folder; pass one photo"),
    "no photo": ("nothing.png --output a.png", "nothing.png can't be read as a picture"),
    "text": ("adapted/config.json --output a.png", "adapted/config.json can't be read as a picture"),
    "itself": ("photo.png --output photo.png", "--output photo.png exists already; choose another name"),
    "ending": ("photo.png --output why.txt", "--output why.txt must end in one of .png, .jpg, .jpeg"),
    "no folder": ("photo.png --output new/why.png", "there is no folder new; make it"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do_before_the_model_is_loaded(adapted, monkeypatch, name):
    monkeypatch.setattr(command, "load_adapted", None)
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    arguments, message = ERRORS[name]
    with pytest.raises(SystemExit) as end:
        command.main([*arguments.split(), "--model", "adapted"])
    assert message in end.value.code and end.value.code.startswith("microclip explain: ")
    assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before
