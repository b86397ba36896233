"""Progress with the remaining time: a bar on a terminal, plain lines elsewhere."""

import sys
import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is shared by processes, and one that ends early would leave it behind

SECONDS_BETWEEN_LINES = 10


class _Lines(tqdm):
    """tqdm's text as lines of their own, without control characters."""

    def display(self, msg=None, pos=None):
        if self.n:
            print(self, file=sys.stderr, flush=True)

    def close(self):
        self.disable = True  # without the closing line: whoever asked prints what came of it


def progress(what: str, total: int, unit: str) -> tqdm:
    if sys.stderr.isatty():
        return tqdm(desc=what, total=total, unit=unit, smoothing=0.05, dynamic_ncols=True)
    return _Lines(desc=what, total=total, unit=unit, smoothing=0.05, mininterval=SECONDS_BETWEEN_LINES, ncols=100)
