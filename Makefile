# VENV names the environment: ours (.venv, made on demand), or one that several clones share. A
# shared one only receives the dependencies; PYTHONPATH makes each clone run its own code.
VENV ?= .venv
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON := $(VENV)/bin/python
DEPENDENCIES := $(shell sed '/^\[tool/,$$d' pyproject.toml | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.padst-exp-$(DEPENDENCIES)
REQUIREMENTS = import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")

export PYTHONPATH := src:kernels

.PHONY: help setup fmt lint types test test-slow test-thorough fuzz kills smoke demo experiments bench test-compile docs-test test-extras test-gpu ci clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /:/' | column -t -s ':'

$(STAMP):
	test -x $(PYTHON) || python3 -m venv $(VENV)
ifeq ($(VENV),.venv)
	$(PYTHON) -m pip install --editable ".[dev]"
else
	$(PYTHON) -c '$(REQUIREMENTS)' | $(PYTHON) -m pip install --requirement /dev/stdin
endif
	touch $@

setup: $(STAMP)  ## make the environment (every target does so when it is missing)

fmt: $(STAMP)  ## format the code and fix what ruff can fix
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint: $(STAMP)  ## ruff, formatting, import contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo

types: $(STAMP)  ## mypy --strict
	$(PYTHON) -m mypy

test: $(STAMP)  ## fast tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal -m "not slow and not thorough and not gpu and not docs"

test-slow: $(STAMP)  ## slow tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 3 --dist worksteal -m "slow and not gpu"

test-thorough: $(STAMP)  ## tests that take a minute each: clusters, killed sweeps, every data worker
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal -m thorough

kills: $(STAMP)  ## kill 60 trainings, at writes and at first use of caches too; end 40 by SIGTERM
	KILLS=60 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 tests/engine/test_kills.py
	ENDINGS=20 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 tests/test_endings.py -k survive_sigterm

test-compile: $(STAMP)  ## compile every Triton kernel ahead of time for sm_80 and sm_90: 4 minutes
	PADST_COMPILE_ALL=1 $(PYTHON) -m pytest -q -n 2 tests/kernels/test_triton_compile.py

docs-test: $(STAMP)  ## run every command of every page of docs/
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 -m docs

EXTRAS := .venv-extras
EVERYTHING = import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["dependencies"], *sum(project["optional-dependencies"].values(), []), sep="\n")
test-extras:  ## tests of the optional libraries, in an environment of their own that has all of them
	test -x $(EXTRAS)/bin/python || python3 -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -c '$(EVERYTHING)' | $(EXTRAS)/bin/python -m pip install --quiet --requirement /dev/stdin
	OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -q -n 2 -m "not gpu" tests/engine/test_trackers.py \
		tests/integrations tests/inference/test_programs.py tests/packaging/test_hub_kernels.py tests/data/test_shards.py

test-gpu: $(STAMP)  ## check every kernel on the GPU of this machine
	$(PYTHON) -m pytest -q -m gpu

FUZZ_DRAWS ?= 2000
fuzz: $(STAMP)  ## 2,000 command lines and files that are probably wrong: most of an hour
	FUZZ_DRAWS=$(FUZZ_DRAWS) OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q tests/fuzz

smoke: $(STAMP)  ## train a few steps and evaluate, in a throw-away folder
	runs=$$(mktemp -d); trap 'rm -rf "$$runs"' EXIT; \
	$(PYTHON) -m padst_exp.train name=smoke runs="$$runs" trainer.steps=8 logger=none; \
	$(PYTHON) -m padst_exp.evaluate run="$$runs/smoke"

demo: $(STAMP)  ## train a sparse ViT on real data that needs no download
	$(PYTHON) -m padst_exp.train model=vit structure=nm sparsity=0.9

experiments: $(STAMP)  ## every experiment at demo size, seed 0: hours; goes on where it was
	$(PYTHON) -m padst_exp.train -m 'experiment=glob(*)' scale=demo seed=0 logger=none

bench: $(STAMP)  ## measure what has a limit, and speed beside dense: hours on 2 cores
	$(PYTHON) scripts/bench_framework.py
	$(PYTHON) scripts/bench_accuracy.py
	for suite in layers fan_in convolutions model_inference model_train resnet_train memory; do \
		$(PYTHON) -m padst_exp.bench suite=$$suite || exit; done

ci: lint types test smoke  ## what a change must pass

clean:  ## remove the caches and our environment, never runs/
	rm -rf .venv .venv-extras dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
