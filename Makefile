# make demo    real books to a trained model and a report, on a bare machine with Python 3.11
# make test    everything that must pass before a commit
# make setup   .venv with the versions of requirements.lock (both targets above do it first)
# make lock    requirements.in -> requirements.lock
# make bench   the figures of benchmarks/
# make clean   drop .venv, runs/ and caches

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.stamp
PYTHON ?=

# Where no CPU wheel is configured, torch==2.13.0 on Linux brings gigabytes of CUDA: README.md tells how to avoid it.
# uv does not read pip's find-links, so they are handed over.
UV_PIP = UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --python $(BIN)/python
# Its own requirements (torchvision, lightning) do not resolve beside torch 2.13; docs/decisions.md.
TAMING := taming-transformers-rom1504==0.0.6

export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test lock bench clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@for candidate in $(PYTHON) python3.11 python3; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "setup: no Python >= 3.11 found (tried: $(strip $(PYTHON) python3.11 python3); python3 is $$(python3 -V 2>&1 || true))." >&2; \
	    echo "       Install Python 3.11, or name one: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; \
	    exit 2; \
	fi; \
	echo "== setup: .venv with $$("$$found" -V)"; \
	test -x $(BIN)/pip || "$$found" -m venv .venv
	@if $(BIN)/pip install --quiet --disable-pip-version-check uv; then \
	    echo "== setup: install with uv"; \
	    $(UV_PIP) -r requirements.lock && \
	    $(UV_PIP) --no-deps $(TAMING) && \
	    $(UV_PIP) --no-deps --no-build-isolation -e .; \
	else \
	    echo "== setup: uv cannot be installed here; pip is slower but does the same"; \
	    $(BIN)/pip install -r requirements.lock && \
	    $(BIN)/pip install --no-deps $(TAMING) && \
	    $(BIN)/pip install --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

# Every command below can be typed alone, and does only what is missing.
demo: setup
	@echo "== 1/4 build: novels, chats, needles, photographs and clips to packed rows"
	@for rows in short medium dataset heldout; do $(BIN)/lwm-data build manifests/demo/$$rows.yaml --workers 2 || exit; done
	@$(BIN)/lwm-data check runs/demo/dataset
	@$(BIN)/lwm-data report runs/demo/dataset --seed 83
	@echo "== 2/4 train: three stages, the last with ring attention over 4 simulated devices"
	@$(BIN)/lwm-train run manifests/demo/train.yaml
	@echo "== 3/4 evaluate: held-out novels, needles, samples"
	@$(BIN)/lwm-train eval manifests/demo/eval.yaml
	@echo "== 4/4 report"
	@$(BIN)/lwm-train report runs/demo/train-long --out runs/demo/report.html
	@echo "Open runs/demo/report.html (the run) and runs/demo/dataset-report.html (its data) in a browser."

# One shell line per step: make stops at the first that fails.
test: setup
	@echo "== format: ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== lint: ruff check"
	@$(BIN)/ruff check .
	@echo "== types: mypy"
	@$(BIN)/mypy
	@echo "== walls: lint-imports"
	@$(BIN)/lint-imports --no-logo
	@echo "== tests: pytest"
	@$(BIN)/python -m pytest

# Pins that stand are kept, torch's apart: as a pin it leads uv past the local CPU wheel to the CUDA build. "+cpu" exists
# only where a CPU wheel is configured; without it the pin installs everywhere.
lock: $(STAMP)
	grep -v '^torch==' requirements.lock > .venv/new.lock
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip compile --quiet --python $(BIN)/python \
	    --python-version 3.11 --no-header --no-annotate requirements.in -o .venv/new.lock
	@if grep -nE '^(nvidia-|triton==)' .venv/new.lock; then \
	    echo "lock: torch came with CUDA; set UV_FIND_LINKS to a folder with a CPU wheel of torch" >&2; exit 1; fi
	@if grep -nE '://|--hash|--find-links' .venv/new.lock; then \
	    echo "lock: an address or a hash would get into requirements.lock" >&2; exit 1; fi
	sed 's/^\(torch==[0-9.]*\)+cpu/\1/' .venv/new.lock > requirements.lock

bench: setup
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
