# SPDX-License-Identifier: Apache-2.0
"""Looks up functions and classes in the source of an installed package, and imports nothing of it.

So the lookup is quick, and it also works where the package cannot be imported, or only on another kind of machine.
"""

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Definition:
    """A module, or something defined in one.

    Attributes:
        module: Dotted name of the module.
        node: The module, class, function or assignment.
        file: The module's file.
    """

    module: str
    node: ast.AST
    file: Path

    def parameters(self) -> tuple[str, ...] | None:
        """Names of a function's parameters, those after ``*`` and ``**`` with these signs. None: it is no function."""
        if not isinstance(self.node, _FUNCTIONS):
            return None
        a = self.node.args
        after = [arg.arg for arg in (*a.posonlyargs, *a.args)]
        after += [f"*{a.vararg.arg}"] if a.vararg else []
        after += [arg.arg for arg in a.kwonlyargs]
        return tuple(after + ([f"**{a.kwarg.arg}"] if a.kwarg else []))

    def results(self) -> set[int]:
        """How many values each ``return`` of a function gives together."""
        returned = [node.value for node in ast.walk(self.node) if isinstance(node, ast.Return)]
        return {len(value.elts) if isinstance(value, ast.Tuple) else 1 for value in returned}

    def attributes(self) -> set[str]:
        """Names in a module, or of a class and its instances: what it and its bases define or assign to ``self``."""
        names = set(_scope(self.node))
        if isinstance(self.node, ast.ClassDef):
            names |= {
                inner.attr
                for inner in ast.walk(self.node)
                if isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            }
            names.update(*(base.attributes() for base in _bases(self)))
        return names

    def source(self) -> str:
        """Its lines."""
        lines = _lines(self.file)
        if isinstance(self.node, ast.Module):
            return "\n".join(lines)
        return "\n".join(lines[getattr(self.node, "lineno") - 1 : getattr(self.node, "end_lineno")])  # noqa: B009


def find(where: str) -> Definition | None:
    """What ``"module"`` or ``"module:Qualified.name"`` is, in whichever module it is defined."""
    module, _, names = where.partition(":")
    found = _module(module)
    for name in names.split(".") if names else ():
        found = _member(found, name) if found else None
    return found


@cache
def _module(name: str) -> Definition | None:
    package, *inner = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*inner)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return Definition(name, ast.parse("\n".join(_lines(file))), file) if file.is_file() else None


@cache
def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _member(owner: Definition, name: str) -> Definition | None:
    node = _scope(owner.node).get(name)
    if isinstance(node, ast.ImportFrom):
        package = owner.module if owner.file.name == "__init__.py" else owner.module.rpartition(".")[0]
        source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        return _module(f"{source}.{original}") or find(f"{source}:{original}")
    if node is not None:
        return Definition(owner.module, node, owner.file)
    found = (_member(base, name) for base in _bases(owner))
    return next((definition for definition in found if definition), None)


def _bases(owner: Definition) -> Iterator[Definition]:
    """The bases of a class that are named in its module and belong to the same package."""
    for base in owner.node.bases if isinstance(owner.node, ast.ClassDef) else ():
        name = base.value if isinstance(base, ast.Subscript) else base
        module = _module(owner.module)
        found = _member(module, name.id) if module and isinstance(name, ast.Name) else None
        if found and found.module.split(".")[0] == owner.module.split(".")[0]:
            yield found


@cache
def _scope(node: ast.AST) -> dict[str, ast.AST]:
    """What stands under which name in a module or class; of several, the first that is no mere overload."""
    names: dict[str, ast.AST] = {}
    for statement in _statements(getattr(node, "body", ())):
        if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
            if not any(isinstance(d, ast.Name) and d.id == "overload" for d in statement.decorator_list):
                names.setdefault(statement.name, statement)
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                names.setdefault(alias.asname or alias.name, statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, statement)
    return names


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, also those under a condition."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(statement, part, ()):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])
