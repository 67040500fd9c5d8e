# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs, and is quick when nothing changed.
# `make verl` is for the verl plugin: it has an environment of its own, because verl and the rest want different versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VERL_VENV := .venv-verl
VERL_BIN := $(VERL_VENV)/bin
VERL_READY := $(VERL_VENV)/.ready
VERL080_VENV := .venv-verl080
VERL080_BIN := $(VERL080_VENV)/bin
VERL080_READY := $(VERL080_VENV)/.ready
WHEELS := benchmarks/gpu/wheels
IN_VERL := tests/integrations/verl_patch/test_patched_tree.py tests/integrations/verl_patch/test_patched_main_ppo.py

.PHONY: demo test verl verl-patch check lint fast bench evidence gpu gpu-wheels gpu-rehearse patches dist clean

demo: $(READY)  ## a student learns from a teacher on its own samples, on the CPU, in minutes
	$(BIN)/opd demo --overwrite

test: $(READY)  ## every test
	$(BIN)/python -m pytest

verl: $(VERL_READY) $(VERL080_READY)  ## the tests of the verl plugin: real runs of verl on the CPU
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest tests/integrations/verl

verl-patch: $(VERL_READY) $(VERL080_READY)  ## the tests inside patched trees of verl, with real runs; `make test` has those of the builder and the installer
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest $(IN_VERL)
	OMP_NUM_THREADS=1 $(VERL080_BIN)/python -m pytest $(IN_VERL) -k 'not two_ranks'

fast: $(READY)  ## the tests that end in under two minutes
	$(BIN)/python -m pytest -m "not slow"

check: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)  ## the fused loss against other libraries', in an environment made for them; an hour
	$(BIN)/python -m benchmarks kernels

gpu:  ## everything that only a GPU can show, in nine minutes, with the Python at hand; `make gpu-wheels` first, where it has no network
	@if ls $(WHEELS)/*.whl >/dev/null 2>&1; then \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(WHEELS)/installed $(WHEELS)/*.whl || \
		{ echo "$(WHEELS) is for Python 3.12 on x86-64: name such a Python (make gpu PYTHON=python3.12), or remove the folder."; exit 1; }; fi
	PYTHONPATH=src:$(WHEELS)/installed $(PYTHON) -m benchmarks gpu $(GPU)

gpu-wheels:  ## what `make gpu` needs beyond PyTorch, Triton and transformers, for a machine without network: at most 60 MiB
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d $(WHEELS) -r benchmarks/gpu/requirements.txt
	@du -sk $(WHEELS) | awk '{ printf "%s: %.1f MiB\n", $$2, $$1 / 1024; exit $$1 > 61440 }'

gpu-rehearse: $(READY)  ## every part of `make gpu` at tiny sizes on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks gpu --device cpu --rehearse --out runs/gpu-rehearsal

evidence: $(READY)  ## distillation beside reinforcement learning: what is missing of the runs, then tables and figures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks convergence

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "opd needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the rest into $(VENV): a minute or more, once.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

$(VERL_READY): pyproject.toml constraints-verl.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "verl's environment needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(VERL_BIN)/python || $(PYTHON) -m venv $(VERL_VENV)
	@echo 'Installing verl, Ray and PyTorch into $(VERL_VENV): a few minutes, once.'
	$(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt -e '.[verl]' pytest pytest-timeout psutil
	@touch $(VERL_READY)

$(VERL080_READY): pyproject.toml constraints-verl080.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { echo "verl 0.8's environment needs Python 3.11 or 3.12 (numpy < 2); set PYTHON=/path/to/python3"; exit 1; }
	test -x $(VERL080_BIN)/python || $(PYTHON) -m venv $(VERL080_VENV)
	@echo 'Installing verl 0.8.0, Ray and PyTorch into $(VERL080_VENV): a few minutes, once.'
	$(VERL080_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-verl080.txt verl==0.8.0 cachetools fastapi uvicorn msgspec pyzmq -e . pytest pytest-timeout psutil
	@touch $(VERL080_READY)

patches: $(READY)  ## the patch for verl's own tree, again: after any change to what they carry
	$(BIN)/python -m tools.verl_patch build

dist: $(READY)  ## the patch for verl as one archive with checksums
	$(BIN)/python -m tools.verl_patch pack --out dist

clean:  ## remove the virtual environments and run folders
	rm -rf $(VENV) $(VERL_VENV) $(VERL080_VENV) runs dist
