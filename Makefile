# make demo     set everything up and see a frozen policy fail, then succeed when it is steered
# make test     set everything up and run every check, both legs below (what CI runs)
# make core     the leg on Python 3.11: ruff, types, doors, tests
# make lerobot  the leg on Python 3.12, in an environment of its own: what needs LeRobot
# All are safe to run again, and after each other.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.counterflow-installed

# LeRobot needs Python 3.12 and another torch. An absolute LEROBOT_VENV is kept between clones, as a cache of CI's.
PYTHON312 ?= $(shell sh scripts/python312.sh)
LEROBOT_VENV ?= .venv-lerobot
LEROBOT_BIN := $(LEROBOT_VENV)/bin
LEROBOT_READY := $(LEROBOT_VENV)/.counterflow-installed
LEROBOT_EXTRAS := smolvla,pi,multi-task-dit,diffusion,dataset,evaluation,core-scripts

# LIBERO's meshes and textures, for its tests; without them those are skipped.
COUNTERFLOW_LIBERO_ASSETS ?= $(abspath $(wildcard ../shared/libero_assets))
export COUNTERFLOW_LIBERO_ASSETS

.PHONY: help setup rendering browser demo test core lerobot lint types doors check-python check-python312 clean

help:
	@sed -n 's/^# //p' Makefile

check-python:
	@test -n "$(PYTHON)" || { echo "No python3 was found. Install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11. Say which one to use: make demo PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) can't make virtual environments. Debian: apt-get install python3-venv"; exit 1; }

# The stamp is written last: an installation that was interrupted is done again.
$(READY): pyproject.toml constraints.txt requirements-libero.txt | check-python
	@echo "== virtual environment: $(VENV) (about a minute, 1.5 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement requirements-libero.txt
	@touch $@

setup: $(READY) rendering

rendering: $(READY)
	@echo "== system libraries for rendering"
	@sh scripts/rendering.sh $(BIN)/python

browser:
	@echo "== a browser for the tests of the cockpit's page"
	@sh scripts/browser.sh

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

# Side by side: the second leg mostly waits for its downloads.
test:
	@$(MAKE) --no-print-directory -j 2 --output-sync=line core lerobot

core: setup browser lint types doors
	@echo "== tests"
	@$(BIN)/pytest -n auto

check-python312:
	@test -n "$(PYTHON312)" || { echo "No Python 3.12 was found, which LeRobot needs. Install it (Debian: apt-get install python3.12 python3.12-venv; pyenv install 3.12), or say where it is: make lerobot PYTHON312=/path/to/python3.12"; exit 1; }
	@"$(PYTHON312)" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "$(PYTHON312) is not a Python 3.12 that can make virtual environments. Say which one to use: make lerobot PYTHON312=/path/to/python3.12"; exit 1; }

$(LEROBOT_READY): pyproject.toml constraints-lerobot.txt requirements-libero.txt plugins/lerobot_policy_counterflow/pyproject.toml | check-python312
	@echo "== virtual environment for LeRobot: $(LEROBOT_VENV) (one to four minutes, 6 GB)"
	@"$(PYTHON312)" -m venv $(LEROBOT_VENV)
	@$(LEROBOT_BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints-lerobot.txt \
		--editable '.[serve,libero-simulator]' --editable plugins/lerobot_policy_counterflow 'lerobot[$(LEROBOT_EXTRAS)]' pytest hypothesis
	@$(LEROBOT_BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement requirements-libero.txt
	@touch $@

# Where LeRobot is missing these tests fail here, and are skipped in the other leg. The path comes first, so that an
# environment that is kept between clones tests this one.
lerobot: $(LEROBOT_READY) rendering
	@echo "== tests of what needs LeRobot"
	@COUNTERFLOW_LEROBOT=required HF_HUB_OFFLINE=1 PYTHONPATH=src:plugins/lerobot_policy_counterflow/src \
		$(LEROBOT_BIN)/python -m pytest tests/lerobot

clean:
	rm -rf $(VENV) .venv-lerobot demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
