"""Reads the method from a notebook: what defines `unlearning`, and nothing that only shows or runs something.

A notebook has cells that draw, read files and write checkpoints. Of its top-level statements, only those are kept that
`unlearning` needs: definitions, imports and assignments of the names it uses, and of the names that those use. No tags or
fixed cells are required, so a notebook saved by another editor reads the same, and an edited figure, a stored output or
changed text makes no new runs.
"""

import ast
import json
import symtable
from collections.abc import Iterator
from pathlib import Path

from evaluator.files import Problem

# What the evaluator uses of a method; `config` holds the notebook's hyperparameters.
ASKED_FOR = {"unlearning", "Config", "config", "PRESETS", "ENSEMBLE"}
IMPORTS = (ast.Import, ast.ImportFrom)
BLOCKS = (ast.If, ast.Try, ast.For, ast.While, ast.With)


def method_statements(path: Path) -> list[tuple[int, ast.stmt]]:
    """(number of the code cell from 1, statement) of everything that `unlearning` needs, in the notebook's order.

    Raises Problem when the file is not a notebook, a cell is not Python, or nothing defines `unlearning`.
    """
    statements = [(cell, statement) for cell, source in _code_cells(path) for statement in _parsed(path, cell, source)]
    imported = {name for _, statement in statements if isinstance(statement, IMPORTS) for name in _bound(statement)}
    # torch.save(…) changes nothing that a method needs, config.update(…) does.
    binds = [_bound(statement) - (imported if isinstance(statement, ast.Expr) else set()) for _, statement in statements]
    if not any("unlearning" in names for names in binds):
        raise Problem(f"{path}: no cell defines unlearning(net, retain_loader, forget_loader, val_loader)")
    needed, kept = set(ASKED_FOR), set()
    while True:
        found = {index for index, names in enumerate(binds) if names & needed} - kept
        if not found:
            return [statements[index] for index in sorted(kept)]
        kept |= found
        needed |= {name for index in found for name in _used(statements[index][1])}


def _code_cells(path: Path) -> Iterator[tuple[int, str]]:
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path}: not a readable notebook ({type(error).__name__}: {error})") from error
    for number, source in enumerate(sources, 1):
        lines = "".join(source).splitlines()
        if lines and lines[0].startswith("%%"):  # a cell in another language
            continue
        # Jupyter's own commands are not Python; they become empty lines, so that line numbers stay right.
        yield number, "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def _parsed(path: Path, cell: int, source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError as error:
        raise Problem(f"{path}: code cell {cell}, line {error.lineno}: {error.msg}") from error


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement binds or changes: f of `def f`, and of `f = …`, `f.x = …`, `f[0] = …`, `f.add(…)`."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return {statement.name}
    if isinstance(statement, IMPORTS):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {name for target in statement.targets for name in _targets(target)}
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        return set(_targets(statement.target))
    if isinstance(statement, ast.Expr):  # f.add(…), not f(…)
        function = getattr(statement.value, "func", None)
        return set(_targets(function)) if isinstance(function, ast.Attribute) else set()
    if isinstance(statement, BLOCKS):
        parts = [part for part in ast.iter_child_nodes(statement)]
        parts += [part for handler in getattr(statement, "handlers", []) for part in handler.body]
        inner = [part for part in parts if isinstance(part, ast.stmt) and not isinstance(part, ast.Expr)]
        return {name for part in inner for name in _bound(part)}
    return set()


def _targets(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        yield from _targets(node.value)
    elif isinstance(node, ast.Tuple | ast.List):
        for part in node.elts:
            yield from _targets(part)


def _used(statement: ast.stmt) -> Iterator[str]:
    """Names of the notebook that a statement reads, now or when it is called; local variables are not among them."""
    tables = [symtable.symtable(ast.unparse(statement), "cell", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
                yield symbol.get_name()
