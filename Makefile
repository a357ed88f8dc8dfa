# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv itself.
PYTHON ?= python3
BIN := .venv/bin
# Idle threads that spin slow two cores down several times when two jobs share them.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-slow lint format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       teach the embedded model a new subject and open its report (minutes, no GPU)"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests marked slow as well"
	@echo "make lint       ruff and mypy"

# torch comes first and alone, so that nothing else chooses its build.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/finetune train recipes/configs/dreambooth-tiny.yaml output=runs/demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .cache runs .mypy_cache .ruff_cache .pytest_cache
