# From a fresh clone with nothing but Python >= 3.10 and a C++ compiler: `make demo`, `make test`.
#
#   PYTHON  the interpreter that the virtual environment is made with
#   VENV    the virtual environment, made when absent
#   TORCH   what to install where torch is not importable yet. PyPI's Linux wheel brings CUDA along; a smaller one:
#           make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   SUITE   what `make bench` measures: recurrent, layers, cells or recurrent-gpu
#   ARGS    more arguments: make test ARGS="tests/ops -k gru", make demo ARGS="--cell gru --hidden 512"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SUITE ?= recurrent
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
# One environment may serve several checkouts: each has its own stamps there.
STAMPS := $(VENV)/.stamps$(subst /,-,$(CURDIR))
KERNELS := $(shell find csrc -type f ! -name '*.cuh')
CPP := $(filter-out %.gen.h,$(shell find csrc tests bench -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu'))
EXTRAS := demo test bench dev

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format build clean distclean

help:
	@echo "make demo    train a character model with torch and with gradkernels, side by side"
	@echo "make test    run the tests"
	@echo "make bench   measure the recurrent kernels (SUITE=layers, SUITE=cells: others)"
	@echo "make lint    ruff, clang-format and mypy (make format rewrites)"
	@echo "make build   compile the kernels in place, as far as their sources changed"
	@echo "make clean   remove what was built (make distclean: the environment too)"

demo: build $(STAMPS)/demo
	@$(PY) -m gradkernels demo $(ARGS)

test: build $(STAMPS)/test
	$(PY) -m pytest $(ARGS)

bench: build $(STAMPS)/bench
	@$(PY) -m gradkernels bench $(SUITE) $(ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

build: $(STAMPS)/built

$(STAMPS)/venv:
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed: make PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	@$(PIP) -q 'setuptools>=77' pybind11 ninja
	@mkdir -p $(STAMPS) && touch $@

# Stamped only when there is something to show: with a compiler installed later, the next call builds.
$(STAMPS)/built: setup.py gradkernels/backends/cpu/toolchain.py $(KERNELS) $(STAMPS)/venv
	@GRADKERNELS_REQUIRE_COMPILED=$${GRADKERNELS_REQUIRE_COMPILED:-0} $(PY) setup.py -q build_ext --inplace
	@if ls gradkernels/_cpu_*.so >/dev/null 2>&1; then touch $@; fi

# Without isolation: the environment's own pybind11 and ninja, and no second compilation.
$(EXTRAS:%=$(STAMPS)/%): $(STAMPS)/%: pyproject.toml setup.py $(STAMPS)/venv | build
	@$(PIP) -q --no-build-isolation -e '.[$*]'
	@touch $@

clean:
	rm -rf build dist *.egg-info gradkernels/*.so $(STAMPS)/built .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find gradkernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
