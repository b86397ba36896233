"""Unlearned networks that exist already: the checkpoints in a submission.zip, scored like runs of a method."""

import copy
import dataclasses
import functools
import hashlib
import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from evaluator.data import Data
from evaluator.files import Problem
from evaluator.models import load_network
from evaluator.pool import Pool
from evaluator.runs import Setting, work_through
from evaluator.training import Recipe, answers, one_thread, original_network


@dataclass(frozen=True)
class Checkpoints:
    """A zip of unlearned_checkpoint_0.pth to unlearned_checkpoint_{N-1}.pth, in any folder of it."""

    path: Path
    entries: dict[int, str]  # run -> name in the zip
    digest: str  # of the entries' names, sizes and checksums

    @classmethod
    def read(cls, path: Path, runs: int) -> "Checkpoints":
        """Raises Problem unless the zip is whole and holds exactly `runs` checkpoints."""
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
            raise Problem(f"{path}: holds {len(listed)} files, --runs {runs} needs exactly {runs} checkpoints{one}")
        digest = hashlib.sha256(repr(sorted((e.filename, e.file_size, e.CRC) for e in listed)).encode()).hexdigest()
        return cls(Path(path), entries, digest)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict:
        return {}

    def pool(self, setting: Setting, data: Data, recipe: Recipe, runs: int) -> Pool:
        """What the networks answer. Raises Problem naming the entry that cannot be used; those before it are kept."""
        made_from = {"kind": "checkpoints", "data": data.digest, "recipe": dataclasses.asdict(recipe), "zip": self.digest}
        pool = Pool(setting.results_of(data, self.name), made_from)
        ask = functools.partial(_ask, setting, pool, recipe, self)
        work_through(setting, pool, runs, self.name, [[run] for run in pool.missing(range(runs))], ask)
        return pool


def _ask(setting: Setting, pool: Pool, recipe: Recipe, checkpoints: Checkpoints, task: list[int]) -> int | Problem:
    try:
        with one_thread(), zipfile.ZipFile(checkpoints.path) as archive:
            data = setting.load()
            (run,) = task
            where = checkpoints.path / checkpoints.entries[run]
            try:
                content = archive.read(checkpoints.entries[run])
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise Problem(f"{where}: cut off or damaged ({error})") from error
            net = copy.deepcopy(original_network(data, recipe))
            load_network(net, where, io.BytesIO(content))
            asked = answers(net, data)
            for name, value in asked.items():
                if not np.isfinite(value).all():
                    raise Problem(f"{where}: {name} holds a value that is not finite")
            pool.save(run, {name: value[0] for name, value in asked.items()} | {"seconds": np.array(np.nan)})
        return 1
    except Problem as problem:
        return problem
