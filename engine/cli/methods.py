"""`stars methods`: the policies of the package as a table, made from their code."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from stars.plan import Fixed, Plan, Whole
from stars.policies import POLICIES
from stars.trace.json_lines import dumps, plain


class Method(NamedTuple):
    """One policy, as the table shows it."""

    name: str  # of the command line
    python: str  # of stars.NAME
    summary: str
    sources: list[str]  # arXiv identifiers
    propose: str
    segment: str
    score: str
    decide: str
    parameters: dict[str, Any]  # with their defaults; None where there is none


def methods(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.name is not None:
        print(f"stars.{POLICIES[args.name].__name__}\n\n{inspect.getdoc(POLICIES[args.name])}")
    elif args.json:
        print(dumps(plain({"methods": [method._asdict() for method in all_methods()]})))
    else:
        print(table())
    return 0


def all_methods() -> Iterator[Method]:
    """Every policy, described by its docstring, its fields and the plan of an example."""
    for name, kind in POLICIES.items():
        fields = dataclasses.fields(cast(Any, kind))
        needed = {"reward_threshold": 1.0} if any(field.name == "reward_threshold" for field in fields) else {}
        plan = kind(**needed).plan()
        text = " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())
        sources = list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", kind.__doc__ or "")))
        yield Method(name, kind.__name__, text, sources, _words(plan.propose), _segment(plan),
                     {"segment": "every segment", "end": "at the end", "never": "never"}[plan.score.when],
                     _words(plan.decide),
                     {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields})


def table() -> str:
    """All of them, as the README has it: one line a policy, Markdown."""
    lines = ["| `--policy` | `stars.` | arXiv | what is drawn | scored | kept | parameters |", "|---" * 7 + "|"]
    for method in all_methods():
        parameters = ", ".join(f"`{name}={_value(value)}`" if value is not None else f"`{name}`"
                               for name, value in method.parameters.items())
        lines.append(f"| `{method.name}` | `{method.python}` | {', '.join(method.sources)} | {method.propose}, "
                     f"{method.segment} | {method.score} | {method.decide} | {parameters} |")
    return "\n".join(lines)


def _segment(plan: Plan) -> str:
    if isinstance(plan.segment, Whole):
        return "whole responses"
    if isinstance(plan.segment, Fixed) and plan.segment.size == 1:
        return "one token"
    return f"{_words(plan.segment)} segments"


def _words(choice: Any) -> str:
    """A choice's name, as words."""
    name = choice.__name__ if isinstance(choice, type(methods)) else type(choice).__name__
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _value(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
