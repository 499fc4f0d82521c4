# Everything runs in $(VENV), which these rules make and own: one that was not finished is replaced.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.installed-lint
PYTEST := $(RUN) -m pytest --numprocesses=auto --dist=worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help install demo sweep bench test test-slow test-all test-oldest lint format hooks wheel \
	clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..." is handed on; PYTHON=python3.12 picks the interpreter of a new $(VENV).'

install: $(INSTALLED) ## install the library, the experiments and the tests into .venv

demo: $(INSTALLED) ## compress the caches of the shipped model and compare methods
	$(RUN) -m experiments.compress_cache --config=configs/compress_cache.py:demo $(ARGS)

sweep: $(INSTALLED) ## measure the error over radius, width and size; resumes where it stopped
	$(RUN) -m experiments.sweep --config=configs/sweep.py $(ARGS)

bench: $(INSTALLED) ## time, memory and the ratio to the matrix products alone
	$(RUN) -m benchmarks.compress $(ARGS)

test: $(INSTALLED) ## all tests but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

# Exit status 5: no test was selected.
test-slow: $(INSTALLED) ## the slow tests
	$(PYTEST) -m slow $(ARGS) || test $$? -eq 5

test-all: $(INSTALLED) ## all tests
	$(PYTEST) $(ARGS)

test-oldest: ## all tests but the slow ones, with the oldest dependencies that pyproject.toml admits
	$(MAKE) test VENV=.venv-oldest OLDEST=1

lint: $(LINT_INSTALLED) ## ruff and mypy
	$(RUN) -m ruff check $(ARGS)
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

format: $(LINT_INSTALLED) ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix-only
	$(RUN) -m ruff format

hooks: $(LINT_INSTALLED) ## run ruff and mypy before every git commit
	$(RUN) -m pre_commit install

wheel: $(INSTALLED) ## build the sdist and the wheel into dist/
	$(RUN) -m hatchling build

clean: ## remove what tests and builds left behind
	rm -rf dist build .jax_cache .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments as well
	rm -rf .venv .venv-oldest

# The stamp is written last and removed first, so that an interrupted installation starts afresh.
$(INSTALLED): pyproject.toml coreset_jax/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is not. Name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks venv. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@if test -e $@; then rm $@; else $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing into $(VENV)"
ifdef OLDEST
	@sed -n 's/^ *"\([a-zA-Z_-]*\)>=\([0-9.]*\)",$$/\1==\2/p' $< > $(VENV)/oldest.txt
	@$(PIP) install --quiet --constraint $(VENV)/oldest.txt --editable ".[test]"
else
	@$(PIP) install --quiet --editable ".[test]"
endif
	@touch $@

$(LINT_INSTALLED): $(INSTALLED)
	@$(PIP) install --quiet --editable ".[lint]"
	@touch $@
