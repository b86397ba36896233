"""Runs jobs on the workers of a Dask scheduler that exists already: it spreads tasks, retries lost ones and moves data.

Workers need the kit, torch and the rest in the same versions, but none of the files: data and methods are sent. On a worker,
too, a job runs in processes of its own, with what `evaluator.processes` says of them.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import multiprocessing
import pickle
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluator.files import Problem, one_line
from evaluator.processes import in_process

_clients: dict = {}  # by the address of their scheduler
SAME = ("torch", "torchvision", "numpy", "pandas")  # packages whose versions must agree


def on_workers(job: Callable, tasks: list, address: str, name: Callable[[object], str]) -> Iterator:
    """Yield job(task) for every task, in the order they finish.

    job: sent to each worker once, pickled. name: says what a task is, for messages.
    Raises what a job raises, and Problem when the scheduler is lost or a worker cannot be used.
    """
    import distributed

    client, here = _client(address), versions()
    futures, future = [], None
    try:
        sent = client.scatter(pickle.dumps(job), broadcast=True, hash=False)
        futures = [client.submit(_on_a_worker, sent, task, name(task), here, pure=False) for task in tasks]
        for future in distributed.as_completed(futures, loop=client.loop):
            yield future.result()
            future.release()
    except Problem:
        raise
    except distributed.KilledWorker as error:
        raise Problem(f"{address}: workers end while they work ({one_line(error)}); what was finished is kept") from error
    except ImportError as error:
        raise Problem(f"{address}: a worker cannot import what it needs ({one_line(error)})") from error
    except (OSError, RuntimeError, distributed.client.FutureCancelledError) as error:
        if future and future.status == "error":
            raise  # the job's own
        lost = f"{address}: the scheduler or the data sent to it were lost ({one_line(error)})"
        raise Problem(f"{lost}; what was finished is kept, and the same command goes on") from error
    finally:
        with contextlib.suppress(Exception):
            client.cancel(futures)


def workers(address: str, device: str) -> tuple[str, int]:
    """The device that runs are made on, and how many of them at once.

    device: "cpu", "cuda" or "auto". Raises Problem when there is no scheduler or no worker, or a worker cannot be used.
    """
    client, here = _client(address), versions()

    def look() -> dict:  # sent by value, so that a worker without the kit can say so
        from evaluator.cluster import _device, in_child, versions

        return {"versions": versions(), "device": in_child(_device, device, "its GPU")}

    devices: dict[str, str] = {}
    for worker, found in client.run(look, on_error="return").items():
        if isinstance(found, OSError):
            continue  # it has just ended
        if isinstance(found, Exception):
            raise Problem(
                f"worker {worker}: {one_line(found)}; start it in the kit's folder, where its packages are installed"
            )
        _must_agree(worker, found["versions"], here)
        devices[found["device"]] = worker
    if not devices:
        raise _no_worker(address)
    if len(devices) > 1:
        cuda, cpu = devices["cuda"], devices["cpu"]
        raise Problem(f"{address}: worker {cuda} has a GPU and {cpu} has none: use workers of one kind, or --device cpu")
    return next(iter(devices)), sum(client.nthreads().values())


def versions() -> dict[str, str]:
    """What must be the same on all machines; the kit by the content of its files."""
    kit = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        kit.update(path.read_bytes())
    packages = {package: importlib.metadata.version(package) for package in SAME}
    return {"Python": ".".join(platform.python_version_tuple()[:2]), **packages, "the kit": kit.hexdigest()[:12]}


def _must_agree(worker: str, theirs: dict[str, str], here: dict[str, str]) -> None:
    for what, version in here.items():
        if theirs[what] != version:
            raise Problem(f"worker {worker}: {what} is {theirs[what]}, here {version}: give it the same, or stop it")


def _client(address: str):
    """A connection to the scheduler, with at least one worker behind it; the one that there is, if it still works."""
    if address in _clients and _clients[address].status == "running":
        return _clients[address]
    try:
        import dask
        import distributed
    except ImportError as error:
        raise Problem("--dask needs Dask: pip install distributed") from error
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what it would say is said here, in one line
    try:
        client = distributed.Client(address, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise Problem(f"--dask {address}: no scheduler answers there ({one_line(error)})") from error
    try:
        client.wait_for_workers(1, timeout=dask.config.get("distributed.comm.timeouts.connect"))
    except TimeoutError as error:
        raise _no_worker(address) from error
    _clients[address] = client
    return client


def _no_worker(address: str) -> Problem:
    return Problem(f"--dask {address}: the scheduler has no worker: start some with python -m dask worker {address}")


# On a worker.


def _on_a_worker(sent: bytes, task: object, name: str, there: dict[str, str]) -> object:
    import distributed

    worker = distributed.get_worker().address
    _must_agree(worker, versions(), there)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return in_child(_Sent(sent, folder), task, name)
    except Problem as problem:
        raise type(problem)(f"{problem} (on worker {worker})") from None


def _device(wanted: str) -> str:
    from evaluator.evaluation import working_device  # here, so that the worker's own process does without torch

    return working_device(wanted)


def in_child(job: Callable, task: object, name: str) -> object:
    """job(task), run in one new process. Dask starts its workers as daemons, which may not start processes; those that the
    kit starts end with the worker all the same."""
    multiprocessing.current_process()._config["daemon"] = False
    return in_process(job, task, name)


@dataclass(frozen=True)
class _Sent:
    """A job as it was sent, with a folder for its temporary files."""

    job: bytes
    folder: str

    def __call__(self, task: object) -> object:
        tempfile.tempdir = self.folder
        return pickle.loads(self.job)(task)
