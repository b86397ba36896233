"""Retrained pools in one file: made once and used by many, or made in parts on many machines.

The file is a zip:

    pool.json                   what the pools were made from, which runs they hold, and a checksum of every other entry
    original_model.pth          the network to unlearn from, and original_model.json if it was trained by the recipe
    <split>/run_00000.npz       what a retrained network answers, as a pool keeps it
    <split>/network_00000.pth   its weights, if they were asked for

Nothing in a file is trusted: names, sizes, checksums, shapes and values are checked before anything is written, no name in
the file decides where, and arrays and weights are read without pickle.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from evaluator.evaluation import MOST_RUNS, Evaluation
from evaluator.files import Problem, one_line, read_json, write_atomically, write_bytes
from evaluator.models import load_network, network_digest
from evaluator.pool import RETAIN_CONFIDENCES, Pool, read_run
from evaluator.runs import retrained_pool
from evaluator.scoring import processor, versions
from evaluator.training import image_size, original_is_given, original_note, original_path

FORMAT = 1  # of the file
MANIFEST, ORIGINAL, NOTE = "pool.json", "original_model.pth", "original_model.json"
LARGEST_TEXT = 20_000_000  # bytes of a manifest or note


def make(evaluation: Evaluation, first: int, count: int) -> Pool:
    """Make the retrained networks `first` to `first + count - 1` where they are missing."""
    with evaluation.alone():
        return retrained_pool(evaluation.setting, evaluation.data, evaluation.recipe, count, first=first)


def export(file: Path, evaluations: Sequence[Evaluation], runs: range, networks: bool = False) -> dict[str, list[int]]:
    """Write the kept retrained runs whose numbers are in `runs`, and the original, to a file. Returns the numbers by split.

    evaluations: of one data set, one for each split. networks: also the weights.
    Raises Problem when there is no such run, a run is damaged, weights were not kept, or the file is there and is no zip.
    """
    if file.exists() and not zipfile.is_zipfile(file):
        raise Problem(f"{file}: is there already and is not a file of pools; name another")
    first = evaluations[0]
    first.original()  # trained if there is none
    original = original_path(first.data, first.recipe)
    entries = {ORIGINAL: original}
    if not original_is_given(first.data, first.recipe):
        entries[NOTE] = original_note(original)
    pools = {}
    for evaluation in evaluations:
        pool, split = make(evaluation, 0, 0), evaluation.data.split
        numbers = [run for run in pool.kept() if run in runs]
        if not numbers:
            raise Problem(f"{pool.folder}: none of these runs has been made yet: python evaluate.py pool make")
        pool.load(numbers)  # names a damaged one
        if networks and (missing := pool.missing(numbers, networks)):
            raise Problem(f"{pool.network_path(missing[0])}: was not kept; make the runs anew with --keep-networks")
        for run in numbers:
            for path in (pool.path(run), pool.network_path(run))[: 1 + networks]:
                entries[f"{split}/{path.name}"] = path
        pools[split] = {"made_from": read_json(pool.made_from), "runs": numbers}
    manifest = {
        "format": FORMAT,
        "data": first.data.name,
        "note": first.data.note,
        "made_on": {**versions(), "machine": processor()},
        "pools": pools,
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in entries.items()},
    }

    def write(out) -> None:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST, json.dumps(manifest, indent=1))
            for name, path in entries.items():
                archive.write(path, name)

    write_atomically(file, write)
    return {split: pool["runs"] for split, pool in pools.items()}


@dataclass(frozen=True)
class Imported:
    """What came into one split's pool: the runs that were new, and those that were there and stay as they are."""

    evaluation: Evaluation
    new: list[int]
    there: list[int]


