# Targets a user needs: run, test, check, ui. Everything lives in .venv; delete it to start afresh.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SPACE ?= search_spaces/quickstart.yaml
ROOT ?= results

.PHONY: run test test-fast check format ui plan clean

run: $(VENV)/.installed
	$(BIN)/adgrid run $(SPACE) --root $(ROOT)

plan: $(VENV)/.installed
	$(BIN)/adgrid plan $(SPACE) --root $(ROOT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not ray and not data"

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(VENV)/.installed
	$(BIN)/adgrid ui --root $(ROOT)

clean:
	rm -rf $(VENV) $(ROOT)

# The exact versions in constraints.txt are the ones the tests ran with.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quickstart]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quickstart,dev]"
	touch $@
