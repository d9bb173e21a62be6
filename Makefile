# `make train` and `make test` set everything up by themselves; PYTHON chooses the interpreter for the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=

.PHONY: setup train test test-all lint bench clean

setup: $(VENV)/.installed

# constraints.txt pins torch: a bare `torch` would take a CUDA build of several GB on machines without a GPU too.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "make setup: no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job: documents -> tokenizer -> shards -> training -> validation -> export -> a continuation.
train: setup
	$(BIN)/python launch/quickstart.py $(if $(DATA),--data $(DATA))

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for f in benchmarks/*.py; do echo "== $$f"; $(BIN)/python -m benchmarks.$$(basename $$f .py) || exit 1; done

clean:
	rm -rf runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis
