# For a fresh machine with Python 3.11, pip and git: `make demo`, `make audit` and `make test`.
PYTHON ?= python3.11
EXTRAS ?= tests
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo audit test lint bench clean

demo: $(VENV)/demo.installed
	$(BIN)/flexolmo demo

audit: $(VENV)/privacy.installed
	$(BIN)/flexolmo audit twin

test: $(VENV)/$(EXTRAS).installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: $(VENV)/reference.installed
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.profile

lint: $(VENV)/linters.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR tpu_scripts/*.sh

# One stamp per set of extras; made again when the dependencies change.
$(VENV)/%.installed: setup.cfg pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".$(if $(filter demo,$*),,[$*])"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
