# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# where a worker crashes the run ends: with another in its place, pytest-xdist may wait for ever
ENDS := --max-worker-restart 0
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export NO_MKDOCS_2_WARNING ?= 1

.PHONY: help install demo test test-slow test-all lint docs lock format check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	# apart: transformers imports torchao wherever it finds it, and on a CPU that prints warnings into every command
	$(PIP) --no-deps --target $(VENV)/torchao torchao
	@touch $(VENV)/.runtime $@

install: $(VENV)/.runtime  ## a virtual environment with the package in it
demo: $(VENV)/.runtime  ## draw a catalogue, index it, search it four ways; writes demo/
	$(BIN)/mm-retriever demo --out demo

test: $(VENV)/.dev  ## the tests, offline, on the CPU, in five minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 $(ENDS) --dist loadscope

test-slow: $(VENV)/.dev  ## the slow tests: full size, kills, power cuts, a real Milvus server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses 3 $(ENDS) --dist loadgroup

test-all: test test-slow  ## both

lint: $(VENV)/.dev  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev  ## the documentation, offline, into site/; open site/index.html
	$(BIN)/mkdocs build --clean --quiet

lock: $(VENV)/.dev  ## constraints.lock: the versions of constraints.txt with the hashes of their files
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --constraint constraints.txt \
		--extra all --no-annotate --no-header pyproject.toml --output-file constraints.lock

format: $(VENV)/.dev  ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint docs test-all  ## everything continuous integration runs

clean:  ## remove what the other commands made
	rm -rf $(VENV) demo dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
