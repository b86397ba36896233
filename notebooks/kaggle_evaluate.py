"""Scores methods on Kaggle's free GPUs: what `python evaluate.py` would make here is made there and brought home.

    python notebooks/kaggle_evaluate.py my_method.py --data faces --split 'private*' --runs 512
    python notebooks/kaggle_evaluate.py my_method.py --data faces --dry-run     check everything, print every command

The kit with the methods, and the data folder, are uploaded as private data sets if they have changed. Then
notebooks/evaluation.ipynb is pushed, waited for, and its results are put into --results; it is pushed again until all runs
are there. Nothing is trained on this machine. After an interruption the same command goes on: a run that is going on at
Kaggle is waited for. Everything goes through Kaggle's own command.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import build
from kaggle_command import (
    ABSENT,
    GOING_ON,
    kaggle,
    push,
    push_command,
    slug,
    status,
    status_command,
    user_name,
    wait_for,
)

import evaluate
from evaluator import command
from evaluator.evaluation import Evaluation, write_summary
from evaluator.files import Problem, one_line, read_json, write_atomically, write_bytes, write_json
from evaluator.method import Method
from evaluator.pool import Pool
from evaluator.runs import retrained_pool, unlearned_pool
from evaluator.training import original_note, original_path

TITLE = "Unlearning evaluation"
KIT = ("evaluate.py", "unlearning.py", "evaluator", "methods")
OF_A_POOL = re.compile(r"run_\d{5}\.npz|\w+\.json")  # its runs, and the numbers that are measured once


def main(arguments: list[str] | None = None) -> int:
    parser = evaluate.options(__doc__)
    there = parser.add_argument_group("Kaggle")
    there.add_argument("--kit", metavar="OWNER/SLUG", help="a data set that holds the kit, instead of uploading this one")
    there.add_argument("--data-set", metavar="OWNER/SLUG", help="a data set that holds the data, instead of uploading them")
    there.add_argument("--hours", type=float, default=11, help="of a session, of Kaggle's 12 (default: %(default)g)")
    there.add_argument("--every", type=float, default=60, metavar="SECONDS", help="how often to ask how it goes")
    there.add_argument("--staging", type=Path, default=Path("results/kaggle-evaluation"), help="what is sent and fetched")
    there.add_argument("--dry-run", action="store_true", help="check, and print the commands instead of running them")
    args = parser.parse_args(arguments)
    return command.run(lambda: score(args))


def score(args: argparse.Namespace) -> None:
    """Make at Kaggle what is missing here, then evaluate as evaluate.py does."""
    for name in ("checkpoints", "keep_networks", "dask"):
        if getattr(args, name):
            raise Problem(f"--{name.replace('_', '-')}: not on Kaggle; use evaluate.py")
    if args.engine != "auto":
        raise Problem(f"--engine {args.engine}: Kaggle's GPUs find their own; leave it out")
    for name in ("kit", "data_set"):
        if getattr(args, name) and not re.fullmatch(r"[\w-]+/[\w-]+", getattr(args, name)):
            raise Problem(
                f"--{name.replace('_', '-')} {getattr(args, name)}: write OWNER/SLUG, as in the data set's address"
            )
    if not 0 < args.hours < 12:
        raise Problem(f"--hours {args.hours:g}: a session at Kaggle has less than 12 hours")
    evaluations = list(command.evaluations(args))
    for evaluation in evaluations:
        _ = evaluation.recipe  # reads the data
    methods = evaluate.methods_of(args, evaluations[0].data.name)
    for method in methods if args.kit else []:
        if method.path and not method.path.resolve().is_relative_to(ROOT):
            raise Problem(f"{method.path}: is not in the kit, and --kit names one that is not uploaded; leave out --kit")
    if kept(evaluations, methods) != wanted(evaluations, methods):
        (print_commands if args.dry_run else make_at_kaggle)(args, evaluations, methods)
    elif args.dry_run:
        print("everything is here: nothing would be sent")
    if not args.dry_run:
        evaluate.evaluate(args)


# What is kept here


def pools_of(evaluation: Evaluation, methods: Sequence[Method]) -> list[Pool]:
    """The pools of retrained networks, and the methods' if the original is there, which their runs depend on."""
    where = evaluation.setting, evaluation.data, evaluation.recipe
    with evaluation.alone():
        pools = [retrained_pool(*where, 0, kind) for kind in kinds(evaluation)]
        if original_path(*where[1:]).exists():
            original = evaluation.original()
            pools += [unlearned_pool(*where, original, method, 0) for method in methods]
    return pools


