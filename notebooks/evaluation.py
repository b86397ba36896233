# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Scores of unlearning methods, made on Kaggle's GPUs
#
# This notebook runs the kit's `evaluate.py` and hands back what it made, `results.zip`. `make kaggle-evaluate` (in the kit)
# uploads the kit and the data, fills in the next cell, runs this notebook as often as it takes, and brings the results home.
#
# **By hand:** add two data sets with *Add Input*, the kit (`evaluate.py` and the folders `evaluator` and `methods`) and a
# data folder, each as a zip or unpacked; edit the next cell; choose the accelerator **GPU T4 x2**, internet off, and *Save &
# Run All*. To go on where a session was stopped, also add this notebook's own output.

# %%
#: parameters
ARGUMENTS = [
    "unlearning.py",
    "methods/finetune.py",
    "--split",
    "public",
    "--runs",
    "64",
]  # of evaluate.py, seen from the kit
DATA = "digits"  # the name of the data folder
CONTENT = {}  # "kit" and "data" -> what the digest.txt of their data sets must say; what is not named is not checked
HOURS = 11  # of Kaggle's 12; then evaluate.py is stopped, keeps what is finished, and the next session goes on

# %%
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

START = time.monotonic()
# The REHEARSAL_ variables are set where Kaggle is rehearsed on another machine, never on Kaggle.
INPUT = Path(os.environ.get("REHEARSAL_INPUT", "/kaggle/input"))
TMP = Path(os.environ.get("REHEARSAL_TMP", "/kaggle/tmp"))
WORKING = Path(os.environ.get("REHEARSAL_WORKING", "/kaggle/working"))
HOURS = float(os.environ.get("REHEARSAL_HOURS", HOURS))
DEVICE = os.environ.get("REHEARSAL_DEVICE", "cuda")  # a GPU that does not work is an error, not eleven hours on two cores
UNPACKED, DATA_HERE, RESULTS = TMP / "unpacked", TMP / "data" / DATA, TMP / "results"
KEY = CONTENT.get("data", DATA)  # of these data: results.zip may also hold what was made from others


class Stop(Exception):
    """What is wrong, in one line."""


# %% [markdown]
# ## Where the inputs are
# Kaggle has mounted data sets at `/kaggle/input/<name>` and at `/kaggle/input/datasets/<owner>/<name>`, and unpacks most
# zips, but not all. So the kit and the data are looked for by what lies in them.


# %%
def folders(root: Path):
    """Every folder with the names of its files; folders of images are not entered."""
    for folder, inside, files in os.walk(root, followlinks=True):
        inside[:] = [name for name in inside if name != "images"]
        yield Path(folder), files


def unpack_inputs() -> list[Path]:
    """Unpack the zips that Kaggle left packed. Returns the folders of what earlier sessions have made."""
    earlier = []
    for folder, files in folders(INPUT):
        for name in files:
            if name.endswith(".zip"):
                made_before = name == "results.zip"
                place = (TMP / "earlier" if made_before else UNPACKED) / folder.relative_to(INPUT) / Path(name).stem
                with zipfile.ZipFile(folder / name) as archive:
                    archive.extractall(place)
                earlier += [place] * made_before
    return earlier


def find(what: str, name: str, file: str) -> Path:
    """The folder that holds a file; if there are several, the one with this name."""
    places = [folder for root in (INPUT, UNPACKED) for folder, files in folders(root) if file in files]
    if len(places) > 1:
        places = [folder for folder in places if folder.name == name] or places
    if len(places) != 1:
        mounted = ", ".join(str(path) for path in sorted([*INPUT.glob("*"), *INPUT.glob("*/*")])[:20]) or "nothing"
        found = f"in {len(places)} places: {', '.join(map(str, places))}" if places else f"not there; {INPUT} has {mounted}"
        raise Stop(f"{what} (a folder with {file}) is {found}; add one with Add Input")
    return places[0]


def check_content() -> None:
    """Kaggle may still mount the version before the one that was uploaded."""
    there = {(folder / "digest.txt").read_text().strip() for folder, files in folders(INPUT) if "digest.txt" in files}
    for what, digest in CONTENT.items():
        if digest not in there:
            raise Stop(f"the {what} that is mounted is not the one that was uploaded ({digest}); run the command again")


# %% [markdown]
# ## The session
# The data folder becomes a folder of links, so that an original network can be trained into it. Runs that were made before,
# here or at home, are put in their places: `evaluate.py` makes only those that are missing.


# %%
def link_data(source: Path) -> None:
    DATA_HERE.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not (DATA_HERE / path.name).exists():
            (DATA_HERE / path.name).symlink_to(path)


def copy_missing(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        here = target / path.relative_to(source)
        if path.is_file() and not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, here)


def evaluate(kit: Path) -> tuple[int, str]:
    """Run evaluate.py and show what it prints, until the time is up. Returns its exit code and the last line it printed."""
    places = ["--data", str(DATA_HERE), "--results", str(RESULTS), "--device", DEVICE]
    process = subprocess.Popen(
        [sys.executable, "-u", "evaluate.py", *ARGUMENTS, *places],
        cwd=kit,
        env={**os.environ, "MPLBACKEND": "Agg"},  # this notebook's own does not work there
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    clock = threading.Timer(max(0, HOURS * 3600 - (time.monotonic() - START)), process.terminate)
    clock.start()
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    clock.cancel()
    return process.wait(), last


def session() -> dict:
    """Everything, and how it ended."""
    try:
        earlier = unpack_inputs()
        check_content()
        kit = find("the kit", "kit", "evaluate.py")
        data = find("the data folder", DATA, "age_class_weights.json")
        copy_missing(kit / "kept" / "data", DATA_HERE)  # what is kept at home comes first
        link_data(data)
        for made in earlier:
            copy_missing(made / "data" / KEY, DATA_HERE)
        for made in [kit / "kept", *earlier]:
            copy_missing(made / "results", RESULTS)
        code, last = evaluate(kit)
    except (Stop, OSError, zipfile.BadZipFile) as error:
        code, last = 1, " ".join(str(error).split())
    how = {0: "complete", 143: "stopped", -15: "stopped"}.get(code, "failed")  # 143 and -15: by SIGTERM
    return {"state": how, "error": last.removeprefix("error: ") if how == "failed" else "", "exit_code": code}


def write_results() -> None:
    """results.zip: results/, and in data/ the original network; under its name only when it is whole."""
    WORKING.mkdir(parents=True, exist_ok=True)
    part = WORKING / ".results.zip.part"
    places = {DATA_HERE: f"data/{KEY}", RESULTS: "results"}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted([*DATA_HERE.glob("original_model*"), *RESULTS.rglob("*")]):
            folder = RESULTS if path.is_relative_to(RESULTS) else DATA_HERE
            if path.is_file() and not path.name.startswith("."):
                archive.write(path, f"{places[folder]}/{path.relative_to(folder).as_posix()}")
    part.replace(WORKING / "results.zip")


state = session()
write_results()
(WORKING / "state.json").write_text(json.dumps({**state, "arguments": ARGUMENTS, "data": KEY}, indent=2) + "\n")
print(f"\n{state['state']} after {(time.monotonic() - START) / 3600:.2f} h {state['error']}")
for page in sorted(RESULTS.glob("*/*/report.html")):
    print(f"in results.zip: {page.relative_to(TMP)}")
