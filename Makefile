# make demo and make test do all the set-up themselves: .venv, PyTorch, the native extension. The second time they skip it.
#   PYTHON=python3.12            the Python that .venv is made with (3.11 to 3.13)
#   RESNET_FAST_BUILD=auto       auto, cuda, cpu or none: see setup.py
#   EMULATE_AMX=marked           tests that run on emulated AMX where there is none: marked (`amx`), all or, if empty, none
#   DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS   passed on, as in: make test PYTEST_ARGS="-k bn_act -x"
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build demo test gate lint bench clean FORCE

VENV := .venv
BIN := $(VENV)/bin
export RESNET_FAST_BUILD ?= auto
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# One thread a worker: the workers are the parallelism, and oversubscribed OpenMP threads spin.
PYTEST_WORKERS ?= auto
EMULATE_AMX ?= marked
# pytest exits with 5 where it runs nothing: a failure, unless PYTEST_ARGS chose tests and these are not among them.
NONE_CHOSEN := [ $$? -eq 5 -a -n "$(PYTEST_ARGS)" ]
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --maxprocesses=8 --dist worksteal

help: ## this list
	@echo "resnet_fast: fused residual blocks for PyTorch ResNets"
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

# Stamps, not the folders: a step that was killed leaves none behind and runs again.
$(VENV)/.venv-stamp:
	@scripts/setup.sh venv
	@touch $@

$(VENV)/.tools-stamp: $(VENV)/.venv-stamp constraints.txt
	@scripts/setup.sh tools
	@touch $@

# Changes, and so rebuilds, when another RESNET_FAST_BUILD is asked for.
$(VENV)/.build-mode: $(VENV)/.tools-stamp FORCE
	@echo "$(RESNET_FAST_BUILD)" | cmp -s - $@ || echo "$(RESNET_FAST_BUILD)" > $@

$(VENV)/.build-stamp: $(VENV)/.tools-stamp $(VENV)/.build-mode pyproject.toml setup.py $(CSRC)
	@scripts/setup.sh build
	@touch $@

venv: $(VENV)/.tools-stamp ## .venv with PyTorch and the build tools

build: $(VENV)/.build-stamp ## the above, and resnet_fast installed editable with its native extension

demo: build ## stock and fast ResNets on real photos: same answers, and how fast
	@$(BIN)/resnet-fast demo $(DEMO_ARGS)

test: build ## the test suite: the GPU kernels in Triton's interpreter, everything else, then AMX kernels on CPUs without
	@TRITON_INTERPRET=1 $(PYTEST) $(PYTEST_ARGS) tests/interpreted || $(NONE_CHOSEN)
	@$(PYTEST) $(PYTEST_ARGS) --ignore tests/interpreted tests || $(NONE_CHOSEN)
	@[ -z "$(EMULATE_AMX)" ] || RESNET_FAST_EMULATE_AMX=$(EMULATE_AMX) \
		$(PYTEST) $(PYTEST_ARGS) --ignore tests/interpreted tests || $(NONE_CHOSEN)

gate: build ## every kernel the package can start, compiled for sm_80, sm_90 and sm_100; the GPU campaign rehearsed
	@RESNET_FAST_GATE=all $(PYTEST) $(PYTEST_ARGS) tests/test_compile_gate.py tests/test_compile_gate_cuda.py tests/test_campaign.py

bench: build ## the pytest-benchmark files under benchmarks/
	@$(BIN)/python -m pytest --benchmark-only $(BENCH_ARGS) benchmarks

lint: build ## ruff check and ruff format --check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean: ## removes build products and .venv
	rm -rf $(VENV) build dist *.egg-info resnet_fast/_C.*so* .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
