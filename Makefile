# make demo | make test | make test-all | make attack | make lint | make docs | make clean: each needs Python 3.11 or later, make and a package index.
#
# `make test` samples the large grids of cases and takes at most ten minutes on two cores; `make test-all` runs every case.
# `make attack` takes about an hour: 1,000 fuzzed recipes, 500 damaged folders, 50 kills, full disks, damaged work (docs/integrity.md).
#
# TORCH is installed first, by its plain name, so that you choose the build: `make demo TORCH=torch` takes the newest one,
# `make demo TORCH=torch==2.9.1` another release, and an index of your own (pip's configuration) another accelerator.
# If torch is in the environment already and fits, nothing is downloaded. PYTHON and VENV can be set the same way.

TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: demo test test-all attack lint docs format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/reelquant demo

test test-all: export OMP_NUM_THREADS = 1  # WORKERS processes share the cores
test-all: export REELQUANT_TEST_ALL = 1  # read by tests/grids.py
test test-all: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

attack: export OMP_NUM_THREADS = 1
attack: $(VENV)/.installed-dev
	$(BIN)/python -m tests.attack.long

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright
	$(BIN)/pyright -p pyright-strict.json

docs: export NO_MKDOCS_2_WARNING = 1  # an advertisement of the theme
docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Stamps: a second run installs nothing until pyproject.toml changes.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "reelquant needs Python 3.11 or later; none found, set PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.python
	$(PIP) install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.python
	$(PIP) install -e ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf build dist out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
