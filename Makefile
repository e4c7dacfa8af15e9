# Every target sets up .venv first (./setup, which does nothing when it is up to date).
PY := .venv/bin/python
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
# loadfile: what a file's tests share is made by one of the two processes only
PYTEST := $(ONE_THREAD) $(PY) -m pytest -n 2 --dist loadfile --timeout 300
CODE = $(wildcard run.py kvfrontier methods tasks runners kernels analysis benchmarks hydra_plugins package)

.PHONY: help setup run model test test-slurm test-numeric test-all lint format docs peers
help:
	@echo "make run       make model if that can be had now, then python run.py method=nacl budget=0.5 task=longbench on 40"
	@echo "               samples; on all of them with overrides of one's own: make run ARGS='budget=0.25'"
	@echo "make model     brings SmolLM2-135M-Instruct (98 MB, no account) into the user's cache folder, for model=smollm2-135m"
	@echo "make test      the tests, without the slow ones and those that need a cluster"
	@echo "make test-slurm  sweeps on a SLURM of one node, started for the tests; skipped without slurm-wlm and munge"
	@echo "make test-numeric  kernels, methods and binding again under each choice of instructions and of threads (18)"
	@echo "make test-all  all tests that this machine can run"
	@echo "make lint      ruff check, ruff format --check, mypy"
	@echo "make docs      the documents as a site, build/site/index.html; every link in them leads somewhere"
	@echo "make peers     ask kvpress again, in an environment of its own, and compare; the answers in tests/peers/data stay"

setup:
	@./setup

# 40 samples of the real model take less than three minutes on two cores, its conversion included
run: setup
	@$(PY) -m runners.settings.auto
	$(PY) run.py method=nacl budget=0.5 task=longbench $(if $(ARGS),$(ARGS),task.limit=40)

model: setup
	@$(PY) -m runners.engine.sources.fetched

test: setup
	$(PYTEST) -m "not slow and not slurm" $(ARGS)

test-slurm: setup
	$(ONE_THREAD) $(PY) -m pytest --timeout 1200 -m slurm tests/slurm $(ARGS)

# ARGS: single combinations, such as default,Haswell,1; one or two threads are part of each
test-numeric: setup
	$(ONE_THREAD) $(PY) -m tests.numeric $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)
	$(ONE_THREAD) $(PY) -m tests.numeric

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(CODE)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: setup .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

.venv/docs-installed: pyproject.toml constraints.txt
	$(PY) -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

peers: setup .venv-peers/installed
	$(ONE_THREAD) $(PY) -m tests.peers.inputs
	$(ONE_THREAD) .venv-peers/bin/python tests/peers/ask_kvpress.py
	$(PYTEST) -n 0 tests/peers

.venv-peers/installed: tests/peers/requirements.txt
	$(PY) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install -q -r $<
	touch $@