def import_(file: Path, evaluation_of: Callable[[str], Evaluation]) -> tuple[list[Imported], str]:
    """Add the runs of a file to the pools here, and its original if there is none.

    evaluation_of: the evaluation of a split here. Returns what came, and a sentence about the original.
    Raises Problem when the file cannot be read, is not a pool's, is damaged, or was made from other things; nothing is
    written then.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _import(_Parcel(file, archive), evaluation_of)
    except (OSError, zipfile.BadZipFile) as error:
        raise Problem(f"{file}: not a readable pool file ({one_line(error)})") from error


def _import(parcel: "_Parcel", evaluation_of: Callable[[str], Evaluation]) -> tuple[list[Imported], str]:
    with ExitStack() as locks:
        evaluations = [evaluation_of(split) for split in parcel.runs]
        for evaluation in evaluations:
            if parcel.data != evaluation.data.name:
                raise Problem(f"{parcel.file}: holds pools of {parcel.data}, not of {evaluation.data.name}: give --data")
            locks.enter_context(evaluation.alone())
        pools = [make(evaluation, 0, 0) for evaluation in evaluations]
        for evaluation, pool in zip(evaluations, pools, strict=True):
            parcel.must_be_for(evaluation, read_json(pool.made_from))
            for run in parcel.runs[evaluation.data.split]:
                parcel.run(evaluation, run)
                parcel.weights(evaluation, run)
        said = _take_original(parcel, evaluations[0])
        found = []
        for evaluation, pool in zip(evaluations, pools, strict=True):
            new = pool.missing(parcel.runs[evaluation.data.split])
            for run in new:
                weights = parcel.weights(evaluation, run)
                if weights is not None:
                    write_bytes(pool.network_path(run), weights)
                pool.save(run, parcel.run(evaluation, run))
            there = [run for run in parcel.runs[evaluation.data.split] if run not in new]
            found.append(Imported(evaluation, new, there))
        return found, said


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    known = set(numbers)
    starts, ends = ([number for number in numbers if number + step not in known] for step in (-1, 1))
    parts = [f"{start} to {end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True)]
    return ", ".join(parts) or "none"


def _take_original(parcel: "_Parcel", evaluation: Evaluation) -> str:
    """Write the file's original into the data folder if there is none. Returns what was done, in words."""
    path = original_path(evaluation.data, evaluation.recipe)
    content, theirs = parcel.network(ORIGINAL, evaluation)
    note = parcel.read(NOTE, LARGEST_TEXT) if NOTE in parcel.entries else None
    if path.exists():
        same = network_digest(evaluation.original()) == network_digest(theirs)
        return f"{path} is the same" if same else f"{path} is another one and stays; delete it and import again for theirs"
    if note is not None:
        write_bytes(original_note(path), note)
    write_bytes(path, content)
    return f"{path} was written"


