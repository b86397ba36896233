"""Kaggle's own command: how it is called, and what its answers mean.

It is never imported: `import kaggle` alone logs in, and some versions end the process when that fails.
"""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from evaluator.files import Problem

NO_CREDENTIALS = (
    "no Kaggle credentials: at https://www.kaggle.com/settings/api choose Generate New Token, save it as "
    "~/.kaggle/access_token (chmod 600) or set KAGGLE_API_TOKEN to it, and run this again; or run: kaggle auth login"
)
ABSENT = re.compile(r"\b40[34]\b|not found|denied|access", re.IGNORECASE)  # Kaggle does not tell "none" from "not yours"
GOING_ON = ("NEW_SCRIPT", "QUEUED", "RUNNING")


def kaggle(*arguments: str) -> str:
    """Run Kaggle's command; returns what it printed. Raises Problem with what it said when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "kaggle", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    said = f"{done.stdout}\n{done.stderr}".strip()
    if "Authentication required" in said:
        raise Problem(NO_CREDENTIALS)
    if done.returncode:
        error = (done.stderr.strip() or done.stdout.strip() or "failed").partition("\n\nIf this is unexpected")[0]
        raise Problem(f"{shlex.join(['kaggle', *arguments])}: {' '.join(error.split())}")
    return said


def user_name() -> str:
    """The name of the account that Kaggle's command would use."""
    found = re.search(r"^- username: (\S+)$", kaggle("config", "view"), re.MULTILINE)
    if found is None or found[1] == "None":
        raise Problem(NO_CREDENTIALS)
    return found[1]


def slug(title: str) -> str:
    """What Kaggle makes of a title: the last part of an address."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def push_command(folder: Path) -> list[str]:
    return ["kernels", "push", "-p", str(folder)]


def status_command(kernel: str) -> list[str]:
    return ["kernels", "status", kernel]


def push(folder: Path) -> str:
    """Upload a notebook, which starts its run; returns the version number.

    The command exits with 0 even when Kaggle refuses the upload."""
    said = kaggle(*push_command(folder))
    version = re.search(r"Kernel version (\d+) successfully pushed", said)
    if version is None or "not valid" in said:
        raise Problem(f"kaggle kernels push: {' '.join(said.split())}")
    print(said)
    return version[1]


def status(kernel: str) -> tuple[str, str]:
    """How the last run of a notebook goes: QUEUED, RUNNING, COMPLETE, ERROR, …, and what Kaggle said. Both are empty if
    there is no such notebook."""
    try:
        said = kaggle(*status_command(kernel))
    except Problem as problem:
        if ABSENT.search(str(problem)):
            return "", ""
        raise
    found = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', said)
    if found is None:
        raise Problem(f"kaggle kernels status {kernel}: {said}")
    return found[1].upper(), " ".join(said.split())


def wait_for(kernel: str, seconds: float) -> None:
    """Wait until the run is complete, asking every so many seconds. Raises Problem when it fails."""
    before = None
    while True:
        now, said = status(kernel)
        if not now:
            raise Problem(f"{kernel}: no such notebook on Kaggle")
        if now != before:
            print(f"{time.strftime('%H:%M')} {kernel}: {now.lower()}", flush=True)
        if now == "COMPLETE":
            return
        if now not in GOING_ON:
            raise Problem(f"{said}; its log: kaggle kernels logs {kernel}")
        before = now
        time.sleep(seconds)
