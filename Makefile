# Two commands do everything on a fresh machine with Python 3.11+, make and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# two processes of one thread each, as more threads than cores wait for each other; a file to one of them, for its fixtures
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
unexport PYTHONDONTWRITEBYTECODE  # the many processes that tests start would each compile the whole library

.PHONY: help demo test check slow bench bench-gpu quality clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# torch first and by its exact version: what depends on it then takes the build that is there.
.venv/base: constraints.txt pyproject.toml
	@echo "setting up .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e '.[sd,train,data,viz]'
	@touch $@

# smalldiffusion is a reference of the tests, clip-anytorch brings them CLIP's vocabulary; torchvision, which both ask for, has no
# build for every platform.
.venv/dev: .venv/base
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps smalldiffusion clip-anytorch
	@touch $@

demo: .venv/base  ## train on real images, make pictures, write runs/demo (two minutes of training)
	@$(BIN)/nanodiffusion demo

test: .venv/dev  ## the default test suite: offline, CPU
	@$(PYTEST)

check: .venv/dev  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

slow: .venv/dev  ## the tests that take minutes
	@$(PYTEST) -m slow

bench: .venv/dev  ## speed and memory against peers, both sides in one run; not SD and tld-36
	@$(BIN)/python -m benchmarks.bench

bench-gpu: .venv/dev  ## the same on a GPU
	@$(BIN)/python -m benchmarks.bench --gpu

quality: .venv/dev  ## Fashion-MNIST: 15 CPU minutes of ours and of smalldiffusion's U-Net, Fréchet distances
	@$(BIN)/python -m benchmarks.quality

clean:  ## remove the environment and caches, keep runs
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
