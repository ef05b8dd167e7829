"""The package's shape, read from its source: which module imports which, and that all of it is used.

Imports count wherever they stand, inside functions and under `if TYPE_CHECKING` too. That a package is imported before
its modules does not count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import stars

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"stars": "engine", "stars.kernels": "kernels", "stars.bindings": "bindings"}
USERS = ("engine", "kernels", "bindings", "benchmarks")
TYPES = {"Exception", "Generic", "NamedTuple", "Protocol", "object"}  # bases that call no method of ours

UNLISTED = {"__init__.py", "encoder.py", "encoder_model.py", "function.py"}  # "encoders; callables" there

UNUSED = {
    "engine/page_pool.py: PagePool.num_cached": "the same of pages that only the prefix cache holds",
    "engine/page_pool.py: PagePool.num_published": "the same of pages that can be found again",
    "engine/reward/http_calls.py: _Timed.sendall": "what http.client calls of a socket",
    "kernels/dispatch.py: references_only": "how the references are held against the rest, replays included",
    "kernels/philox.py: gumbel_noise": "the noise that the sampler's is held to",
}
"""What may stand although only tests call it, as "file: Class.name", and why."""


@cache
def trees(folder: str) -> dict[str, ast.Module]:
    """The parsed files of one folder of the checkout, by their paths in the checkout."""
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf8"))
            for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path, tree in trees(folder).items():
            parts = Path(path).relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = tree
    return found


def imports_of(tree: ast.AST, known: Collection[str]) -> Iterator[str]:
    """What a module imports: `from a import b` is a.b where that is one of the `known` modules, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "imports are absolute"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in names)


def graph(parsed: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """The modules among `parsed` that each of them imports."""
    return {name: {other for other in imports_of(tree, parsed) if other in parsed and other != name}
            for name, tree in parsed.items()}


def cycles(imports: Mapping[str, Collection[str]]) -> list[list[str]]:
    """For every module on a cycle the shortest one through it, each cycle once, from its first name on."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(imports):
        before: dict[str, str] = {}
        waiting = [start]
        while waiting and start not in before:
            waiting = [before.setdefault(other, name) and other for name in waiting
                       for other in sorted(imports[name]) if other not in before]
        if start in before:
            way = [start]
            while before[way[-1]] != start:
                way.append(before[way[-1]])
            found.setdefault(frozenset(way), [start, *reversed(way[1:]), start])
    return list(found.values())


def test_no_module_imports_itself_by_way_of_others():
    assert not [" -> ".join(cycle) for cycle in cycles(graph(modules()))]


def test_kernels_import_nothing_of_the_engine():
    rooms = ("stars.kernels", "stars.bindings")
    outside = [f"{name} imports {other}" for name, others in graph(modules()).items()
               if name.split(".")[:2] == ["stars", "kernels"] for other in sorted(others)
               if not other.startswith(rooms)]
    assert not outside


@pytest.mark.parametrize("name, besides", [
    ("stars.rules", []), ("stars.exhaustions", []), ("stars.decision_check", ["stars.rules"])])
def test_decisions_are_made_of_the_standard_library_alone(name, besides):
    imported = set(imports_of(modules()[name], ()))
    outside = [one for one in imported if one.split(".")[0] not in sys.stdlib_module_names]
    assert outside == besides


def test_cycles_are_found_whole():
    imports = {"a": {"b", "d"}, "b": {"c"}, "c": {"a", "e"}, "d": {"a"}, "e": {"e2"}, "e2": set(), "f": {"a"}}
    assert cycles(imports) == [["a", "d", "a"], ["b", "c", "a", "b"]]


def test_imports_count_wherever_they_stand():
    source = ("from typing import TYPE_CHECKING\nimport p.early\nif TYPE_CHECKING:\n    from p import typed\n"
              "def f():\n    from p.late import name\n    from p import g\n")
    parsed = {name: ast.parse(source if name == "p.here" else "")
              for name in ("p", "p.here", "p.early", "p.typed", "p.late", "p.other")}
    assert graph(parsed)["p.here"] == {"p", "p.early", "p.typed", "p.late"}


def test_the_architecture_names_every_room():
    """Its list has the files of engine/ and of the reward's room, and no others."""
    listed = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf8").split("```")[1]
    named = set(re.findall(r"\b\w+\.py\b", listed))
    files = {path.name for folder in ("engine", "engine/reward") for path in (ROOT / folder).glob("*.py")}
    everywhere = {path.name for folder in PACKAGES.values() for path in (ROOT / folder).rglob("*.py")}
    assert not files - named - UNLISTED, "rooms that ARCHITECTURE.md does not name"
    assert not named - everywhere, "rooms that are gone"


# -- what is defined is used ------------------------------------------------------------------------------------------


class Definition(NamedTuple):
    place: str  # "file: Class.name"
    name: str
    node: ast.AST


def definitions(path: str, tree: ast.Module) -> Iterator[Definition]:
    """Public functions and classes of a file, and public methods but those that a class of others may call."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield Definition(f"{path}: {node.name}", node.name, node)
        if isinstance(node, ast.ClassDef) and not called_by_others(node):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    yield Definition(f"{path}: {node.name}.{part.name}", part.name, part)


@cache
def class_names() -> set[str]:
    return {node.name for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def called_by_others(node: ast.ClassDef) -> bool:
    """Whether a base of a class is of another package, which then calls its methods."""
    bases = {base.value if isinstance(base, ast.Subscript) else base for base in node.bases}
    names = {base.id if isinstance(base, ast.Name) else ast.unparse(base) for base in bases}
    return not names <= TYPES | class_names()


def uses(tree: ast.AST) -> Counter[str]:
    """How often names stand in a piece of source: alone, as attributes, imported, or as a text such as getattr's."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.alias):
            found[node.name] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found[node.value] += 1
    return found


def facade(tree: ast.Module) -> Counter[str]:
    """What the top of a package's __init__ imports only to export it: no use."""
    return uses(ast.Module([node for node in tree.body if isinstance(node, (ast.ImportFrom, ast.Assign))], []))


def unused() -> list[str]:
    """Definitions that nothing in USERS calls and that the package does not export."""
    everywhere: Counter[str] = Counter()
    for folder in USERS:
        for path, tree in trees(folder).items():
            everywhere += uses(tree)
            if Path(path).name == "__init__.py":
                everywhere -= facade(tree)
    return [one.place for folder in ("engine", "kernels") for path, tree in trees(folder).items()
            for one in definitions(path, tree)
            if one.name not in stars.__all__ and everywhere[one.name] <= uses(one.node)[one.name]]


def test_nothing_is_there_for_tests_alone():
    found = unused()
    assert not set(found) - set(UNUSED), "only tests call these: remove them, or use them"
    assert not set(UNUSED) - set(found), "these are used, or gone: take them off the list"
