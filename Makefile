# `make quickstart` and `make test` do all set-up themselves, in .venv, and are quick the second time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

DEVICE ?= cuda

.PHONY: help install quickstart test test-ci test-full test-slurm test-gpu bench-gpu gpu-bundle docs lint clean

help:
	@echo "make quickstart   corpus, teacher, four students and a report under runs/quickstart (ARGS=--fast: one to two minutes)"
	@echo "make test         the tests that take less than five seconds each, in ten minutes on two cores"
	@echo "make test-ci      the longer ones that CI runs too; make test-full: all, also those that take minutes"
	@echo "make test-slurm   requeues, lost nodes, arrays and studies on a SLURM that the tests start (Debian: slurm-wlm)"
	@echo "make test-gpu     what a GPU must do right, in minutes (DEVICE=cpu: all of it that a CPU can do)"
	@echo "make bench-gpu    all benchmarks of one GPU, into gpu_results; the same call goes on where it stopped"
	@echo "make gpu-bundle   what an offline GPU machine lacks, into .bundle, and the commands for it"
	@echo "make docs         pages of all modules, classes and functions from their docstrings, into build/api"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove the virtual environment"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "interstack needs Python 3.11 or newer; set PYTHON="'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(INSTALLED)

quickstart: install
	$(BIN)/interstack quickstart $(ARGS)

# One thread per process: the suite runs in two processes, and sums depend on the number of threads.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not ci" $(ARGS)

test-ci: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "ci and not slow" $(ARGS)

test-full: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slurm: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm $(ARGS)

test-gpu: install
	$(BIN)/python -m pytest -W default tests/gpu --device $(DEVICE) $(ARGS)

bench-gpu: install
	$(BIN)/interstack bench suite --output gpu_results/suite $(ARGS)

gpu-bundle: install
	$(BIN)/python -m experiments.launch.gpu_bundle $(ARGS)

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pdoc>=15,<17'
	$(BIN)/python -m pdoc --docformat google --output-directory build/api callbacks datamodules lightning_modules experiments

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV)
