# Every target does its own set-up, from nothing but python 3.11 or newer and a C compiler. `make` alone explains them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help

BIN := .venv/bin
PYTHON ?= python
LOCK := cpu-lock.txt
# The stamp's name holds the content of what was installed: a touched file installs nothing, a changed one does.
STAMP := .venv/.installed-$(firstword $(shell cat $(LOCK) setup.py | cksum))
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# The newest supported Megatron-Core wants python 3.12 by its metadata only; unpacked, it runs on 3.11 as well.
NEWER_MEGATRON := 0.19.2
TRITON := 3.7.1
OVERLAY := .overlay/megatron-$(NEWER_MEGATRON)
OVERLAY_STAMP := $(OVERLAY)/.complete-triton-$(TRITON)

# Twice quiet: errors alone.
PIP := $(BIN)/python -m pip --quiet --quiet
PYTEST := $(BIN)/pytest --durations=5 -m "not slow and not gpu"
BAD_INPUT := tests/integration/test_bad_input.py tests/integration/test_doctor.py
STARTED_S := $(shell date +%s)

# One thread a rank: the ranks of a test share the cores. Nothing calls home or looks for a hub.
export OMP_NUM_THREADS := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install overlay check test test-gpu quickstart layouts invariance kill-matrix fuzz nightly clean

help:
	cat <<'TEXT'
	make quickstart   train a small policy with OREAL on this machine's CPU and see it get better
	make test         all checks and tests a change must pass, about 20 minutes on two cores
	make test-gpu     what needs a GPU, on one, with that machine's own python, torch and vLLM
	make check        the fast part of it: ruff, pyright, import-linter, codespell
	make install      .venv with the whole pinned CPU stack ($(LOCK)) and this project in it
	make overlay      Megatron-Core $(NEWER_MEGATRON) beside it, put before the older one by PYTHONPATH=$(OVERLAY)
	make layouts      two whole iterations on four ranks under each parallel layout
	make invariance   one batch under every layout of up to four ranks, the numbers into docs/invariance.md
	make kill-matrix  a training killed at every phase, the table into docs/resume.md
	make fuzz         ten minutes of random answers against the verifier
	make nightly      everything, the slow tests too, on both versions of Megatron-Core
	make clean        removes .venv and .overlay

	Targets install what they need first. One test: $(BIN)/pytest tests/unit/data -k packing
	A GPU machine brings its own torch: pip install -e '.[gpu,dev]' there instead of make install.
	TEXT

install: $(STAMP)

# The CPU build of torch is not on PyPI: its own index is asked only where the configured ones do not have it.
$(STAMP): $(LOCK) setup.py
	started=$$SECONDS
	if ! test -x $(BIN)/python; then
	  for version in 3.11 3.12 3.13; do
	    if python$$version -c 'import ensurepip, venv' 2>/dev/null; then python=python$$version; break; fi
	  done
	  test -n "$${python:-}" || { echo "install: no python3.11, 3.12 or 3.13 with venv found: install one" >&2; exit 1; }
	  echo "install: $$($$python --version) makes .venv"
	  $$python -m venv .venv
	fi
	echo "install: $$(grep -c == $(LOCK)) pinned packages of $(LOCK), about 2.5 GB, into .venv; a few minutes"
	torch=$$(grep '^torch==' $(LOCK))
	$(PIP) install --no-deps "$$(grep '^setuptools==' $(LOCK))"
	if ! $(PIP) install --no-deps "$$torch"; then
	  echo "install: asking $(TORCH_CPU_INDEX) for $$torch"
	  $(PIP) install --no-deps "$$torch" --extra-index-url $(TORCH_CPU_INDEX)
	fi
	$(PIP) install --no-deps --no-build-isolation --requirement $(LOCK)
	$(PIP) install --no-deps --no-build-isolation --editable .
	rm -f .venv/.installed-*
	touch $@
	echo "install: done in $$((SECONDS - started)) s"

overlay: $(OVERLAY_STAMP)