class _Parcel:
    """An open file of pools, which is not to be trusted.

    data: the name of the data. runs: the numbers of the runs of each split.
    """

    def __init__(self, file: Path, archive: zipfile.ZipFile):
        self.file, self.archive = file, archive
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        self.data, self.made_from, self.runs, self.sums = self._manifest()
        names = {MANIFEST, ORIGINAL, *({NOTE} & set(self.entries))}
        for split, runs in self.runs.items():
            names |= {f"{split}/run_{run:05d}.npz" for run in runs}
            networks = {f"{split}/network_{run:05d}.pth" for run in runs}
            names |= networks if networks & set(self.entries) else set()
        odd = sorted(names ^ set(self.entries))
        if odd or len(archive.infolist()) != len(names):
            what = odd[0] if odd else "an entry twice"
            raise Problem(f"{file}: {'lacks' if odd and what in names else 'holds'} {what}; not a file of pools, or damaged")

    def _manifest(self) -> tuple[str, dict[str, dict], dict[str, list[int]], dict[str, str]]:
        try:
            if MANIFEST not in self.entries:
                raise ValueError(f"it holds no {MANIFEST}")
            manifest = json.loads(self.read(MANIFEST, LARGEST_TEXT, summed=False))
            if manifest["format"] != FORMAT:
                raise Problem(
                    f"{self.file}: has format {manifest['format']!r}, this kit reads {FORMAT}: use the same version"
                )
            data, pools, sums = manifest["data"], manifest["pools"], manifest["sha256"]
            runs = {split: pool["runs"] for split, pool in pools.items()}
            made_from = {split: dict(pool["made_from"]) for split, pool in pools.items()}
            for numbers in runs.values():
                if numbers != sorted(set(numbers)) or not all(type(run) is int and 0 <= run < MOST_RUNS for run in numbers):
                    raise ValueError("the numbers of its runs are not those of runs")
            if not (runs and isinstance(data, str) and isinstance(sums, dict)):
                raise ValueError("it names no data or no pool")
            return data, made_from, runs, sums
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Problem(f"{self.file}: not a file of pools ({one_line(error)})") from error

    def must_be_for(self, evaluation: Evaluation, here: dict) -> None:
        """Raises Problem unless the pool was made from what a pool here is made from."""
        split, folder = evaluation.data.split, evaluation.folder
        theirs = self.made_from[split]
        if theirs == here:
            return
        if theirs.get("format") != here["format"]:
            raise Problem(f"{self.file}: its runs were made by a version of the kit whose runs differ from this one's")
        if theirs.get("data") != here["data"]:
            raise Problem(f"{self.file}: {split}: made for other images or labels than those of {folder}")
        recipe = theirs.get("recipe") if isinstance(theirs.get("recipe"), dict) else {}
        for name in [*here["recipe"], *recipe]:
            if recipe.get(name) != here["recipe"].get(name):
                values = f"{name} was {recipe.get(name)!r}, here it is {here['recipe'].get(name)!r}"
                raise Problem(f"{self.file}: {split}: made with another recipe than that of {folder} ({values})")
        raise Problem(f"{self.file}: {split}: not a pool of retrained networks")

    def read(self, name: str, most: int, summed: bool = True) -> bytes:
        """An entry's content. Raises Problem when it is damaged or has more than `most` bytes."""
        entry = self.entries[name]
        if entry.file_size > most:
            raise Problem(f"{self.file}: {name} has {entry.file_size:,} bytes, more than it can need")
        try:
            content = self.archive.read(entry)
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise Problem(f"{self.file}: {name} is cut off or damaged ({one_line(error)})") from error
        if summed and hashlib.sha256(content).hexdigest() != self.sums.get(name):
            raise Problem(f"{self.file}: {name} does not have the checksum that {MANIFEST} gives it")
        return content

    def run(self, evaluation: Evaluation, run: int) -> dict[str, np.ndarray]:
        """A run's values. Raises Problem when they are not what a network could answer to these data."""
        data, name = evaluation.data, f"{evaluation.data.split}/run_{run:05d}.npz"
        kept = min(RETAIN_CONFIDENCES, len(data.retain))
        expected = {
            "forget_logits": ((len(data.forget), data.classes), np.float32),
            "retain_confidences": ((kept,), np.float32),
            **dict.fromkeys(("ra", "va", "ta", "seconds"), ((), np.float64)),
        }
        most = 4 * len(data.forget) * data.classes + 4 * kept + 10_000
        content = self.read(name, most)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as inside:
                if sum(entry.file_size for entry in inside.infolist()) > most:
                    raise ValueError("it holds more than a run")
            values = read_run(io.BytesIO(content))
            for key in [*expected, *values]:
                found = (values[key].shape, values[key].dtype) if key in values else None
                if found != expected.get(key):
                    raise ValueError(f"{key} has not the shape and type of this forget set's")
            if not all(np.isfinite(value).all() for value in values.values()):
                raise ValueError("a value is not finite")
            if not all(0 <= values[key] <= 1 for key in ("ra", "va", "ta")):
                raise ValueError("an accuracy is not between 0 and 1")
        except (ValueError, zipfile.BadZipFile) as error:
            raise Problem(f"{self.file}: {name} is not a run of these data ({one_line(error)})") from error
        return values

    def weights(self, evaluation: Evaluation, run: int) -> bytes | None:
        """The content of the file of a run's weights, if there is one. Raises Problem when they do not fit the network."""
        name = f"{evaluation.data.split}/network_{run:05d}.pth"
        return self.network(name, evaluation)[0] if name in self.entries else None

    def network(self, name: str, evaluation: Evaluation) -> tuple[bytes, nn.Module]:
        """The content of a file of weights, and the network. Raises Problem when they do not fit it."""
        net = evaluation.recipe.network(evaluation.data.classes, image_size(evaluation.data))
        size = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
        content = self.read(name, 2 * size + 1_000_000)
        load_network(net, self.file / name, io.BytesIO(content))
        return content, net
