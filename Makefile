# Every target makes .venv and installs by itself if needed.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: help demo test slow-test style quality

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
