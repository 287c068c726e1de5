# One set-up for all targets: a virtual environment with pinned versions and the library built in place.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: quickstart test test-full lint format bench static build clean

quickstart: build
	$(BIN)/lmengine quickstart

test: build
	$(BIN)/python -m pytest

test-full: build
	$(BIN)/python -m pytest --override-ini addopts="-q --strict-markers"

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu')
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu')

bench: build
	$(BIN)/python -m pytest bench
	$(BIN)/python -m bench.report
	for readme in README.md README.zh-CN.md; do $(BIN)/python -m bench.report --readme $$readme; done

static: build
	$(BIN)/python -m bench.static

build: $(VENV)/built

$(VENV)/installed: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .import_linter_cache
	find . -name '*.so' -path './lmengine/*' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
