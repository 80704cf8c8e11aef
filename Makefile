# Every target makes its environment and installs by itself if needed.
PYTHON ?= python3
BIN = .venv/bin
STAMP = .venv/.installed
LOWEST_STAMP = .venv-lowest/.installed
SPACE_FOLDER = outputs/space

.PHONY: help demo space space-folder test test-any-cpu test-lowest slow-test style quality

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): EXTRAS = dev,demo
$(STAMP): constraints.txt
$(LOWEST_STAMP): EXTRAS = dev
$(LOWEST_STAMP): constraints-lowest.txt
%/.installed: setup.cfg pyproject.toml
	@echo "Installing PyTorch, transformers and what else '$(EXTRAS)' needs into $(@D), once: 2.1 GB on disk, several GB"
	@echo "more where PyTorch brings CUDA. It takes minutes, mostly of download, and prints nothing meanwhile."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -q -c $(filter %.txt,$^) -e ".[$(EXTRAS)]"
	@$(@D)/bin/python -m pip install -q --no-deps --upgrade -c $(filter %.txt,$^) --target $(@D)/oracles \
		$$(sed -n '/^open_clip =/,/^$$/s/^    //p' setup.cfg)
	@touch $@

demo: $(STAMP)  ## adapt a small CLIP to unlabelled rendered birds, without any download (minutes)
	@rm -rf outputs/demo
	@$(BIN)/python examples/adapt.py

space: $(STAMP)  ## serve a page on this machine to try models on, the demo's model too if there is one
	MICROCLIP_MODELS="$${MICROCLIP_MODELS-$(patsubst %/config.json,%,$(wildcard outputs/demo/config.json))}" \
		$(BIN)/python examples/space/app.py

space-folder:  ## gather what a Space needs in outputs/space, ready to upload
	rm -rf $(SPACE_FOLDER)
	mkdir -p $(SPACE_FOLDER)/birdworld
	cp -r examples/space/. microclip_hf $(SPACE_FOLDER)/
	cp -r examples/birdworld/clip examples/birdworld/bird.png $(SPACE_FOLDER)/birdworld/
	find $(SPACE_FOLDER) -name __pycache__ -prune -exec rm -r {} +

test: $(STAMP)  ## run the tests (minutes)
	$(BIN)/python -m pytest

test-any-cpu: $(STAMP)  ## run the numerical tests as other CPUs would round, with one thread and two (10 minutes)
	$(BIN)/python tests/any_cpu.py

test-lowest: $(LOWEST_STAMP)  ## run the tests with the lowest versions that setup.cfg allows (Python 3.10 or 3.11)
	.venv-lowest/bin/python -m pytest

slow-test: $(STAMP)  ## run the tests marked slow: transformers' own model tests, the wheel, the demo, pages in Chromium
	$(BIN)/python -m pytest -m slow

style: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)  ## check style and types of mistakes, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
