"""A method: how it is found and loaded by content, its Config, the guarded call, and what a run must leave behind.

A user's code runs only in processes of its own (see evaluator.processes); each serves one method.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from evaluator.data import Data, Loader
from evaluator.ensemble import Ensemble
from evaluator.files import Problem, code_digest, one_line, write_bytes
from evaluator.models import state_misfit
from evaluator.notebook import method_statements
from evaluator.processes import in_process
from evaluator.training import Recipe, generators, worker_seconds

# What a method must not leave changed: the next run in the same process would start differently.
GLOBAL_SETTINGS = {
    "torch's default dtype": torch.get_default_dtype,
    "torch's default device": torch.get_default_device,
    "whether torch computes gradients": torch.is_grad_enabled,
    "torch's number of threads": torch.get_num_threads,
    "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "torch's precision of float32 products": torch.get_float32_matmul_precision,
    "torch's anomaly detection": torch.is_anomaly_enabled,
    "the working folder": os.getcwd,
}
RESERVED = ("retrained", "retrained_again", "no_unlearning", "tuning")  # folders beside a method's, under results/


class Diverged(Problem):
    """A network whose weights or outputs are not finite."""


@dataclass(frozen=True)
class Method:
    """A file with `unlearning`, and the values of its Config (none if it has no Config)."""

    path: Path | None  # None: no unlearning, the original as it is
    name: str
    config: dict
    defaults: dict = dataclasses.field(default_factory=dict)  # of its Config
    presets: tuple[str, ...] = ()
    search_space: dict = dataclasses.field(default_factory=dict)  # field -> the range or choices in its annotation
    ensemble: bool = False  # whether K networks may be handed over as one
    digest: str = ""  # of its code, and of the files beside it that it reads when imported
    files: tuple[Path, ...] = ()  # those files
    contents: tuple[tuple[str, bytes], ...] = ()  # its own and theirs, with names from its folder, if they are sent along

    @classmethod
    def read(
        cls, path: Path | str, data_name: str | None = None, values: dict | None = None, preset: str | None = None
    ) -> "Method":
        """Read a method file as it is now.

        data_name: the preset with this name is used if there is one. preset: this preset is used, and must exist. values:
        Config fields set on top. Raises Problem when the file cannot be read or run, has no `unlearning`, or a preset,
        a field or a value cannot be used.
        """
        path = Path(path)
        if path.stem in RESERVED:
            raise Problem(f"{path}: a method cannot be called {path.stem}: that name is taken by a folder of results")
        found = in_process(_Description(path.resolve(), data_name, values or {}, preset), None, f"{path}: importing it")
        return cls(path, path.stem, **found)

    @property
    def made_from(self) -> dict:
        """What decides a run's result, apart from its number, the data, the recipe and the original."""
        return {"method": self.digest, "config": self.config}

    def packed(self) -> "Method":
        """The same with its files' contents, for a machine that does not have them."""
        if not self.path:
            return self
        path = self.path.resolve()
        named = [(str(file.relative_to(path.parent)), file.read_bytes()) for file in (path, *self.files)]
        return dataclasses.replace(self, contents=tuple(named))

    timed: typing.ClassVar[bool] = True  # whether a run's cost can be measured

    def networks(
        self, original: nn.Module, runs: list[int], data: Data, recipe: Recipe, time_limit: float | None = None
    ) -> tuple[nn.Module, float]:
        """Make runs of the method: (one network, or an Ensemble with a member for each run; the seconds they took together).

        Raises Problem when the method breaks its contract. To be called in a process that serves this method alone.
        """
        device = data.retain.images.device
        if self.ensemble and recipe.networks_at_once > 1:
            net = Ensemble(original, len(runs), generators(runs, device))
        else:
            net = copy.deepcopy(original)
        loaded = _load(_unpacked(self.contents) if self.contents else self.path.resolve())
        if loaded.digest() != self.digest:
            raise Problem(f"{self.path}: it or a file it reads changed while it was being scored; run again")
        examples = {name: getattr(data, name) for name in ("retain", "forget", "validation")}
        loaders = [Loader(part, recipe.batch_size, getattr(net, "generators", [None])) for part in examples.values()]
        untouched = {name: part.clone() for name, part in examples.items()}
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(runs[0])
        who = f"{self.path}: {run_names(runs)}"
        start = worker_seconds(device)
        with _guarded(f"{who}: unlearning()", loaded.path, time_limit and time_limit * len(runs)):
            config = [loaded.module.Config(**self.config)] if hasattr(loaded.module, "Config") else []
            returned = loaded.module.unlearning(net, *loaders, *config)
        seconds = worker_seconds(device) - start
        if returned is not None:
            raise Problem(
                f"{who}: unlearning() returned a {type(returned).__name__}; it must edit `net` in place and return None"
            )
        for name, part in examples.items():
            if not part.equals(untouched[name]):
                raise Problem(f"{who}: unlearning() changed the tensors of the {name} loader")
        late = loaded.read_late()
        if late:
            raise Problem(f"{who}: unlearning() reads {late}; read it at the top of the file, so that edits to it count")
        try:
            return self._checked(net, original, runs), seconds
        except Problem:
            raise
        except Exception as error:
            raise Problem(f"{who}: what unlearning() left is no longer a usable network: {one_line(error)}") from error

    def _checked(self, net: nn.Module, original: nn.Module, runs: list[int]) -> nn.Module:
        """The networks' state dicts, loaded into fresh networks: what a checkpoint would keep, and nothing else."""
        members = net.members if isinstance(net, Ensemble) else [net]
        if len(members) != len(runs):
            raise Problem(f"{self.path}: {run_names(runs)}: unlearning() left {len(members)} members")
        for run, member in zip(runs, members, strict=True):
            who = f"{self.path}: run {run}"
            state = member.state_dict()
            misfit = state_misfit(original, state)
            if misfit:
                raise Problem(f"{who}: the network does not match the original: {misfit}")
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    raise Diverged(f"{who}: unlearning() left NaN or infinite values in '{name}'")
            if any(module.training for module in member.modules()):
                raise Problem(f"{who}: unlearning() left the network in train mode; end with net.eval()")
        if isinstance(net, Ensemble) and (torn := net.torn()):
            raise Problem(
                f"{self.path}: {run_names(runs)}: '{torn}' of a member is no longer part of the ensemble; "
                "edit tensors in place (copy_, add_), or leave out ENSEMBLE"
            )
        fresh = _fresh(original, len(runs) if isinstance(net, Ensemble) else 0)
        for clean, member in zip(getattr(fresh, "members", [fresh]), members, strict=True):
            clean.load_state_dict(member.state_dict())
        return fresh.eval()


