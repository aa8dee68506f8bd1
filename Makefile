# For a fresh machine with a supported Python and git: `make demo`, `make audit` and `make test`.
SUPPORTED ?= 3.14 3.13 3.12 3.11
EXTRAS ?= tests
VENV ?= .venv
BIN := $(VENV)/bin

# The newest supported Python, on the PATH, under pyenv, or called `python3`; it must be able to make a virtual
# environment. PYTHON=... names another one.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
CANDIDATES := $(foreach v,$(SUPPORTED),python$(v) $(wildcard $(PYENV)/$(v).*/bin/python$(v))) python3 python
IS_SUPPORTED := import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] not in "$(SUPPORTED)".split())
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(IS_SUPPORTED)' 2>/dev/null && echo "$$p" && break; done)
NO_PYTHON := no Python with venv among $(SUPPORTED) on this machine (looked for $(CANDIDATES)); \
	install one (on Debian or Ubuntu with its package python3-venv), or name it: make PYTHON=/path/to/python

# Where `make lint` looks for the phrases of .ci/words.txt, each with what to write instead.
PROSE := Makefile setup.cfg $(wildcard *.md) benchmarks configs docs findings flexolmo_jax notebooks tests tpu_scripts

# Tests of each kind that a second Python and JAX have to pass: parity, training, packages, decoding, the commands.
SUBSET := tests/interop tests/training/test_training.py tests/federation/test_package.py \
	tests/inference/test_generate.py tests/test_model.py

.PHONY: demo audit test test-subset test-wheel lint docs map bench clean

demo: $(VENV)/demo.installed
	$(BIN)/flexolmo demo

audit: $(VENV)/privacy.installed
	$(BIN)/flexolmo audit twin

test: $(VENV)/$(EXTRAS).installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-subset: $(VENV)/$(EXTRAS).installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(SUBSET)

# What pip installs from a wheel, used from another folder: an anchor, a private expert, their merge.
test-wheel: $(VENV)/tests.installed
	rm -rf build/wheel
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) "$$(echo build/wheel/*.whl)[privacy]"
	bash tests/wheel.sh build/wheel/venv

bench: $(VENV)/reference.installed
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.profile

lint: $(VENV)/linters.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell -D .ci/words.txt -r "(?i)(?<![a-z])($$(sed 's/->.*//' .ci/words.txt | paste -sd '|' -))(?![a-z])" \
	  --skip '*.json,*.jsonl,*.txt,*.svg,*.png,*LICENCES.md,__pycache__' $(PROSE)
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR benchmarks/*.sh tpu_scripts/*.sh tests/*.sh

# The site: pages of docs/, and the public API from its docstrings. Fails where a link leads nowhere.
docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# The map of the code in CONTRIBUTING.md, from the first line of each module.
map:
	$(BIN)/python docs/map.py

# The versions that are tested with the Python of the virtual environment.
CONSTRAINTS = constraints/python$(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

$(BIN)/python:
	$(if $(PYTHON),,$(error $(NO_PYTHON)))
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; repeated when the dependencies change.
$(VENV)/%.installed: setup.cfg pyproject.toml $(wildcard constraints/*.txt) | $(BIN)/python
	@echo "installing into $(VENV) with $$($(BIN)/python --version); this takes a minute or two"
	@$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(if $(filter demo,$*),trace,$*)]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
