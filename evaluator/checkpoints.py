"""Existing unlearned networks: the checkpoints in a submission.zip, scored like runs of a method."""

import copy
import hashlib
import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from torch import nn

from evaluator.data import Data
from evaluator.files import Problem, one_line
from evaluator.models import load_network
from evaluator.training import Recipe


@dataclass(frozen=True)
class Checkpoints:
    """A zip of unlearned_checkpoint_0.pth to unlearned_checkpoint_{N-1}.pth, in any folder of it."""

    path: Path
    entries: dict[int, str]  # run -> name in the zip
    digest: str  # of the entries' names, sizes and checksums

    @classmethod
    def read(cls, path: Path, runs: int) -> "Checkpoints":
        """Raises Problem unless the zip is complete and holds exactly `runs` checkpoints."""
        try:
            with zipfile.ZipFile(path) as archive:
                listed = [entry for entry in archive.infolist() if not entry.is_dir()]
        except (OSError, zipfile.BadZipFile) as error:
            raise Problem(f"{path}: not a readable zip file ({error})") from error
        entries = {}
        for entry in listed:
            number = re.fullmatch(r"unlearned_checkpoint_(\d+)\.pth", PurePosixPath(entry.filename).name)
            if number is None:
                raise Problem(f"{path}: {entry.filename} is not an unlearned_checkpoint_<run>.pth")
            entries[int(number[1])] = entry.filename
        if set(entries) != set(range(runs)) or len(listed) != runs:
            odd = sorted(set(entries) ^ set(range(runs)))
            one = (
                f"; unlearned_checkpoint_{odd[0]}.pth is {'not expected' if odd[0] in entries else 'missing'}" if odd else ""
            )
            raise Problem(f"{path}: holds {len(listed)} files; --runs {runs} needs exactly {runs} checkpoints{one}")
        digest = hashlib.sha256(repr(sorted((e.filename, e.file_size, e.CRC) for e in listed)).encode()).hexdigest()
        return cls(Path(path), entries, digest)

    config: ClassVar[dict] = {}
    ensemble: ClassVar[bool] = False
    timed: ClassVar[bool] = False  # nobody knows what existing networks cost

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def made_from(self) -> dict:
        return {"zip": self.digest}

    def networks(
        self, original: nn.Module, runs: list[int], data: Data, recipe: Recipe, time_limit: float | None = None
    ) -> tuple[nn.Module, float]:
        """The network of one run. Raises Problem naming the entry that cannot be used."""
        (run,) = runs
        if Checkpoints.read(self.path, len(self.entries)).digest != self.digest:
            raise Problem(f"{self.path}: changed while it was being scored; run again")
        where = self.path / self.entries[run]
        try:
            with zipfile.ZipFile(self.path) as archive:
                content = archive.read(self.entries[run])
        except (OSError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise Problem(f"{where}: cut off or damaged ({one_line(error)})") from error
        net = copy.deepcopy(original)
        load_network(net, where, io.BytesIO(content))
        return net, math.nan
