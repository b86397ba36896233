"""How long scoring takes, stage by stage, and how much memory it needs: everything from scratch in a temporary folder.

    python -m benchmarks.evaluation             N = 512 on the digits

First the evaluation that `make evaluate` runs, without data or networks to start from; then one more method; then the
first evaluation again. Memory is that of all processes together, with shared pages counted once (Linux only).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evaluator.evaluation import HERE
from evaluator.files import Problem
from evaluator.method import Method
from evaluator.scoring import processor


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


def timed(what: str, *command: str) -> None:
    """Run a command; print the stages it reports, its run time and its peak memory."""
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
        sys.exit(f"error: {' '.join(command)}: {lines[-1] if lines else process.returncode}")
    print(f"{what}: {seconds:.1f} s" + (f", {peak / 2**30:.2f} GB at most" if peak else ""), flush=True)
    for line in lines:
        if line.endswith(" s"):
            print(f"    {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=512)
    parser.add_argument("--jobs", type=int, help="processes (default: one per core, or one on the GPU)")
    parser.add_argument("--another", type=Path, default=HERE / "methods" / "l1_sparse.py", help="the method added later")
    args = parser.parse_args()
    try:
        Method.read(args.another)
    except Problem as problem:
        sys.exit(f"error: {problem}")
    print(f"{processor()}, {os.cpu_count()} cores, {args.runs} runs", flush=True)
    folder = Path(tempfile.mkdtemp())
    try:
        data = folder / "digits"
        common = ["evaluate.py", "--data", str(data), "--results", str(folder / "results"), "--runs", str(args.runs)]
        common += ["--jobs", str(args.jobs)] if args.jobs else []
        timed("data", "data/prepare.py", "digits", "--folder", str(data))
        timed("first evaluation, three methods", *common)
        timed(f"one more method ({args.another.stem})", *common, str(args.another), "--tuned")
        timed("the first again", *common)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
