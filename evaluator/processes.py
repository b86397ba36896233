"""Runs jobs in separate processes: the one place where more processes, GPUs or a cluster would plug in.

A user's code never runs in the evaluator's process, and a process that one job has used never serves another: whatever code
does to its process (another default dtype, a patched function, `sys.exit`) ends with it. New processes are forked from a
server that has imported torch once, where the system can do that (not on Windows), and start within 30 milliseconds.
"""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.queues import SimpleQueue

from evaluator.files import Problem

FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
IMPORTED_BEFORE = ["torch", "torchvision", "pandas", "PIL.Image", "tqdm"]  # by the server, once


def start_server() -> None:
    """Start the server now, so that its imports are done before it is first needed."""
    if FORKSERVER:
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_BEFORE)
        forkserver.ensure_running()


def in_processes(
    job: Callable, tasks: list, processes: int, name: Callable[[object], str], gpus: Sequence[str] = ()
) -> Iterator:
    """Yield job(task) for every task, in the order they finish, from up to `processes` new processes.

    job: sent to each process once, pickled. name: says what a task is, for messages. gpus: as CUDA_VISIBLE_DEVICES names
    them; each process sees one of them, in turn.
    Raises what a job raises, and Problem when a process ends during a task. All processes are ended in any case.
    """
    start_server()
    context = multiprocessing.get_context("forkserver" if FORKSERVER else "spawn")
    processes = max(1, min(processes, len(tasks)))
    visible = context.SimpleQueue()
    for number in range(processes if gpus else 0):
        visible.put(gpus[number % len(gpus)])
    executor = ProcessPoolExecutor(processes, context, _start, (pickle.dumps(job), visible))
    ahead, doing = iter(tasks), {}

    def submit(count: int) -> None:
        with _without_main():
            doing.update({executor.submit(_do, task): task for task in islice(ahead, count)})

    try:
        submit(processes)
        while doing:
            for future in wait(doing, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                del doing[future]
                submit(1)
                yield outcome
    except BrokenProcessPool as error:
        names = " or ".join(name(task) for task in doing.values())
        raise Problem(f"{names}: {_last_words(executor)}; what was finished is kept") from error
    finally:
        for process in (executor._processes or {}).values():  # Python 3.14 has a public way
            process.kill()
        executor.shutdown(cancel_futures=True)


def in_process(job: Callable, task: object, name: str) -> object:
    """job(task), run in one new process."""
    with contextlib.closing(in_processes(job, [task], 1, lambda _: name)) as outcomes:
        return next(outcomes)


def _last_words(executor: ProcessPoolExecutor) -> str:
    processes = list((executor._processes or {}).values())
    executor.shutdown()  # it collects their exit codes, which can be read only once
    # The executor ends the others itself, with SIGTERM.
    codes = sorted((process.exitcode or 0 for process in processes), key=lambda code: code in (0, -signal.SIGTERM))
    code = codes[0] if codes else 0
    if code >= 0:
        return f"the process ended on its own, with exit code {code}"
    memory = ", perhaps because memory ran out: try fewer --jobs" if -code == getattr(signal, "SIGKILL", 9) else ""
    return f"the process was ended by signal {-code}{memory}"


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep new processes from importing the main script: they need nothing from it, and it may have no __main__ guard."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# In the new process.


def _start(sent: bytes, visible: SimpleQueue) -> None:
    global _sent
    _sent = sent
    if not visible.empty():  # one for each process, or none at all
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.get()  # CUDA reads it when it is first used
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the evaluator ends its workers itself
    threading.Thread(target=_end_with_the_evaluator, daemon=True).start()


def _end_with_the_evaluator() -> None:
    multiprocessing.parent_process().join()  # returns even if it was killed
    os._exit(1)


@functools.cache
def _job() -> Callable:
    return pickle.loads(_sent)


def _do(task: object) -> object:
    return _job()(task)
