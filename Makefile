# make demo   set everything up and see a frozen policy fail, then succeed when it is steered
# make test   set everything up and run every check (what CI runs)
# Both are safe to run again, and after each other.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.counterflow-installed

.PHONY: help setup rendering demo test lint types doors check-python clean

help:
	@sed -n 's/^# //p' Makefile

check-python:
	@test -n "$(PYTHON)" || { echo "No python3 was found. Install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11. Say which one to use: make demo PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) can't make virtual environments. Debian: apt-get install python3-venv"; exit 1; }

# The stamp is written last: an installation that was interrupted is done again.
$(READY): pyproject.toml constraints.txt | check-python
	@echo "== virtual environment: $(VENV) (about a minute, 1.5 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(READY) rendering

rendering: $(READY)
	@echo "== system libraries for rendering"
	@sh scripts/rendering.sh $(BIN)/python

demo: setup
	@echo "== the demo: base policy against Flow Reversal Steering (about two minutes)"
	@$(BIN)/counterflow demo

lint: $(READY)
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@echo "== types"
	@$(BIN)/mypy

doors: $(READY)
	@echo "== doors between the rooms"
	@$(BIN)/lint-imports

test: setup lint types doors
	@echo "== tests"
	@$(BIN)/pytest -n auto

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
