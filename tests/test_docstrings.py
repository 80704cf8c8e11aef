"""The examples in docstrings, run as a reader would, with the tiny CLIP in the place of one from the Hub."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
from PIL import Image

import microclip_hf


PACKAGE = Path(microclip_hf.__file__).parent


def find_examples():
    """Docstrings with examples, by the module and the name of what they belong to."""
    examples = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ">>>" in (ast.get_docstring(node) or ""):
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                examples[f"{module}:{node.name}"] = ast.get_docstring(node)
    return examples


EXAMPLES = find_examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings(name, clip_folder, tmp_path, monkeypatch):
    """Each by itself, with the names of its module, in a folder with a photo and a text."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "red").save("photo.jpg")
    Path("notes.txt").touch()
    lines = EXAMPLES[name].replace("openai/clip-vit-base-patch32", str(clip_folder)).split("\n")
    text = "\n".join(line for line in lines if not line.startswith("```"))
    names = dict(vars(importlib.import_module(name.split(":")[0])))
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    report = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not failed, "".join(report)


def test_there_are_examples():
    assert len(EXAMPLES) >= 6
