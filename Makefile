# make demo   set up everything, then the whole loop in a scratch clone (.demo/)
# make test   set up everything, then the tests
# make check  ruff, pyright, generated files, architecture
# make setup SYSTEM_TORCH=1   use the torch that your Python already has (a CUDA build, say)

PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
SYSTEM_TORCH ?=
DEMO_ARGS ?=
TEST_ARGS ?= -n 2

.PHONY: help setup demo test test-slow check generate clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(DEV_STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv found: install one (apt-get install python3 python3-venv), or make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)

$(VENV)/constraints.txt: constraints.txt $(BIN)/python
ifneq ($(SYSTEM_TORCH),)
	@$(BIN)/python -c 'import torch; print("using torch", torch.__version__)' 2>/dev/null || { echo "SYSTEM_TORCH=1, but $(PYTHON) has no torch" >&2; exit 2; }
	@grep -viE '^(torch|numpy|sympy|networkx|fsspec|filelock|jinja2|typing_extensions|mpmath)==' constraints.txt > $@
else
	@cp constraints.txt $@
endif

$(RUN_STAMP): pyproject.toml $(VENV)/constraints.txt
	@echo "installing (once; torch is the large one)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(RUN_STAMP)
	@$(BIN)/autoresearch demo $(if $(SEED),--seed $(SEED)) $(DEMO_ARGS)

test: $(DEV_STAMP)
	$(BIN)/python -m pytest $(TEST_ARGS)

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m harness.generate --check
	$(BIN)/python -m pytest -q tests/test_architecture.py

generate: $(DEV_STAMP)
	$(BIN)/python -m harness.generate

clean:
	rm -rf $(VENV) .demo .pytest_cache .ruff_cache .hypothesis
