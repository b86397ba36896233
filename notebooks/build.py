"""Builds the notebooks from the reviewable .py files beside them (jupytext, py:percent).

    python notebooks/build.py            write the notebooks that are out of date
    python notebooks/build.py --force    also those that were edited by hand; the edits are lost
    python notebooks/build.py methods/shrink_perturb.py     submission_shrink_perturb.ipynb, which submits this method

The same sources give the same bytes. Two cells of submission.py are filled in from unlearning.py: the hyperparameters from
its Config, and the file itself. kaggle_evaluate.py fills in the parameters of evaluation.py.
"""

import argparse
import ast
import hashlib
import io
import json
import sys
import tokenize
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from evaluator.files import Problem, one_line, write_bytes

OURS = HERE.parent / "unlearning.py"
NOTEBOOKS = ("submission", "tuning", "evaluation")


def build(name: str, method: Path = OURS, **given: str) -> str:
    """The text of a notebook, without outputs. method: the file that it submits; one other than unlearning.py is introduced
    by its docstring. given: what a cell that begins with `#: <name>` is to hold. Raises Problem if it cannot be read.
    """
    try:
        text = method.read_text()
        filled_in = {
            "#: hyperparameters": hyperparameters_cell(text),
            "#: method": f"#: method\n{text.rstrip()}",
            **{f"#: {cell}": f"#: {cell}\n{source}" for cell, source in given.items()},
        }
    except (OSError, ValueError, SyntaxError, StopIteration) as error:
        why = "has no Config" if isinstance(error, StopIteration) else one_line(error)
        raise Problem(f"{method}: cannot be put into a notebook: {why}") from error
    source = jupytext.read(HERE / f"{name}.py", fmt="py:percent").cells
    if method != OURS:  # the introduction and its picture are unlearning.py's
        start = next(place for place, cell in enumerate(source) if cell.source.startswith("## Hyperparameters"))
        introduction = f"# {method.stem}\n{ast.get_docstring(ast.parse(text)) or ''}"
        source = [nbformat.v4.new_markdown_cell(introduction), *source[start:]]
    cells = []
    for cell in source:
        source = filled_in.get(cell.source.splitlines()[0], cell.source)
        part = {"cell_type": cell.cell_type, "id": f"cell-{len(cells)}", "metadata": {}, "source": source.splitlines(True)}
        cells.append(part | ({"execution_count": None, "outputs": []} if cell.cell_type == "code" else {}))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "built_from": _digest(cells),
    }
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def hyperparameters_cell(method: str) -> str:
    """`hyperparameters = dict(field=value, …)` with the comments beside the fields of Config."""
    config = next(node for node in ast.parse(method).body if isinstance(node, ast.ClassDef) and node.name == "Config")
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(method).readline)
        if token.type == tokenize.COMMENT
    }
    lines = ["#: hyperparameters", "hyperparameters = dict("]
    previous = config.body[0].end_lineno  # the docstring's
    for field in (part for part in config.body if isinstance(part, ast.AnnAssign)):
        for line in range(previous + 1, field.lineno):
            lines.append(f"    {comments[line]}" if line in comments else "")
        beside = [comments[line] for line in range(field.lineno, field.end_lineno + 1) if line in comments]
        lines.append("  ".join([f"    {field.target.id}={ast.get_source_segment(method, field.value)},", *beside]))
        previous = field.end_lineno
    while not lines[2]:
        del lines[2]
    return "\n".join([*lines, ")"])


def edited(path: Path) -> bool:
    """Whether the cells of a built notebook are no longer those that were built."""
    try:
        notebook = json.loads(path.read_text())
        return notebook["metadata"].get("built_from") != _digest(notebook["cells"])
    except (OSError, ValueError, KeyError) as error:
        raise Problem(f"{path}: not a readable notebook ({error})") from error


def _digest(cells: list[dict]) -> str:
    return hashlib.sha256("\0".join("".join(cell["source"]).rstrip() for cell in cells).encode()).hexdigest()


def write(name: str, force: bool = False, method: Path = OURS) -> Path:
    """Bring a notebook up to date. Raises Problem when that would lose edits made by hand."""
    path = HERE / f"{name}{'' if method == OURS else f'_{method.stem}'}.ipynb"
    text = build(name, method)
    if path.exists() and path.read_text() == text:
        return path
    if path.exists() and edited(path) and not force:
        raise Problem(f"{path}: was edited by hand; python notebooks/build.py --force replaces it and loses the edits")
    write_bytes(path, text.encode())
    print(f"wrote {path}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="replace notebooks that were edited by hand")
    parser.add_argument(
        "method", nargs="?", type=Path, help="build submission_<method>.ipynb instead, which submits this file"
    )
    args = parser.parse_args()
    try:
        if args.method:
            write("submission", args.force, args.method.resolve())
            return
        for name in NOTEBOOKS:
            if (HERE / f"{name}.py").exists():
                write(name, args.force)
    except Problem as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
