# What a user and a developer type. PYTHON chooses the interpreter, VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
TPU_VENV ?= .venv-tpu
WORKDIR ?= runs/digits
BIN := $(VENV)/bin

.PHONY: help demo test test-tpu-compile test-launch lint format bench chaos clean

help:
	@echo "make demo    train DyDi-LiT on handwritten digits, sample and score it (CPU, minutes)"
	@echo "make test    install what tests need and run them all"
	@echo "make test-tpu-compile  compile the kernels and the train step for TPUs that are not there"
	@echo "make test-launch  the launch scripts, on a Slurm that runs here (Debian, as root: installs it)"
	@echo "make lint    ruff (format and lint) and mypy"
	@echo "make format  let ruff format the code"
	@echo "make bench   the benchmarks that README's figures come from"
	@echo "make chaos   kill a run 20 times, damage its checkpoints, compare it with one left alone"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

$(TPU_VENV)/.installed-tpu: requirements-tpu.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-tpu.txt
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m dydilit_jax.train --config=configs/digits.py --workdir=$(WORKDIR)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/launch/test_slurm.py

test-tpu-compile: $(TPU_VENV)/.installed-tpu
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -n 2 tests/tpu_compile

# Installs what it needs where it may: Debian's packages, by root.
test-launch: $(VENV)/.installed-dev
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  $(BIN)/python -m tests.launch.slurm_cluster --install; \
	fi
	$(BIN)/python -m pytest tests/launch/test_slurm.py tests/launch/test_lint.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.projection
	$(BIN)/python -m benchmarks.depthwise

chaos: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.chaos

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache
