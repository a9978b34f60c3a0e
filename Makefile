# Everything runs from .venv, made on first use. Set PIP_INSTALL_ARGS for other package sources, PYTHON for another
# interpreter, TEST_PROCESSES for the cores that tests may use.
PYTHON ?= python3
PIP_INSTALL_ARGS ?=
TEST_PROCESSES ?= 2
BIN := .venv/bin

.PHONY: setup demo test test-long lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt llama_lora_recipes.pth
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_ARGS) -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m examples.tiny_llama.demo

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile -m "not slow"

test-long: lint
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