# Never in .venv: vLLM on a CPU must not find triton.
$(OVERLAY_STAMP): $(STAMP)
	rm -rf $(OVERLAY)
	mkdir -p $(OVERLAY)
	echo "overlay: Megatron-Core $(NEWER_MEGATRON) and triton $(TRITON) into $(OVERLAY)"
	$(PIP) download --no-deps --only-binary=:all: --python-version 3.12 --dest .overlay megatron-core==$(NEWER_MEGATRON)
	$(BIN)/python -m zipfile --extract .overlay/megatron_core-$(NEWER_MEGATRON)-*.whl $(OVERLAY)
	rm .overlay/megatron_core-$(NEWER_MEGATRON)-*.whl
	$(BIN)/python -m compileall -qq -j 0 $(OVERLAY)/megatron # else its first import warns of escape sequences
	$(PIP) install --no-deps --target $(OVERLAY) triton==$(TRITON)
	PYTHONPATH=$(OVERLAY) $(BIN)/python -W ignore -c \
	  "import megatron.core as m; assert m.__version__.startswith('$(NEWER_MEGATRON)'), m.__version__"
	touch $@

check: $(STAMP)
	failed=0
	run() { echo "check: $$*"; "$(BIN)/$$@" || failed=1; }
	run ruff check .
	run ruff format --check .
	run pyright
	run lint-imports
	run codespell
	exit $$failed

# Every stage runs, so that one run tells all that is broken; what is printed last tells what took how long, and what failed.
# Start-ups and waiting leave half of two cores idle: those stages run side by side that wait the most.
test: $(STAMP) $(OVERLAY_STAMP)
	told=$$(mktemp -d)
	trap 'rm -rf "$$told"' EXIT
	stage() {
	  local name=$$1 started=$$SECONDS result=passed; shift
	  echo "== $$name: $$*"
	  "$$@" 2>&1 | sed -u "s/^/$$name | /" | tee "$$told/$$name.log" || result=FAILED
	  printf '%-22s %6d s  %s\n' "$$name" $$((SECONDS - started)) $$result > "$$told/$$(date +%s%N).row"
	}
	stage "check" $(MAKE) --no-print-directory check &
	stage "unit" $(PYTEST) tests/unit & wait
	stage "parallel, parity" $(PYTEST) tests/parallel tests/parity
	stage "parallel on $(NEWER_MEGATRON)" env PYTHONPATH=$(CURDIR)/$(OVERLAY) $(PYTEST) tests/parallel
	{ stage "contracts, bad input" $(PYTEST) tests/contracts $(BAD_INPUT)
	  stage "browser" $(PYTEST) tests/browser; } &
	stage "integration" $(PYTEST) tests/integration $(BAD_INPUT:%=--ignore=%) & wait
	echo
	cat "$$told"/*.row
	printf '%-22s %6d s, installation included\n' total $$(($$(date +%s) - $(STARTED_S)))
	! grep --quiet FAILED "$$told"/*.row || {
	  echo "failed:"
	  grep --no-filename --extended-regexp ' \| (FAILED|ERROR|SUBFAILED) | error: |^check \| .*(BROKEN|==>)' "$$told"/*.log | cut --characters=-240
	  exit 1
	}

# Not of .venv, which is the CPU's: PYTHON is where torch, Megatron, Transformer Engine and vLLM for GPUs are.
test-gpu:
	$(PYTHON) -m pytest tests/gpu -m gpu --durations=5

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

layouts: $(STAMP)
	$(BIN)/python -m tests.integration.layouts

invariance: $(STAMP) $(OVERLAY_STAMP)
	measured=$$(mktemp -d)
	trap 'rm -rf "$$measured"' EXIT
	program="$(BIN)/python -W ignore -m tests.parallel.invariance"
	$$program measure "$$measured/1.json"
	PYTHONPATH=$(CURDIR)/$(OVERLAY) $$program measure "$$measured/2.json"
	$$program write docs/invariance.md "$$measured"/*.json

kill-matrix: $(STAMP)
	$(BIN)/python -W ignore -m tests.integration.kill_matrix docs/resume.md

fuzz: $(STAMP)
	$(BIN)/python tools/fuzz_verifier.py --minutes 10 --seed $$RANDOM

nightly: test layouts fuzz
	$(BIN)/pytest tests -m slow
	PYTHONPATH=$(CURDIR)/$(OVERLAY) $(BIN)/pytest tests/parallel -m slow

clean:
	rm -rf .venv .overlay
