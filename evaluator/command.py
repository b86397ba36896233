"""What all commands share: options, and how they end."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from evaluator.data import splits
from evaluator.evaluation import Evaluation, data_folder
from evaluator.files import Problem, one_line

OPTIONS = {
    "data": dict(default="digits", help="a name under data/, or any folder with the same layout (default: digits)"),
    "split": dict(
        default="public", help="a forget set: public (to tune on) or private (to report on); several: 'public*', 'private*'"
    ),
    "model": dict(metavar="NAME", help="any classifier of torchvision, such as vgg11_bn (default: the data's own network)"),
    "runs": dict(type=int, default=512, help="N, the number of networks of each kind (default: %(default)s)"),
    "second-pool": dict(action="store_true", help="measure the ceiling, with N more retrained networks"),
    "attacks": dict(action="store_true", help="also run other membership-inference attacks and print them beside the score"),
    "jobs": dict(type=int, help="processes (default: one per core; one per GPU, more for single networks)"),
    "device": dict(default="auto", help="cpu, cuda, or auto: a GPU where one works (default)"),
    "engine": dict(
        default="auto",
        metavar="NAME",
        help="how a GPU retrains several networks: joint, streams or steps (default: the quickest of them, measured there)",
    ),
    "dask": dict(metavar="ADDRESS", help="make the runs on the workers of this Dask scheduler, such as tcp://10.0.0.1:8786"),
    "time-limit": dict(type=float, metavar="SECONDS", help="stop with an error when a run takes longer"),
    "results": dict(type=Path, default=Path("results"), help="where runs, tables and figures are kept (default: results)"),
    "keep-networks": dict(action="store_true", help="also keep every network's weights (large)"),
}
EVERYWHERE = ("data", "model", "runs", "jobs", "device", "engine", "dask", "results")


def parser(documentation: str, *options: str, **defaults: object) -> argparse.ArgumentParser:
    """A parser with the options that every command has, and others named in OPTIONS. defaults: replace those given there."""
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, how in OPTIONS.items():
        if name in (*EVERYWHERE, *options):
            made.add_argument(f"--{name}", **how)
    made.set_defaults(**defaults)
    return made


def evaluation(args: argparse.Namespace, **values: object) -> Evaluation:
    """The Evaluation that a command's options ask for; values: options that the command sets itself."""
    asked = {name.replace("-", "_"): getattr(args, name.replace("-", "_"), None) for name in OPTIONS}
    return Evaluation.of(**{name: value for name, value in (asked | values).items() if value is not None})


def evaluations(args: argparse.Namespace, **values: object) -> Iterator[Evaluation]:
    """One for each split that --split names; device and workers are asked once. Raises Problem when there is none."""
    named = splits(data_folder(args.data), args.split)
    one = evaluation(args, **values)
    return (replace(one, split=split) for split in named)  # one at a time, as each holds the data once they are read


def run(command: Callable[[], None], resumes: bool = True) -> int:
    """Run a command; returns its exit code. An error is one line on stderr, and nothing finished is lost.

    resumes: whether the same command begins where it was interrupted.
    """
    stops = {getattr(signal, name): name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)}
    try:
        before = {number: signal.signal(number, _stop) for number in stops}
    except ValueError:  # not the main thread
        before = {}
    try:
        command()
        return 0
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or one_line(error)}; what was finished is kept", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, _Stopped) as stop:
        number = stop.args[0] if isinstance(stop, _Stopped) else signal.SIGINT
        how = f"stopped by {stops[number]}" if number in stops else "interrupted"
        then = "what was finished is kept, and the same command resumes from there" if resumes else "nothing was kept"
        print(f"\n{how}; {then}", file=sys.stderr)
        return 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopped(BaseException):
    """The command was ended by a signal."""


def _stop(number: int, _) -> None:
    raise _Stopped(number)