NO_UNLEARNING = Method(None, "no_unlearning", {})


@functools.cache
def _fresh(original: nn.Module, size: int) -> nn.Module:
    """A network to load a state dict into, or an Ensemble of `size` such; made once per process, because that is slow."""
    return Ensemble(original, size) if size else copy.deepcopy(original)


def check_distinct(methods: Iterable) -> None:
    """Raises Problem when two methods, or checkpoints, have the same name: their results would be mixed up."""
    paths = {}
    for method in methods:
        if method.name in paths:
            raise Problem(f"{paths[method.name]} and {method.path}: have the same name; rename one or score them separately")
        paths[method.name] = method.path


def run_names(runs: list[int]) -> str:
    return f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} to {runs[-1]}"


# What follows runs a user's code.


@dataclass(frozen=True)
class _Description:
    """Run by `Method.read` in a new process: reads the method's fields there."""

    path: Path
    data_name: str | None
    values: dict
    preset: str | None

    def __call__(self, _) -> dict:
        loaded = _load(self.path)
        module = loaded.module
        found = {
            "ensemble": bool(getattr(module, "ENSEMBLE", False)),
            "digest": loaded.digest(),
            "files": tuple(sorted(loaded.files)),
        }
        kind = getattr(module, "Config", None)
        if kind is None:
            if self.values or self.preset:
                raise Problem(f"{self.path}: has no Config for {', '.join([*self.values, *filter(None, [self.preset])])}")
            return found | {"config": {}}
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise Problem(f"{self.path}: Config must be a dataclass")
        presets = getattr(module, "PRESETS", {})
        with _guarded(f"{self.path}: Config", self.path):
            config = dataclasses.asdict(self._replaced(self._chosen(module, presets)))
            hints = typing.get_type_hints(kind, include_extras=True)
        for field, value in config.items():
            if not _is_plain(value):
                raise Problem(f"{self.path}: Config: {field} is a {type(value).__name__}; use numbers, text or tuples")
        ranges = {field: hint.__metadata__[0] for field, hint in hints.items() if hasattr(hint, "__metadata__")}
        space = {field: allowed for field, allowed in ranges.items() if isinstance(allowed, list | tuple)}
        defaults = dataclasses.asdict(kind())
        return found | {"config": config, "defaults": defaults, "presets": tuple(presets), "search_space": space}

    def _chosen(self, module: ModuleType, presets: dict) -> object:
        """The Config that the method would use here, before individual values are set."""
        if self.path.suffix == ".ipynb" and hasattr(module, "config"):  # a notebook's hyperparameters are those in it
            if self.preset:
                raise Problem(f"{self.path}: --preset {self.preset}: a notebook is scored with its own values; use --set")
            return module.config
        if self.preset and self.preset not in presets:
            raise Problem(f"{self.path}: no preset '{self.preset}'; there are: {', '.join(presets) or 'none'}")
        return presets.get(self.preset or self.data_name) or module.Config()

    def _replaced(self, config: object) -> object:
        hints = typing.get_type_hints(type(config))
        # JSON and the command line give a list where the field is a tuple.
        values = {field: tuple(value) if isinstance(value, list) else value for field, value in self.values.items()}
        for field, value in values.items():
            if field not in hints:
                raise Problem(f"{self.path}: Config has no field '{field}'; its fields are {', '.join(hints)}")
            if not _fits(value, hints[field]):
                name = getattr(hints[field], "__name__", "") if not typing.get_args(hints[field]) else str(hints[field])
                raise Problem(f"{self.path}: Config: {field} is {value!r}, it must be of type {name}")
        try:
            return dataclasses.replace(config, **values)
        except ValueError as error:  # raised by its own check
            raise Problem(f"{self.path}: {one_line(error)}") from error


