# conv3dt_jax: every task of a developer or a user. `make` lists them.
# All tasks run in the virtual environment .venv of this checkout, made here from a bare python3 (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Caches stay in the checkout: nothing is left elsewhere.
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export KERAS_HOME := $(CURDIR)/$(VENV)/cache/keras
export PRE_COMMIT_HOME := $(CURDIR)/$(VENV)/cache/pre-commit

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-slow lint format types bench bench-check notebooks docs release-check fixtures clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.examples  ## train a 3-D U-Net on a real MRI (about 5 minutes); results in out/
	$(BIN)/python -m examples.brain_segmentation --out out $(ARGS)

demo-full: $(VENV)/.examples  ## the same with a larger budget, beside trilinear and Flax's upsampling (about 20 minutes)
	$(BIN)/python -m examples.brain_segmentation --out out/full --steps 800 --features 12 \
		--upsampling transposed trilinear flax $(ARGS)

test: $(VENV)/.test  ## run the tests
	@mkdir -p $(VENV)/cache
	$(BIN)/python -m pytest -n 2 --dist worksteal --basetemp $(VENV)/cache/pytest $(ARGS)

test-slow: $(VENV)/.test  ## run the tests that take minutes: killed runs, a training, the other half of many cases
	@mkdir -p $(VENV)/cache
	$(BIN)/python -m pytest -n 2 --basetemp $(VENV)/cache/pytest -m slow $(ARGS)

lint: $(VENV)/.dev  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## check types
	$(BIN)/mypy

bench: $(VENV)/.bench  ## measure beside JAX, Flax, Keras, TensorFlow, PyTorch (two hours; ARGS=--help for parts)
	$(BIN)/python -m benchmarks $(or $(ARGS),--all)

bench-check: $(VENV)/.test  ## fail where "auto" takes a lowering that another one beats clearly
	$(BIN)/python -m benchmarks.check $(ARGS)

notebooks: $(VENV)/.notebooks  ## run the notebooks and store them executed (ARGS=--check: store nothing; ARGS=3: that one)
	$(BIN)/python -m notebooks.run $(ARGS)

docs: $(VENV)/.docs  ## build the documentation in out/docs, check its links and run its examples
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs
	$(BIN)/python docs/check_links.py out/docs
	$(BIN)/python docs/check_examples.py

release-check: $(VENV)/.release  ## build the sdist and the wheel, and test them in empty environments (ARGS=--help for parts)
	$(BIN)/python .ci/release_check.py $(ARGS)

fixtures: $(VENV)/.peers  ## record the values of TensorFlow and PyTorch anew
	$(BIN)/python -m tests.fixtures.record
	$(BIN)/python -m tests.fixtures.unets

clean:  ## remove everything that was made here
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: '$(PYTHON)' is not installed; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; an unchanged pyproject.toml installs nothing again.
$(VENV)/.examples $(VENV)/.bench $(VENV)/.dev $(VENV)/.peers $(VENV)/.notebooks $(VENV)/.docs $(VENV)/.release: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,examples]'
	@touch $@
