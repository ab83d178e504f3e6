# `make demo` and `make test` need Python >= 3.11 with venv and pip, no more.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test lint mutants clean

demo: .venv/installed
	$(BIN)/python -m experiments.demo.run --config=configs/quickstart.py \
	  --workdir=runs/demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist=worksteal --durations=15

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Plants bugs one by one and shows that the suite kills each.
mutants: .venv/installed-dev
	$(BIN)/python -m tests.mutants

.venv/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
