# Every target sets up what it needs in .venv, once. `make run PRESET=smollm2` runs on a real model, its texts from the
# hub or, with TEXTS_DIR=FOLDER, from files (data/README.md says which).
PYTHON ?= python3
PRESET ?= embedded
TORCH ?= 2.13.0
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
export PRESET
ifdef TEXTS_DIR
override TEXTS_DIR := $(abspath $(TEXTS_DIR))
export TEXTS_DIR
endif

.PHONY: run test coverage lab lint clean

run: .venv/ready
	$(BIN)/python -m helpers.publishing

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

coverage: .venv/ready  # the same tests under a tracer, which take half as long again, and the floors on coverage
	$(PYTEST) --cov --cov-report=
	$(BIN)/python tests/check_coverage.py

lab: .venv/ready
	$(BIN)/jupyter lab notebooks

lint: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: a later package would otherwise choose a build of its own.
.venv/ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt -e ".[harness]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .coverage .fast
