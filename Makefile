# Every target sets up .venv first (./setup, which does nothing when it is up to date).
PY := .venv/bin/python
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
PYTEST := $(ONE_THREAD) $(PY) -m pytest -n 2 --timeout 300
CODE = $(wildcard run.py methods tasks runners kernels analysis scripts benchmarks)

.PHONY: help setup run test test-all lint format
help:
	@echo "make run       python run.py method=nacl budget=0.5 task=longbench; more overrides: make run ARGS='budget=0.25'"
	@echo "make test      the tests, without the slow ones and those that need a cluster"
	@echo "make test-all  all tests that this machine can run"
	@echo "make lint      ruff check, ruff format --check, mypy"

setup:
	@./setup

run: setup
	$(PY) run.py method=nacl budget=0.5 task=longbench $(ARGS)

test: setup
	$(PYTEST) -m "not slow and not slurm" $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(CODE)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
