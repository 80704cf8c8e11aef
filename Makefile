# Every target makes its environment and installs by itself if needed.
PYTHON ?= python3
BIN = .venv/bin
STAMP = .venv/.installed
LOWEST_STAMP = .venv-lowest/.installed

.PHONY: help demo test test-lowest slow-test style quality

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): constraints.txt
$(LOWEST_STAMP): constraints-lowest.txt
%/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -c $(filter %.txt,$^) -e ".[dev]"
	touch $@

# accelerate gives a process on a CPU one thread unless it is told otherwise.
demo: $(STAMP)  ## adapt a small CLIP to unlabelled rendered birds, without any download (minutes)
	rm -rf outputs/demo
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/accelerate launch examples/adapt.py

test: $(STAMP)  ## run the tests (minutes)
	$(BIN)/python -m pytest

test-lowest: $(LOWEST_STAMP)  ## run the tests with the lowest versions that setup.cfg allows (Python 3.10 or 3.11)
	.venv-lowest/bin/python -m pytest

slow-test: $(STAMP)  ## run the tests marked slow: transformers' own model tests, the built wheel, the demo
	$(BIN)/python -m pytest -m slow

style: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)  ## check style and types of mistakes, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
