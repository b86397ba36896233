# make data                make data/<DATA>/: digits, fashion-small, fashion, faces (synthetic), cifar10; FROM=/path where the
#                          images are yours to bring: utkface, mufac, agedb, lfw, casia-surf (data/README.md)
# make evaluate            score unlearning.py beside the baselines; RUNS=64 for a first impression
#                          METHOD=my_method.py scores another file, ATTACKS=1 adds further attacks beside the score
#                          SPLIT='private*' scores on all private forget sets: means and their errors
# make report              the page of everything that is kept: results/<data>/<split>/report.html; runs nothing
# make tune                search every method's hyperparameters; METHOD=methods/fanchuan.py for one
# make ladder              unlearning.py's published ablation, row by row
# make leaderboard         all methods with their tuned values, on all private forget sets: results/digits/RESULTS.md
#                          PAGE=RESULTS.md replaces the kit's own page and docs/leaderboard.png instead
#                          PUBLISHED=1 takes published values instead of tuned ones: results/<data>/PUBLISHED.md
# make bench               the kit's speed beside that of its peers, and against the last time: a quarter of an hour
# make notebook            notebooks/*.ipynb from unlearning.py and their sources
#                          METHOD=methods/shrink_perturb.py writes submission_shrink_perturb.ipynb, which submits that file
# make rehearse            Kaggle on this machine: runs the notebook, checks and scores its submission.zip
# make submit              upload the notebook and submit it; DRY=1 prints the commands instead
# make kaggle-evaluate     make evaluate on Kaggle's free GPUs: uploads the kit and the data, waits, brings the results home;
#                          takes METHOD, DATA, SPLIT, RUNS and ATTACKS as make evaluate does; DRY=1 prints the commands
# make test                lint and tests
# make format              reformat the code as `make test` wants it
# make clean               delete results/, caches and the data that code makes again
# Defaults where a target takes them: DATA=digits SPLIT=public RUNS=512. JOBS=1 uses one core only, DASK=tcp://… the workers
# of a Dask scheduler (docs/scaling.md).
# Data that are missing are made first.
# Every target sets up what it needs; VENV=/path/to/environment uses an environment that exists.

VENV ?= .venv
PYTHON ?= python3
RUNS ?= 512
DATA ?= digits
SPLIT ?= public
METHOD ?=
JOBS ?=
DASK ?=
ATTACKS ?=
PAGE ?=
FROM ?=
PUBLISHED ?=
RUN := $(VENV)/bin/python
ON := --data $(DATA) $(if $(JOBS),--jobs $(JOBS)) $(if $(DASK),--dask $(DASK))
# DATA is a name under data/, or any folder.
READY := $(VENV)/.ready $(if $(wildcard $(DATA)/.),,data/$(DATA)/dataset.json)
READY_DEV := $(VENV)/.ready-dev $(READY)

.PHONY: data evaluate report tune ladder leaderboard bench notebook rehearse submit kaggle-evaluate test lint format clean

data: $(VENV)/.ready
	$(RUN) data/prepare.py $(DATA) $(if $(FROM),--from $(FROM))

evaluate: $(READY)
	$(RUN) evaluate.py $(METHOD) $(ON) --split '$(SPLIT)' --runs $(RUNS) $(if $(ATTACKS),--attacks)

report: $(READY)
	$(RUN) evaluate.py report $(ON) --split '$(SPLIT)' --runs $(RUNS)

tune: $(READY_DEV)
	$(RUN) -m evaluator.tuning $(METHOD) $(ON)

ladder: $(READY)
	$(RUN) -m benchmarks.ladder $(ON) --split $(SPLIT) --runs $(RUNS)

leaderboard: $(READY)
	$(RUN) -m benchmarks.leaderboard $(ON) --runs $(RUNS) $(if $(PUBLISHED),--published) $(if $(PAGE),--page $(PAGE))

bench: $(READY)
	$(RUN) -m benchmarks.bench $(ON) --runs $(RUNS)

notebook: $(VENV)/.ready-dev
	$(RUN) notebooks/build.py $(METHOD)

rehearse: $(READY_DEV)
	$(RUN) notebooks/rehearse.py $(METHOD) --data $(DATA) --split $(SPLIT)

submit: $(VENV)/.ready-dev
	$(RUN) notebooks/submit.py $(if $(DRY),--dry-run)

kaggle-evaluate: $(READY_DEV)
	$(RUN) notebooks/kaggle_evaluate.py $(METHOD) --data $(DATA) --split '$(SPLIT)' --runs $(RUNS) $(if $(ATTACKS),--attacks) \
		$(if $(DRY),--dry-run)

test: $(VENV)/.ready-dev lint
	$(RUN) -m pytest -q -n auto --dist worksteal

lint: $(VENV)/.ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.ready-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

data/%/dataset.json: | $(VENV)/.ready
	$(RUN) data/prepare.py $*

# What is made by code alone is made anew when that has changed.
data/digits/dataset.json: data/digits.py data/layout.py
data/faces/dataset.json: data/faces.py data/layout.py
data/fashion-small/dataset.json data/fashion/dataset.json: data/fashion.py data/layout.py

# An environment that has everything is left as it is, also one that cannot be written to.
$(VENV)/.ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	-@touch $@

$(VENV)/.ready-dev: requirements.txt requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	-@touch $@ $(VENV)/.ready

clean:
	rm -rf results data/digits data/faces data/fashion-small .pytest_cache .ruff_cache .hypothesis
