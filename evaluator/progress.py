"""Progress with the remaining time: a bar on a terminal, plain lines elsewhere."""

import sys
import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # not one of the system's, which a process that is ended would leave behind

SECONDS_BETWEEN_LINES = 10


class _Lines(tqdm):
    """tqdm's text on separate lines, without control characters."""

    def display(self, msg=None, pos=None):
        if self.n:
            print(self, file=sys.stderr, flush=True)

    def close(self):
        self.disable = True  # no closing line: the caller prints the result


def progress(what: str, total: int, unit: str) -> tqdm:
    if sys.stderr.isatty():
        return tqdm(desc=what, total=total, unit=unit, smoothing=0.05, dynamic_ncols=True)
    return _Lines(desc=what, total=total, unit=unit, smoothing=0.05, mininterval=SECONDS_BETWEEN_LINES, ncols=100)
