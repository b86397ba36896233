"""Files that are complete or absent, and errors written for people."""

import ast
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pandas as pd


class Problem(Exception):
    """Something the user can fix. Its text is one line: the file, row, run or value, and what to do."""

    def __str__(self) -> str:  # a folder's name may hold a newline
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in super().__str__())


def one_line(error: BaseException) -> str:
    """An error's text on one line, as part of a Problem's."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through `write(open file)` so that `path` only ever holds a complete one.

    Raises Problem, and leaves neither `path` nor a fragment of it, when the disk is full or the folder cannot be written.
    """
    fragment = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fragment.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        fragment.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fragment.unlink(missing_ok=True)
        # Writers such as torch.save and zipfile wrap or replace the OSError of a full disk: look for it underneath.
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None and isinstance(error, Exception):
            reason = cause.strerror or cause
            raise Problem(f"{path}: cannot be written ({reason}); nothing finished is lost, run again") from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def write_json(path: Path, content: dict) -> None:
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """What `write_json` wrote; empty if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    write_bytes(path, table.to_csv(index=False).encode())


def code_digest(tree: ast.Module) -> str:
    """A hash of code without comments and formatting: of what can change a result. Every Python gives the same, so that
    runs made on another machine are found here."""
    empty_too = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    text = ast.dump(tree, **empty_too).replace(", type_params=[]", "")  # Python 3.12 added it
    return hashlib.sha256(text.encode()).hexdigest()
