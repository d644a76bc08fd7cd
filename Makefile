# make demo    a model that learns to win at tic-tac-toe, from nothing, on a laptop
# make test    the whole suite
# make check   lint, types and tests, as continuous integration runs them

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2

# Where torch's CPU build is, if it answers within two seconds: PyPI's build for Linux brings gigabytes of CUDA.
# `make TORCH_INDEX= …` takes whatever pip finds on its own; `make TORCH_INDEX=URL …` another index.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(origin TORCH_INDEX), undefined)
TORCH_INDEX = $(shell $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=2)' \
	2>/dev/null && echo $(CPU_INDEX))
endif
INSTALL = .venv/bin/pip install --quiet -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX))

.PHONY: demo test lint types check clean

demo: .venv/.installed
	.venv/bin/tropism train recipes/tictactoe.yaml --fresh

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n $(JOBS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.installed-dev
	.venv/bin/mypy

check: lint types test

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed; name it: make PYTHON=python3.12"; exit 1; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch included, some minutes on a slow line)"
	$(INSTALL) -e '.[games,tasks]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
