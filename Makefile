# make quickstart   from a fresh clone to a pruned model on scikit-learn's digits
# make test         the test suite
# make check        lint, format, types, and the documentation built strictly
# make docs         the documentation site, into site/ (look at it: python -m http.server -d site)
# Settings, given after the target: PYTHON=python3.12 (creates the environment), VENV=folder (where it lives).

PYTHON ?= python3
VENV := .venv
RUN := runs/quickstart
SOURCES := src tests benchmarks examples
QUICKSTART_ARGS := --data digits --model psenet.models:digits_resnet --macs 50%

.PHONY: quickstart test check docs clean
.DELETE_ON_ERROR:

# --resume: a first call starts, a second one continues what was interrupted or shows the finished run.
quickstart: $(VENV)/.ready
	$(VENV)/bin/psenet prune $(QUICKSTART_ARGS) --out $(RUN) --resume

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest

check: $(VENV)/.ready docs
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python $(SOURCES)

# What it silences is a notice on the theme's own future, no warning about these pages.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(RUN) build dist site .pytest_cache .ruff_cache .hypothesis

# Made once, and again only when the dependencies change.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e ".[dev]"
	touch $@