def _fits(value: object, kind: object) -> bool:
    """Whether a value has the type of a Config field; types that are not simple are not checked."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        entry, *more = typing.get_args(kind)
        return isinstance(value, tuple) and (more != [...] or all(_fits(part, entry) for part in value))
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_plain(value: object) -> bool:
    """Whether a value means the same in another process, and in the key of a pool."""
    if isinstance(value, dict):
        return all(type(name) is str and _is_plain(part) for name, part in value.items())
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in (int, float, bool, str, type(None))


@dataclass
class _Loaded:
    """A method's module, its code, and the files opened since its import began."""

    path: Path
    module: ModuleType
    tree: ast.Module
    opened: set[str]  # still growing

    def __post_init__(self):
        self.files = self._files()  # read while the method was imported

    def _files(self) -> set[Path]:
        """Files opened under the method's folder, except hidden ones, installed packages, the kit and the method itself."""
        folder, kit = self.path.parent, Path(__file__).parent
        elsewhere = [kit, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
        below = {
            path for path in map(Path.resolve, map(Path, self.opened)) if path.is_relative_to(folder) and path.is_file()
        }
        return {
            path
            for path in below - {self.path}
            if not any(map(path.is_relative_to, elsewhere))
            and not any(part[0] == "." or part.endswith("-packages") for part in path.relative_to(folder).parts)
        }

    def digest(self) -> str:
        """Of the code and those files. Comments and formatting do not count, nor do PRESETS unless the code uses them:
        what cannot change a result makes no new runs."""
        rest = ast.Module([part for part in self.tree.body if not _is_presets(part)], [])
        used = any(isinstance(node, ast.Name) and node.id == "PRESETS" for node in ast.walk(rest))
        digests = [code_digest(self.tree if used else rest)]
        for path in sorted(self.files):
            content = path.read_bytes()
            digest = code_digest(ast.parse(content)) if path.suffix == ".py" else hashlib.sha256(content).hexdigest()
            digests.append(f"{path.relative_to(self.path.parent)} {digest}")
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def read_late(self) -> Path | None:
        """A file that was first read after the import: edits to it would go unnoticed."""
        return min(self._files() - self.files, default=None)


def _is_presets(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and [getattr(target, "id", "") for target in statement.targets] == ["PRESETS"]


@functools.cache
def _unpacked(contents: tuple[tuple[str, bytes], ...]) -> Path:
    """Write a method's files into a temporary folder, once per process; returns the first, the method's own."""
    folder = Path(tempfile.mkdtemp()).resolve()
    for name, content in contents:
        write_bytes(folder / name, content)
    return folder / contents[0][0]


@functools.cache
def _load(path: Path) -> _Loaded:
    """Import a method from its file's present content; cached, as a process serves one method.

    Raises Problem when there is no such file, it cannot be imported, or has no `unlearning`.
    """
    if not path.is_file():
        raise Problem(f"{path}: no such method file")
    if path.suffix == ".ipynb":
        pieces = [(f"{path} code cell {cell},", statement) for cell, statement in method_statements(path)]
        tree = ast.Module([statement for _, statement in pieces], [])
        code = [(name, ast.Module([statement], [])) for name, statement in pieces]
    elif path.suffix == ".py":
        with _guarded(f"{path}: importing it", path):
            tree = ast.parse(path.read_bytes(), str(path))
        code = [(str(path), tree)]
    else:
        raise Problem(f"{path}: neither a .py file nor an .ipynb notebook")
    # Modules beside the method are found, as when it is run as a script, and compiled from their present source: Python
    # would trust a cached .pyc if the source's size and modification time (to the second) are unchanged.
    sys.path.insert(0, str(path.parent))
    sys.pycache_prefix, sys.dont_write_bytecode = os.path.join(os.devnull, "none"), True
    opened: set[str] = set()
    sys.addaudithook(functools.partial(_note_read, opened))
    name = f"method_{path.stem}"
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    with _guarded(f"{path}: importing it", path):
        for file, piece in code:
            exec(compile(piece, file, "exec", dont_inherit=True), vars(module))
    if not callable(getattr(module, "unlearning", None)):
        raise Problem(f"{path}: no function unlearning(net, retain_loader, forget_loader, val_loader)")
    return _Loaded(path, module, tree, opened)


def _note_read(opened: set[str], event: str, details: tuple) -> None:
    """An audit hook: Python calls it before it opens a file, among other events."""
    if event == "open" and isinstance(details[0], str | os.PathLike) and not set(details[1] or "r") & set("wax+"):
        opened.add(os.path.abspath(details[0]))


@contextlib.contextmanager
def _guarded(what: str, path: Path, seconds: float | None = None):
    """Turns whatever a user's code does wrong within into one Problem that names `what` did it."""
    before = {name: read() for name, read in GLOBAL_SETTINGS.items()}
    try:
        with _alarm(seconds):
            yield
    except Problem:
        raise
    except _TimeLimit:
        raise Problem(f"{what} took longer than the time limit of {seconds:g} s") from None
    except SystemExit as error:
        raise Problem(f"{what} called sys.exit({'' if error.code is None else error.code})") from error
    except BaseException as error:
        raise Problem(f"{what} raised {_described(error, path)}") from error
    for name, read in GLOBAL_SETTINGS.items():
        if read() != before[name]:
            raise Problem(f"{what} changed {name} from {before[name]} to {read()}; put it back before returning")


def _described(error: BaseException, path: Path) -> str:
    """One line: the error, and the line of the user's file it came from."""
    lines = []
    trace = error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(str(path)):  # in a notebook the cell follows
            lines.append(f"{file.removeprefix(str(path))} line {trace.tb_lineno}".strip())
        trace = trace.tb_next
    return f"{type(error).__name__}: {one_line(error)}" + (f" ({lines[-1]})" if lines else "")


class _TimeLimit(BaseException):
    """Not an Exception, so that a method's own handlers do not swallow it."""


@contextlib.contextmanager
def _alarm(seconds: float | None):
    """Interrupt what runs within after `seconds`, where the system has alarms; on Windows, notice it afterwards."""

    def stop(*_):
        raise _TimeLimit

    start = time.perf_counter()
    alarms = seconds and hasattr(signal, "SIGALRM")
    if alarms:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again each second, should the method catch it
    try:
        yield
    finally:
        if alarms:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if seconds and time.perf_counter() - start > seconds:
        raise _TimeLimit
