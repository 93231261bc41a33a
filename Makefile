# The two commands that matter: `make demo` runs a whole cycle, `make test` runs the tests. Both set up what is missing.
ACCEL   ?= cpu
CYCLE   ?= $(shell date -u +%G-W%V)
CYCLES  ?= 1
PYTHON  ?= python3.11
VENV    := .venv
BIN     := $(VENV)/bin
LOCK    := requirements-$(ACCEL).lock
READY   := $(VENV)/.ready-$(ACCEL)
# uv does not read pip's settings; a CPU torch comes from pip's find-links folder where one is set, else from its own index.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
TORCH_cpu := --torch-backend cpu
endif
TORCH_cuda := --torch-backend auto
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c $(LOCK) $(TORCH_$(ACCEL))

.PHONY: help demo test test-all test-O up label-studio bench lint setup lock clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-zA-Z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## install the locked environment into .venv (ACCEL=cuda on a GPU machine)

$(READY): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	@rm -f $(VENV)/.ready-*
	$(INSTALL) -e '.[$(ACCEL),airflow,demo,test]'
	@touch $@

demo: $(READY) ## one whole cycle through the Airflow DAG on this machine, and its A/B week (CYCLES=3: three weeks)
	$(BIN)/flywheel demo --cycle $(CYCLE) --cycles $(CYCLES)

up: $(READY) ## Airflow and MLflow on loopback, the DAG ready for a manual trigger
	$(BIN)/flywheel up

test: $(READY) ## the tests
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(READY) ## the tests, slow ones included
	$(BIN)/python -m pytest

test-O: $(READY) ## the tests under python -O, in every process they start (TESTS=tests/core: a part of them)
	PYTHONOPTIMIZE=1 $(BIN)/python -m pytest -m 'not slow' $(TESTS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

label-studio: $(READY) ## the annotation adapter against a real Label Studio server, in an environment of its own
	$(PYTHON) -m venv .venv-labelstudio
	$(BIN)/uv pip install --quiet --python .venv-labelstudio/bin/python 'label-studio>=1.23,<2'
	FLYWHEEL_LABEL_STUDIO=$(CURDIR)/.venv-labelstudio/bin/label-studio $(BIN)/python -m pytest tests/annotation/test_label_studio_server.py

bench: $(READY) ## the benchmarks, each against its peer
	$(INSTALL) -e '.[bench]'
	$(BIN)/python -m benchmarks

lock: $(READY) ## resolve the environments again
	$(BIN)/uv pip compile pyproject.toml --quiet --python-version 3.11 --extra cpu --extra airflow --extra demo --extra test \
		--extra bench $(TORCH_cpu) --no-emit-index-url --no-annotate --no-header -o requirements-cpu.lock
	$(BIN)/uv pip compile pyproject.toml --quiet --python-version 3.11 --extra cuda --extra airflow --extra demo --extra test \
		--extra bench --no-emit-index-url --no-annotate --no-header -o requirements-cuda.lock

clean: ## remove the environment and local state
	rm -rf $(VENV) .venv-labelstudio .flywheel
