# make evaluate            score unlearning.py beside the baselines; RUNS=64 for a first impression
# make test                lint and tests
# Every target sets up what it needs; VENV=/path/to/environment uses one that exists.

VENV ?= .venv
PYTHON ?= python3
RUNS ?= 512
DATA ?= digits
SPLIT ?= public
METHODS ?=
RUN := $(VENV)/bin/python

.PHONY: evaluate test lint format clean

evaluate: $(VENV)/.ready data/digits/dataset.json
	$(RUN) evaluate.py $(METHODS) --data $(DATA) --split $(SPLIT) --runs $(RUNS)

test: $(VENV)/.ready-dev lint
	$(RUN) -m pytest -q

lint: $(VENV)/.ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.ready-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

data/digits/dataset.json: data/prepare.py | $(VENV)/.ready
	$(RUN) data/prepare.py digits

# An environment that has everything is left as it is, also one that cannot be written to.
$(VENV)/.ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements.txt requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@ $(VENV)/.ready

clean:
	rm -rf results data/digits .pytest_cache .ruff_cache .hypothesis
