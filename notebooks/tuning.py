# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Change a value, see what it does
#
# Edit the next cell and run everything: about a minute for 64 runs on the digits (the retrained networks are made once and
# kept). The table keeps every try; below it, the last try is compared with the previous one. The notebook for Kaggle is
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
from evaluator.intervals import verdict
from evaluator.tries import Tries

# A test of this notebook sets TUNING_ variables: few runs, small data.
runs, data = int(os.environ.get("TUNING_RUNS", runs)), os.environ.get("TUNING_DATA", data)
results = Path(os.environ.get("TUNING_RESULTS", kit / "results"))
tries = Tries(Evaluation.of(data, split, runs, results))
tries.add(kit / method, changes)
display(tries.overview())

# %% [markdown]
# `tries.table` is a pandas DataFrame with every value: sort and search it as such. `json.loads` of a try's `config` gives
# the `changes` that make it again. Next, the last two tries with this number of runs: the change of the score, and the
# forget examples that changed most (epsilon: how well the best attack tells unlearned from retrained; earns: what that is
# worth, 1 at best). `tries.compare(1, 3)` compares others.

# %%
last = tries.last_two()
if len(last) == 2:
    change, comparison = tries.compare(*last)
    print(verdict(f"try {last[1]}", f"try {last[0]}", change, 1, runs))
    print(f"try {last[1]} against try {last[0]}: {comparison}")
    display(comparison.examples.head(10).round(4))

# %% [markdown]
# How to read the figures: on the forget set and on the retain set, the histograms should look like those of the retrained
# networks. In the epsilon histogram an example is worth half as much in each further bar, so examples should move to the
# left. At 64 runs scores are noisy, and a method that wins on one forget set may lose on the next: try your choice on
# `public-2` to `public-6` too (`make tune` takes the mean over all of them), never compare scores from different numbers of
# runs, and report on the `private` splits with 512 runs.

# %%
for figure in tries.figures():
    display(figure)
