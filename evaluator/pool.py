"""What is kept of N networks, on disk: one small file a run, whole or not there, so that any interruption can be resumed."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluator.files import Problem, read_json, write_atomically, write_json


class Pool:
    """A folder of runs that were all made from the same things.

    folder/<key>/run_00000.npz holds what `evaluator.training.answers` says of one network, and its `seconds`.
    made_from: everything that decides a run's result but its number; the key is a hash of it, so that other
    hyperparameters, data or recipes have other folders. It is kept beside the runs as made_from.json, for people.
    """

    def __init__(self, folder: Path, made_from: dict):
        text = json.dumps(made_from, sort_keys=True, indent=1, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        if not (self.folder / "made_from.json").exists():
            write_atomically(self.folder / "made_from.json", lambda file: file.write(text.encode()))

    def path(self, run: int) -> Path:
        return self.folder / f"run_{run:05d}.npz"

    def network_path(self, run: int) -> Path:
        """Of its weights, where they are kept."""
        return self.folder / f"network_{run:05d}.pth"

    def missing(self, runs: Iterable[int], networks: bool = False) -> list[int]:
        """The runs that are not there; networks: or whose networks are not."""
        files = (self.path, self.network_path) if networks else (self.path,)
        return [run for run in runs if not all(file(run).exists() for file in files)]

    def save(self, run: int, values: dict[str, np.ndarray]) -> None:
        write_atomically(self.path(run), lambda file: np.savez(file, **values))

    def load(self, runs: Sequence[int]) -> dict[str, Tensor]:
        """The runs' values, stacked: [runs, ...]. Raises Problem naming a file that is not whole."""
        kept = []
        for run in runs:
            try:
                with np.load(self.path(run), allow_pickle=False) as file:
                    kept.append({name: file[name] for name in file.files})
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                raise Problem(
                    f"{self.path(run)}: cut off or damaged; delete it and run again to redo this run alone"
                ) from error
        return {name: torch.from_numpy(np.stack([values[name] for values in kept])) for name in kept[0]}

    def number(self, name: str, measure: Callable[[], float]) -> float:
        """A number about the pool that is worked out once and kept beside its runs, as <name>.json."""
        path = self.folder / f"{name}.json"
        kept = read_json(path)
        if kept is None:
            kept = {"value": measure()}
            write_json(path, kept)
        return kept["value"]
