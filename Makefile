# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs, and is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint fast bench clean

demo: $(READY)  ## a student learns from a teacher on its own samples, on the CPU, in minutes
	$(BIN)/opd demo --overwrite

test: $(READY)  ## every test
	$(BIN)/python -m pytest

fast: $(READY)  ## the tests that end in under two minutes
	$(BIN)/python -m pytest -m "not slow"

check: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)  ## the fused loss against other libraries', in an environment made for them; an hour
	$(BIN)/python -m benchmarks kernels

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "opd needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the rest into $(VENV): a minute or more, once.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:  ## remove the virtual environment and run folders
	rm -rf $(VENV) runs