def kinds(evaluation: Evaluation) -> list[str]:
    return ["retrained", "retrained_again"] if evaluation.second_pool else ["retrained"]


def wanted(evaluations: Sequence[Evaluation], methods: Sequence[Method]) -> tuple[int, int]:
    """The numbers of runs and of scores that are asked for."""
    pools = sum(len(kinds(evaluation)) + len(methods) for evaluation in evaluations)
    return pools * evaluations[0].runs, len(evaluations) * len(methods)


def kept(evaluations: Sequence[Evaluation], methods: Sequence[Method]) -> tuple[int, int]:
    """How many of them are here."""
    runs = scores = 0
    for evaluation in evaluations:
        pools = pools_of(evaluation, methods)
        runs += sum(evaluation.runs - len(pool.missing(range(evaluation.runs))) for pool in pools)
        for method, pool in zip(methods, pools[len(kinds(evaluation)) :], strict=False):
            scores += bool(evaluation.kept(method, evaluation.made_of(pool, pools[0])))
    return runs, scores


# What is sent


def place(path: Path) -> PurePosixPath:
    """Where a method's file lies in the kit that is uploaded."""
    path = path.resolve()
    return PurePosixPath(
        path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"asked/{path.stem}/{path.name}"
    )


def arguments_there(args: argparse.Namespace) -> list[str]:
    """evaluate.py's arguments at Kaggle, but for where the data and results are."""
    words = [*(str(place(Path(path))) for path in args.methods), "--split", args.split, "--runs", str(args.runs)]
    for name in ("model", "preset", "time_limit"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += [f"--{name.replace('_', '-')}" for name in ("second_pool", "attacks", "tuned") if getattr(args, name)]
    return [*words, "--set", *args.set] if args.set else words


def kit_files(evaluations: Sequence[Evaluation], methods: Sequence[Method]) -> dict[str, Path]:
    """The kit, the methods with the files they read, and what is kept here: name in the zip -> file."""
    found = {}
    for name in KIT:
        for path in visible([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"), ROOT):
            found[f"kit/{path.relative_to(ROOT).as_posix()}"] = path
    for method in methods:
        for path in [method.path, *method.files] if method.path else []:
            beside = path.resolve().relative_to(method.path.resolve().parent).as_posix()
            found[f"kit/{place(method.path).parent / beside}"] = path
    data, recipe = evaluations[0].data, evaluations[0].recipe
    original = original_path(data, recipe)
    found |= {f"kit/kept/data/{path.name}": path for path in (original, original_note(original)) if path.exists()}
    for evaluation in evaluations:
        for pool in pools_of(evaluation, methods):
            there = f"kit/kept/results/{pool.folder.relative_to(evaluation.setting.results).as_posix()}"
            found |= {f"{there}/{path.name}": path for path in pool.folder.iterdir() if OF_A_POOL.fullmatch(path.name)}
    return found


def data_files(evaluation: Evaluation) -> dict[str, Path]:
    """The data folder without its original network, which goes with the kit: so the data stay as they were uploaded."""
    folder = evaluation.folder.resolve()
    paths = [path for path in visible(folder.rglob("*"), folder) if not path.name.startswith("original_model")]
    return {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in paths}


def visible(paths, root: Path) -> list[Path]:
    """The files among them that are neither hidden nor Python's caches."""

    def hidden(path: Path) -> bool:
        return any(part[0] == "." or part == "__pycache__" for part in path.relative_to(root).parts)

    return sorted(path for path in paths if path.is_file() and not hidden(path))


def stage(folder: Path, data_set: str, title: str, files: Mapping[str, Path]) -> str:
    """Make the folder of a data set: a zip of files, and their digest in digest.txt. Returns the digest."""
    lines = [f"{entry} {hashlib.sha256(path.read_bytes()).hexdigest()}" for entry, path in sorted(files.items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    write_json(folder / "dataset-metadata.json", {"id": data_set, "title": title, "licenses": [{"name": "other"}]})
    note = folder / "digest.txt"
    if note.is_file() and note.read_text() == digest:
        return digest
    note.unlink(missing_ok=True)

    def pack(file) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for entry, path in files.items():
                archive.write(path, entry)

    write_atomically(folder / f"{folder.name}.zip", pack)
    write_bytes(note, digest.encode())
    return digest


def stage_notebook(
    folder: Path, kernel: str, data_sets: Sequence[str], own: Sequence[str], parameters: Mapping[str, object]
) -> None:
    """Make the folder that is pushed. own: the notebook itself, if its last output is to be attached."""
    metadata = read_json(HERE / "kernel-metadata.json") | {"id": kernel, "title": TITLE, "code_file": "evaluation.ipynb"}
    metadata |= {"dataset_sources": [*data_sets], "competition_sources": [], "kernel_sources": [*own]}
    write_json(folder / "kernel-metadata.json", metadata)
    text = build.build("evaluation", parameters="\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    write_bytes(folder / "evaluation.ipynb", text.encode())


def stage_data_sets(
    args: argparse.Namespace, user: str, evaluations: Sequence[Evaluation], methods: Sequence[Method]
) -> tuple[dict[str, str], dict[str, object]]:
    """Make the folders of the data sets that are not given. Returns the data sets' addresses, and the notebook's
    parameters with the digests of those that were made here."""
    name = evaluations[0].folder.resolve().name
    titles = {"kit": "Unlearning kit", "data": f"Unlearning data {slug(name).replace('-', ' ')}"[:50].strip()}
    given = {"kit": args.kit, "data": args.data_set}
    data_sets = {what: given[what] or f"{user}/{slug(title)}" for what, title in titles.items()}
    files = {"kit": partial(kit_files, evaluations, methods), "data": partial(data_files, evaluations[0])}
    digests = {
        what: stage(args.staging / what, data_sets[what], title, files[what]())
        for what, title in titles.items()
        if not given[what]
    }
    return data_sets, {"ARGUMENTS": arguments_there(args), "DATA": name, "CONTENT": digests, "HOURS": args.hours}


# At Kaggle


def make_at_kaggle(args: argparse.Namespace, evaluations: Sequence[Evaluation], methods: Sequence[Method]) -> None:
    """Session after session until everything is here. Raises Problem when one fails, or makes nothing."""
    user, goal = user_name(), wanted(evaluations, methods)
    kernel = f"{user}/{slug(TITLE)}"
    now, _ = status(kernel)
    data_sets, parameters = stage_data_sets(args, user, evaluations, methods)
    asked = {"arguments": parameters["ARGUMENTS"], "data": original_key(parameters)}
    waiting, uploaded, here = now in GOING_ON, False, kept(evaluations, methods)
    while True:
        if waiting:
            wait_for(kernel, args.every)
            now = "COMPLETE"
        state = fetch(kernel, args.staging / "output", evaluations, methods, asked["data"]) if now == "COMPLETE" else {}
        before, here = here, kept(evaluations, methods)
        print(f"{here[0]} of {goal[0]} runs and {here[1]} of {goal[1]} scores are here", flush=True)
        if here == goal:
            return
        if waiting and state | asked == state:  # else it was a run of another command
            if state["state"] == "failed":
                raise Problem(f"{kernel} failed: {state['error']}")
            if here == before:
                raise Problem(f"{kernel}: {NOTHING_NEW[state['state']]}")
        for what in [] if uploaded else parameters["CONTENT"]:
            upload(args.staging / what, data_sets[what], args.every)
        own = [kernel] if now == "COMPLETE" else []  # its last output, unless that run failed
        stage_notebook(args.staging / "notebook", kernel, data_sets.values(), own, parameters)
        push(args.staging / "notebook")
        waiting = uploaded = True
        time.sleep(args.every)


NOTHING_NEW = {
    "stopped": "the session made no run that is new here before its time was up; give it more --hours",
    "complete": "the session is complete, but what it made is not what is missing here: its kit or data differ from these",
}


def print_commands(args: argparse.Namespace, evaluations: Sequence[Evaluation], methods: Sequence[Method]) -> None:
    """What would be run; everything that would be sent is in --staging."""
    try:
        user = user_name()
    except Problem as problem:
        print(problem)
        user = os.environ.get("KAGGLE_USERNAME", "USER")
    kernel, notebook = f"{user}/{slug(TITLE)}", args.staging / "notebook"
    data_sets, parameters = stage_data_sets(args, user, evaluations, methods)
    stage_notebook(notebook, kernel, data_sets.values(), [], parameters)
    commands = [(status_command(kernel), "a run that is going on is waited for")]
    for what in parameters["CONTENT"]:
        folder = args.staging / what
        create, version = upload_commands(folder)
        commands += [
            (["datasets", "status", data_sets[what]], "is it there, and ready?"),
            (digest_command(folder, data_sets[what]), "is it unchanged?"),
            (create, "the first time"),
            (version, "if it has changed"),
        ]
    commands += [
        (push_command(notebook), ""),
        (status_command(kernel), "until it says COMPLETE"),
        (output_command(kernel, args.staging / "output"), "and again from the push, until all runs are here"),
    ]
    print("would run:")
    for words, why in commands:
        print(f"  kaggle {shlex.join(words)}" + (f"    # {why}" if why else ""))


def digest_command(folder: Path, data_set: str) -> list[str]:
    return ["datasets", "download", data_set, "-f", "digest.txt", "-p", str(folder.with_name("published")), "-o", "-q"]


def upload_commands(folder: Path) -> tuple[list[str], list[str]]:
    """The one that makes a data set, and the one that makes a new version of it."""
    digest = (folder / "digest.txt").read_text()
    return ["datasets", "create", "-p", str(folder), "-q"], ["datasets", "version", "-p", str(folder), "-m", digest, "-q"]


def output_command(kernel: str, folder: Path) -> list[str]:
    return ["kernels", "output", kernel, "-p", str(folder), "-o", "-q"]


def upload(folder: Path, data_set: str, seconds: float) -> None:
    """Upload a data set unless Kaggle has this content, and wait until it can be used."""
    digest, there = (folder / "digest.txt").read_text(), published(folder, data_set)
    if there == digest:
        print(f"{data_set}: unchanged")
        return
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{data_set}: uploading {size / 1e6:.1f} MB", flush=True)
    create, version = upload_commands(folder)
    said = kaggle(*(create if there is None else version))
    if "is being created" not in said:  # the command exits with 0 in any case
        raise Problem(f"{data_set}: {' '.join(said.split())}")
    while published(folder, data_set) != digest:
        time.sleep(seconds)


def published(folder: Path, data_set: str) -> str | None:
    """The digest of what Kaggle holds: None if there is no such data set, empty while it is being processed."""
    try:
        said = kaggle("datasets", "status", data_set).split()[-1]
    except Problem as problem:
        if ABSENT.search(str(problem)):
            return None
        raise
    if said == "failed":
        raise Problem(f"{data_set}: Kaggle could not process it: see https://www.kaggle.com/datasets/{data_set}")
    if said != "ready":
        return ""
    try:
        kaggle(*digest_command(folder, data_set))
        return (folder.with_name("published") / "digest.txt").read_text().strip()
    except (Problem, OSError) as error:
        raise Problem(f"{data_set}: its digest.txt cannot be read; did this kit make it? ({one_line(error)})") from error


# What comes back


def fetch(
    kernel: str, folder: Path, evaluations: Sequence[Evaluation], methods: Sequence[Method], key: str
) -> dict[str, object]:
    """Put what the notebook's last run made into the results here. Returns how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    kaggle(*output_command(kernel, folder))
    state = read_json(folder / "state.json")
    if {"state", "error", "arguments", "data"} - set(state):
        raise Problem(f"{folder}: holds no results of {kernel}; to begin anew: kaggle kernels delete {kernel}")
    take(folder / "results.zip", evaluations, methods, key)
    return state


def take(archive: Path, evaluations: Sequence[Evaluation], methods: Sequence[Method], key: str) -> None:
    """Add a results.zip to what is here. What is here stays; only what was asked for is taken. key: see `original_key`.

    Raises Problem, and takes nothing, when the zip is damaged or a name in it would leave its folder."""
    try:
        with zipfile.ZipFile(archive) as entries:
            damaged = entries.testzip()
            if damaged:
                raise Problem(f"{archive}: {damaged} is damaged; run again to fetch it again")
            for name in entries.namelist():
                if PurePosixPath(name).is_absolute() or {"..", "\\"} & {*PurePosixPath(name).parts, *name}:
                    raise Problem(f"{archive}: {name!r} would leave its folder; nothing was taken")
            take_original(entries, evaluations[0], key)
            for evaluation in evaluations:
                with evaluation.alone():
                    take_results(entries, evaluation, methods)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Problem(f"{archive}: not a whole zip file ({one_line(error)}); run again to fetch it again") from error


def original_key(parameters: Mapping[str, object]) -> str:
    """The folder of the original network in a results.zip, which tells these data from others."""
    return parameters["CONTENT"].get("data", parameters["DATA"])


def take_original(entries: zipfile.ZipFile, evaluation: Evaluation, key: str) -> None:
    path = original_path(evaluation.data, evaluation.recipe)
    for file in (original_note(path), path):  # the note first: without it, the network would count as given
        if not path.exists() and f"data/{key}/{file.name}" in entries.namelist():
            write_bytes(file, entries.read(f"data/{key}/{file.name}"))


def take_results(entries: zipfile.ZipFile, evaluation: Evaluation, methods: Sequence[Method]) -> None:
    """The runs that are missing in the pools, and the methods' scores where those here are not of these runs."""
    results, pools = evaluation.setting.results, pools_of(evaluation, methods)
    for pool in pools:
        there = f"results/{pool.folder.relative_to(results).as_posix()}/"
        for name in entries.namelist():
            file = pool.folder / name.removeprefix(there)
            if name.startswith(there) and OF_A_POOL.fullmatch(name.removeprefix(there)) and not file.exists():
                write_bytes(file, entries.read(name))
    for method, pool in zip(methods, pools[len(kinds(evaluation)) :], strict=False):
        folder, made_of = evaluation.setting.results_of(evaluation.data, method.name), evaluation.made_of(pool, pools[0])
        there = f"results/{folder.relative_to(results).as_posix()}"
        if {f"{there}/summary.json", f"{there}/examples.csv"} - set(entries.namelist()):
            continue
        summary = json.loads(entries.read(f"{there}/summary.json"))
        if summary.get("made_of") == made_of and not evaluation.kept(method, made_of):
            (folder / "summary.json").unlink(missing_ok=True)  # a table is never beside a summary it does not belong to
            write_bytes(folder / "examples.csv", entries.read(f"{there}/examples.csv"))
            write_summary(folder, summary | {"path": str(method.path)})


if __name__ == "__main__":
    sys.exit(main())
