# Every target makes .venv and installs by itself if needed.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
SPACE_FOLDER = outputs/space

.PHONY: help demo space space-folder space-test test slow-test style quality

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# accelerate gives a process on a CPU one thread unless it is told otherwise.
demo: $(STAMP)  ## adapt a small CLIP to unlabelled rendered birds, without any download (minutes)
	rm -rf outputs/demo
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/accelerate launch examples/adapt.py

# Gradio asks for an older Pillow than constraints.txt names, so the page has an environment of its own.
.venv-space/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-space
	sed 's/^pillow==.*/pillow==12.3.0/' constraints.txt > .venv-space/constraints.txt
	.venv-space/bin/python -m pip install -q -c .venv-space/constraints.txt -e ".[demo]"
	touch $@

space: .venv-space/.installed  ## serve a page to try models on
	.venv-space/bin/python examples/space/app.py

space-folder:  ## gather what a Space needs in outputs/space, ready to upload
	rm -rf $(SPACE_FOLDER)
	mkdir -p $(SPACE_FOLDER)/birdworld
	cp -r examples/space/. microclip_hf $(SPACE_FOLDER)/
	cp -r examples/birdworld/clip examples/birdworld/bird.png $(SPACE_FOLDER)/birdworld/
	find $(SPACE_FOLDER) -name __pycache__ -prune -exec rm -r {} +

space-test: .venv-space/.installed  ## run the page's tests, in a real browser where Chromium is installed
	.venv-space/bin/python -m pip install -q -c .venv-space/constraints.txt -e ".[demo,dev]"
	.venv-space/bin/python -m pytest -m slow -n 0 tests/test_space.py

test: $(STAMP)  ## run the tests (minutes)
	$(BIN)/python -m pytest

slow-test: $(STAMP)  ## run the tests marked slow: transformers' own model tests, the built wheel, the demo
	$(BIN)/python -m pytest -m slow

style: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)  ## check style and types of mistakes, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
