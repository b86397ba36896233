"""What is kept of N networks, on disk: a small file per run, complete or absent, so that a pool can always be resumed."""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from evaluator.data import Data, Examples
from evaluator.ensemble import Ensemble
from evaluator.files import Problem, read_json, write_atomically, write_bytes, write_json
from evaluator.metric import logit_scaled_confidence

FORMAT = 2  # raise it when the same inputs would give different runs, or different values of a run are kept
RETAIN_CONFIDENCES = 1000  # of a run: at most this many retain examples' confidences are kept
IMAGES_AT_ONCE = 2048  # when networks are evaluated


class Pool:
    """A folder of runs that were all made from the same things.

    folder/<key>/run_00000.npz holds what `answers` returns for one network, and its `seconds`.
    made_from: everything that decides a run's result except its number; the key is its hash, so that different
    hyperparameters, data or recipes get different folders. It is kept beside the runs as made_from.json, for people to read.
    """

    def __init__(self, folder: Path, made_from: dict):
        text = json.dumps(made_from | {"format": FORMAT}, sort_keys=True, indent=1).encode()
        self.folder = folder / hashlib.sha256(text).hexdigest()[:12]
        self.made_from = self.folder / "made_from.json"
        if not self.made_from.is_file() or self.made_from.read_bytes() != text:
            write_bytes(self.made_from, text)

    def path(self, run: int) -> Path:
        return self.folder / f"run_{run:05d}.npz"

    def network_path(self, run: int) -> Path:
        """The file of its weights, if they are kept."""
        return self.folder / f"network_{run:05d}.pth"

    def missing(self, runs: Iterable[int], networks: bool = False) -> list[int]:
        """The runs that are missing; networks: also those whose weights are missing."""
        files = (self.path, self.network_path) if networks else (self.path,)
        return [run for run in runs if not all(file(run).exists() for file in files)]

    def kept(self) -> list[int]:
        """The runs that are there."""
        return sorted(int(path.stem.removeprefix("run_")) for path in self.folder.glob("run_*.npz"))

    def save(self, run: int, values: dict[str, np.ndarray]) -> None:
        write_atomically(self.path(run), lambda file: np.savez(file, **values))

    def load(self, runs: Sequence[int]) -> dict[str, Tensor]:
        """The runs' values, stacked: [runs, ...]. Raises Problem naming a file that is not a complete run of this pool."""
        kept, first = [], None
        for run in runs:
            try:
                values = read_run(self.path(run))
            except ValueError as error:
                raise self._damaged(run) from error
            shapes = {name: (value.shape, value.dtype) for name, value in values.items()}
            first = first or shapes
            if "forget_logits" not in shapes or shapes != first:
                raise self._damaged(run)
            kept.append(values)
        return {name: torch.from_numpy(np.stack([values[name] for values in kept])) for name in kept[0]}

    def _damaged(self, run: int) -> Problem:
        return Problem(f"{self.path(run)}: cut off or damaged; delete it and run again: only this run is redone")

    def number(self, name: str, measure: Callable[[], float]) -> float:
        """A number about the pool that is computed once and kept beside its runs, as <name>.json."""
        path = self.folder / f"{name}.json"
        kept = read_json(path).get("value")
        if not isinstance(kept, float) or not math.isfinite(kept):
            kept = float(measure())
            write_json(path, {"value": kept})
        return kept


def read_run(file: Path | BinaryIO) -> dict[str, np.ndarray]:
    """The values in a run's file. Raises ValueError when it is not one."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(str(error)) from error


@torch.inference_mode()
def answers(net: nn.Module, data: Data) -> dict[str, np.ndarray]:
    """What a pool keeps of each of K networks: forget_logits [K, forget, classes] and retain_confidences
    [K, at most 1000] in float32; ra, va, ta (accuracy on retain, validation and test) [K] in float64."""
    net.eval()
    retain = _logits(net, data.retain)
    kept = torch.linspace(0, len(data.retain) - 1, min(RETAIN_CONFIDENCES, len(data.retain))).round().long()
    kept = kept.to(retain.device)
    confidences = logit_scaled_confidence(retain[:, kept], data.retain.age_group[kept])
    values = {"forget_logits": _logits(net, data.forget), "retain_confidences": confidences.float()}
    held_out = _logits(net, data.held_out)
    for name, logits, examples in (
        ("ra", retain, data.retain),
        ("va", _logits(net, data.validation), data.validation),
        ("ta", held_out, data.held_out),
    ):
        values[name] = (logits.argmax(-1) == examples.age_group).double().mean(1)
    return {name: value.cpu().numpy() for name, value in values.items()}


def _logits(net: nn.Module, examples: Examples) -> Tensor:
    """[K, examples, classes]; all members of an ensemble see the same images."""
    size = len(net.members) if isinstance(net, Ensemble) else 1
    parts = examples.images.split(max(1, IMAGES_AT_ONCE // size))
    return torch.cat([net(part.float().repeat(size, 1, 1, 1)).unflatten(0, (size, -1)) for part in parts], dim=1)
