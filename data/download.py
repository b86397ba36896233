"""Files that torchvision downloads and checks, kept in data/.downloads/."""

import socket
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from torchvision.datasets.utils import download_url

from evaluator.files import Problem, one_line

DOWNLOADS = Path(__file__).resolve().parent / ".downloads"  # git-ignored; a download that broke off continues there
SECONDS = 60  # without a byte, after which a connection is given up; Python's own default is never


def download(folder: str, url: str, md5: str, otherwise: str) -> Path:
    """The file at `url`, in data/.downloads/<folder>/. What is there already is kept if its MD5 sum is right.

    otherwise: what to do without a network. Raises Problem, and the next call begins with the file that this one lacks.
    """
    kept = DOWNLOADS / folder
    path = kept / url.rsplit("/", 1)[-1]
    socket.setdefaulttimeout(SECONDS)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with FileLock(kept / ".lock"):
            download_url(url, kept, md5=md5)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: torchvision's, for a wrong sum
        raise Problem(f"{path}: {url} was not downloaded ({one_line(error)}); run again, or {otherwise}") from error
    return path
