"""How long scoring takes, stage by stage, and how much memory it needs: everything from scratch in a temporary folder.

    python -m benchmarks.evaluation             N = 512 on the digits

First the evaluation that `make evaluate` runs, without data or networks to start from; then one more method; then the
first evaluation again. Memory is that of all processes together, with shared pages counted once (Linux only).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from evaluator.evaluation import HERE
from evaluator.files import Problem
from evaluator.method import Method
from evaluator.scoring import processor


class Taken(NamedTuple):
    """What a command took."""

    seconds: float
    memory: int  # bytes, at its peak; 0 where the system does not say
    stages: list[str]  # those it reported, with their run times


def memory(group: int) -> int:
    """Bytes that the processes of a group use; a shared page is divided among those that share it."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, IndexError):  # it has ended
            continue
    return total


def timed(*command: str) -> Taken:
    """Run one of the kit's scripts. Raises Problem when it fails."""
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=HERE, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.3)
        seconds = time.perf_counter() - start
        said.seek(0)
        lines = said.read().splitlines()
    if process.returncode:
        raise Problem(f"{' '.join(command)}: {lines[-1] if lines else process.returncode}")
    return Taken(seconds, peak, [line for line in lines if line.endswith(" s")])


def prepare(folder: Path) -> Taken:
    """Make the digits in a folder, without networks."""
    return timed("data/prepare.py", "digits", "--folder", str(folder / "digits"))


def evaluate(folder: Path, runs: int, jobs: int | None, *more: str) -> Taken:
    """Evaluate what `make evaluate` does, or other methods, on the digits in a folder."""
    where = ("--data", str(folder / "digits"), "--results", str(folder / "results"), "--runs", str(runs))
    return timed("evaluate.py", *where, *(("--jobs", str(jobs)) if jobs else ()), *more)


def show(what: str, taken: Taken) -> None:
    print(f"{what}: {taken.seconds:.1f} s" + (f", {taken.memory / 2**30:.2f} GB at most" if taken.memory else ""))
    print("".join(f"    {line}\n" for line in taken.stages), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=512)
    parser.add_argument("--jobs", type=int, help="processes (default: one per core, or one on the GPU)")
    parser.add_argument("--another", type=Path, default=HERE / "methods" / "l1_sparse.py", help="the method added later")
    args = parser.parse_args()
    try:
        Method.read(args.another)
        print(f"{processor()}, {os.cpu_count()} cores, {args.runs} runs", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            show("data", prepare(folder))
            show("first evaluation, four methods", evaluate(folder, args.runs, args.jobs))
            another = evaluate(folder, args.runs, args.jobs, str(args.another), "--tuned")
            show(f"one more method ({args.another.stem})", another)
            show("the first again", evaluate(folder, args.runs, args.jobs))
    except Problem as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
