# `make` lists the targets. Everything is installed into .venv, with the versions pinned in constraints.txt.

# The first Python here that is new enough; `make run PYTHON=/path/to/python` takes another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)

PY := .venv/bin/python
CODE := minivlm tests scripts benchmarks  # the notebooks' sources keep their long lines of prose
PIP := $(PY) -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: help run check test test-all lab notebooks class train evaluate bench site
.DELETE_ON_ERROR:

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

run: .venv/installed  ## install, then show all four tasks on a few images
	@$(PY) -m minivlm demo

lab: .venv/installed  ## open JupyterLab on your own copy of the course, in work/; ARGS="--ip=0.0.0.0 …"
	@$(PY) -m minivlm lab -- $(ARGS)

check: .venv/installed-dev  ## style and the fast tests, in at most three minutes
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check $(CODE)
	@$(PY) -m pytest -q -n auto -m "not slow and not long and not notebook and not browser"

test: .venv/installed-dev  ## the tests, in at most twenty minutes
	@$(PY) -m pytest -q -n auto --durations=10 -m "not long"

test-all: .venv/installed-dev  ## every test, those too that take a minute each
	@$(PY) -m pytest -q -n auto --durations=10

notebooks: .venv/installed-dev  ## build the notebooks from notebooks/source, and execute them
	@$(PY) scripts/build_notebooks.py

class: .venv/installed-dev  ## the notebooks for a class, in build/class; SEED=… hides the tests
	@$(PY) scripts/build_notebooks.py --class build/class $(if $(SEED),--seed $(SEED))

train: .venv/installed  ## train the embedded checkpoint from scratch, in runs/
	@$(PY) -m minivlm train

evaluate: .venv/installed  ## measure the embedded checkpoint on held-out scenes
	@$(PY) -m minivlm evaluate

bench: .venv/installed  ## measure speed and memory next to transformers; ARGS="--real" for the real size
	@$(PY) -m benchmarks $(ARGS)

site: .venv/installed-site  ## build the course as a static site, in build/site
	@$(PY) scripts/build_site.py

# The stamps are written last: an installation that was interrupted starts over.
.venv/created:
	@"$(PYTHON)" -c "$(NEW_ENOUGH)" 2>/dev/null || { echo "minivlm needs Python 3.11 or newer," \
		"and $(or $(PYTHON),python3) is not: install one, or name it with PYTHON=/path/to/python." >&2; exit 2; }
	"$(PYTHON)" -m venv --clear .venv
	@touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	@echo "Installing into .venv: a few minutes the first time, nothing after that."
	$(PIP) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e ".[dev]"
	@touch $@

.venv/installed-site: .venv/installed
	$(PIP) -e ".[site]"
	@touch $@
