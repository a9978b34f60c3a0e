# Everything runs from .venv, made on first use. Set PIP_INSTALL_ARGS for other package sources, PYTHON for another
# interpreter, TEST_PROCESSES for the cores that tests may use.
PYTHON ?= python3
PIP_INSTALL_ARGS ?=
TEST_PROCESSES ?= 2
FUZZ_SEED ?= 0
FUZZ_COUNT ?= 10000
FUZZ_START ?= 0
BIN := .venv/bin
# Twice: once leaves pip's warnings, such as that of an extra that torchtune asks of huggingface_hub and that is gone.
QUIET := --quiet --quiet

.PHONY: setup demo test test-long lint docs fuzz clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt llama_lora_recipes.pth
	@echo "installing into .venv: about 2 GB, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check $(PIP_INSTALL_ARGS) -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the packages for tests into .venv: about 0.4 GB, a minute"
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check $(PIP_INSTALL_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	@echo "installing the packages for the documentation into .venv: about 0.1 GB"
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check $(PIP_INSTALL_ARGS) -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/installed-docs
	@$(BIN)/zensical build --strict --clean >.venv/docs.log 2>&1 || { cat .venv/docs.log; exit 1; }
	@echo "the documentation is in site/index.html"

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

# Damaged and hostile inputs, each refused in one line or read as it is: FUZZ_SEED, FUZZ_COUNT, and FUZZ_START to go on.
fuzz: .venv/installed-dev
	$(BIN)/python -m tests.support.fuzz --seed $(FUZZ_SEED) --count $(FUZZ_COUNT) --start $(FUZZ_START)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
