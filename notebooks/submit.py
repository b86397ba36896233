"""Uploads notebooks/submission.ipynb to Kaggle, waits for its run, and submits it to the competition.

    python notebooks/submit.py --dry-run            check everything, print every command, send nothing
    python notebooks/submit.py -m "8 tensors"       do it

The run that the upload starts only checks the notebook (the competition puts empty.txt into its input and accepts an empty
zip). The 512 networks are made when Kaggle runs the submitted version again. Everything goes through Kaggle's own command.
"""

import argparse
import ast
import json
import os
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import build
from kaggle_command import kaggle, push, push_command, slug, status_command, user_name, wait_for

from evaluator.files import Problem, write_bytes, write_json

COMPETITION = "neurips-2023-machine-unlearning"
ON_KAGGLE = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "PIL", "IPython"}  # what the notebook may import there
KIT = {"evaluator"}  # imported only where the kit is at hand
DEMANDED = {
    "code_file": "submission.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_internet": False,  # must be said: the command's default is true
    "machine_shape": "NvidiaTeslaT4",  # two of them; a P100 does not work with today's torch
    "competition_sources": [COMPETITION],
}


def check_metadata(path: Path) -> dict:
    """kernel-metadata.json, complete and right. Raises Problem naming the first key that is not."""
    try:
        metadata = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"{path}: not readable JSON ({error})") from error
    for key, value in DEMANDED.items():
        if metadata.get(key) != value:
            said = json.dumps(metadata[key]) if key in metadata else "missing"
            raise Problem(f"{path}: {key} is {said}, it must be {json.dumps(value)}")
    title, name = metadata.get("title", ""), metadata.get("id", "").partition("/")[2]
    if not 5 <= len(title) <= 50:
        raise Problem(f"{path}: title {title!r} has {len(title)} characters, Kaggle takes 5 to 50")
    if name != slug(title):
        raise Problem(
            f"{path}: id ends in {name!r}, the title makes it {slug(title)!r}; Kaggle would make a second notebook"
        )
    return metadata


def check_notebook(path: Path) -> None:
    """The one file that is uploaded holds all the code, imports only what Kaggle has, and carries no outputs."""
    try:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        trees = [ast.parse("".join(cell["source"])) for cell in code]
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise Problem(f"{path}: not a readable notebook ({error})") from error
    for number, cell in enumerate(code, 1):
        if cell["outputs"]:
            raise Problem(f"{path}: code cell {number} has outputs; clear them")
    imported = {
        name.split(".")[0]
        for tree in trees
        for node in ast.walk(tree)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    foreign = sorted(imported - ON_KAGGLE - KIT - set(sys.stdlib_module_names))
    if foreign:
        raise Problem(f"{path}: imports {', '.join(foreign)}, which is neither in this file nor expected on Kaggle")
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name in ("Config", "unlearning", "make_submission"):
        if name not in defined:
            raise Problem(f"{path}: no cell defines {name}")


def submit(message: str, staging: Path, seconds: float, dry_run: bool) -> None:
    notebook = HERE / "submission.ipynb"
    if notebook.exists() and build.edited(notebook):
        print(f"{notebook} was edited by hand; it is submitted as it is")
    else:
        build.write("submission")
    check_notebook(notebook)
    metadata = check_metadata(HERE / "kernel-metadata.json")
    try:
        user = user_name()
    except Problem as problem:
        if not dry_run:
            raise
        print(f"{problem}\n")
        user = os.environ.get("KAGGLE_USERNAME", "USER")
    kernel = f"{user}/{metadata['id'].partition('/')[2]}"
    write_json(staging / "kernel-metadata.json", metadata | {"id": kernel})
    write_bytes(staging / metadata["code_file"], notebook.read_bytes())
    print(f"{staging}: {', '.join(sorted(path.name for path in staging.iterdir()))}, checked")

    def command(version: str) -> list[str]:
        return ["competitions", "submit", COMPETITION, "-f", "submission.zip", "-k", kernel, "-v", version, "-m", message]

    if dry_run:
        print("would run (VERSION is printed by the first command; the second is repeated until it says COMPLETE):")
        for arguments in (push_command(staging), status_command(kernel), command("VERSION")):
            print(f"  kaggle {shlex.join(arguments)}")
        return
    version = push(staging)
    wait_for(kernel, seconds)
    said = kaggle(*command(version))
    if "Could not" in said:
        raise Problem(f"kaggle competitions submit: {' '.join(said.split())}")
    print(said)
    print(f"to see its score: kaggle competitions submissions {COMPETITION}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--message", default="forget and remember", help="the submission's description")
    parser.add_argument("--dry-run", action="store_true", help="check, and print the commands instead of running them")
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="how often to ask how the run goes")
    parser.add_argument("--staging", type=Path, default=Path("results/kaggle"), help="the folder that is pushed")
    args = parser.parse_args()
    try:
        submit(args.message, args.staging, args.every, args.dry_run)
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; a run that was already pushed continues on Kaggle")


if __name__ == "__main__":
    main()
