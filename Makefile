# make quickstart   from a fresh clone to a pruned model on scikit-learn's digits
# make test         the test suite
# make check        lint, format, types, licences, and the documentation built strictly
# make audit        known vulnerabilities of what is installed; asks PyPI, so no part of make check
# make soak         the long checks: killed runs, full disks, random nets, long trainings; an hour
# make matrix       the quick tests with the oldest and the newest torch that psenet says it works with
# make docs         the documentation site, into site/ (look at it: python -m http.server -d site)
# Settings, given after the target: PYTHON=python3.12 (creates the environment), VENV=folder (where it lives).

PYTHON ?= python3
VENV := .venv
AUDIT := .audit-venv
RUN := runs/quickstart
SOURCES := src tests benchmarks examples tools
QUICKSTART_ARGS := --data digits --model psenet.models:digits_resnet --macs 50%

.PHONY: quickstart test check audit soak matrix docs clean
.DELETE_ON_ERROR:

# --resume: a first call starts, a second one continues what was interrupted or shows the finished run.
quickstart: $(VENV)/.ready
	$(VENV)/bin/psenet prune $(QUICKSTART_ARGS) --out $(RUN) --resume

# Tests of one file share what they prepare, so that they stay in one process.
test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: $(VENV)/.ready docs
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python $(SOURCES)
	$(VENV)/bin/python tools/licences.py > /dev/null

# pip-audit lives apart: what audits is no part of what is audited. --strict: a package that PyPI does not know fails,
# where the tool would otherwise call it good; builds such as 2.11+cpu are asked for as 2.11.
audit: $(VENV)/.ready
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/bin/python -m pip freeze --exclude-editable | sed 's/+.*//' > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement $(AUDIT)/installed.txt

soak: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/soak_runs.py
	$(VENV)/bin/python benchmarks/soak_fuzz.py --nets 1015
	$(VENV)/bin/python benchmarks/soak_numerics.py

# The oldest torch warns of itself, so that warnings are no errors there; the newest is what pip finds.
matrix:
	$(PYTHON) -m venv .matrix/oldest
	.matrix/oldest/bin/python -m pip install --disable-pip-version-check -e ".[dev]" "torch==2.11.*" "torchvision==0.26.*"
	.matrix/oldest/bin/python -m pytest -m "not slow" -W default
	$(PYTHON) -m venv .matrix/newest
	.matrix/newest/bin/python -m pip install --disable-pip-version-check --upgrade -e ".[dev]"
	.matrix/newest/bin/python -m pytest -m "not slow"

# What it silences is a notice on the theme's own future, no warning about these pages.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(AUDIT) .matrix $(RUN) build dist site .pytest_cache .ruff_cache .hypothesis

# Made once, and again only when the dependencies change.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e ".[dev]"
	touch $@
