# Every target sets up what it needs: .venv is made on the first call and left alone while pyproject.toml stays as it is.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check bench clean

demo: .venv/.run
	$(BIN)/lorikeet demo $(if $(ONCE),--once)

test: .venv/.dev
	$(BIN)/pytest

test-slow: .venv/.dev
	$(BIN)/pytest -m slow

check: .venv/.dev
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check --diff src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/pytest tests/test_walls.py

bench: .venv/.dev
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/serving.py --peer peft --case base one all --repeats 3

.venv/.run: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	scripts/install_postgres.sh
	scripts/install_azurite.sh
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
