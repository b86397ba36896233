# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Change a value, see what it does
#
# Edit the next cell and run everything: about a minute for 64 runs on the digits (the retrained networks are made once and
# kept). The table keeps every try; the figures show the last try beside the previous one. The notebook for Kaggle is
# `submission.ipynb`.

# %%
method = "unlearning.py"  # or methods/….py
changes = {"tensors": 8}  # fields of its Config, set on top of its preset for this data set
data, split, runs = "digits", "public", 64

# %%
# %matplotlib inline
import os
import sys
from pathlib import Path

from IPython.display import display

kit = next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "evaluate.py").exists())
sys.path.insert(0, str(kit))
from evaluator.evaluation import Evaluation
from evaluator.tries import Tries

# A test of this notebook sets TUNING_ variables: few runs, small data.
runs, data = int(os.environ.get("TUNING_RUNS", runs)), os.environ.get("TUNING_DATA", data)
results = Path(os.environ.get("TUNING_RESULTS", kit / "results"))
tries = Tries(Evaluation.of(data, split, runs, results))
tries.add(kit / method, changes)
display(tries.table.drop(columns="kept in").round(4))

# %% [markdown]
# How to read the figures: on the forget set and on the retain set, the histograms should look like those of the retrained
# networks. In the epsilon histogram an example is worth half as much in each further bar, so examples should move to the
# left. At 64 runs scores are noisy: trust large differences only, never compare scores from different numbers of runs, and
# report your final choice on the `private` split with 512 runs.

# %%
for figure in tries.figures():
    display(figure)
