"""stars.h as data: its constants, structs and functions, read from the header's own text.

The header is the one table of the C interface: C++ compiles it, libstars carries the text that it was compiled from,
and Python reads that text here. Nothing of it is written down a second time.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Declared(NamedTuple):
    """A field of a struct, or an argument of a function."""

    name: str
    type: str  # as C has it: "int64_t", "const float*", "stars_batch"


class Function(NamedTuple):
    """What the library exports under a name."""

    result: str
    arguments: tuple[Declared, ...]


class Header(NamedTuple):
    """What the header declares, by name and in its order."""

    constants: dict[str, int]  # numbers that are #defined, and members of enums
    structs: dict[str, tuple[Declared, ...]]
    functions: dict[str, Function]


_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FOR_CXX = re.compile(r"^#ifdef __cplusplus$.*?^#endif$", re.DOTALL | re.MULTILINE)
_DEFINED = re.compile(r"^#define (\w+) (\d+)$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^#(?:define|else|endif|if|ifndef|include)\b.*$", re.MULTILINE)  # a #pragma is refused
_DECLARATION = re.compile(
    r"typedef enum \{ (?P<members>[^{}]*) \} \w+; ?"
    r"|typedef struct \{ (?P<fields>[^{}]*) \} (?P<struct>\w+); ?"
    r"|typedef struct (?P<opaque>\w+) (?P=opaque); ?"
    r"|STARS_API (?P<result>[\w ]+\*?) (?P<function>\w+)\((?P<arguments>[^()]*)\); ?"
)
_MEMBER = re.compile(r"(\w+) = (\d+)")
_FIELDS = re.compile(r"((?:const )?\w+\*?) (\w+(?:, \w+)*)")
_ARGUMENT = re.compile(r"((?:const )?\w+\*?) (\w+)(\[\d+\])?")


def parse(text: str) -> Header:
    """What `text` declares; ValueError quotes a declaration that is none of the kinds that stars.h consists of."""
    text = _FOR_CXX.sub("", _COMMENT.sub("", text))
    header = Header({name: int(value) for name, value in _DEFINED.findall(text)}, {}, {})
    text = " ".join(_DIRECTIVE.sub("", text).split())
    position = 0
    while position < len(text):
        found = _DECLARATION.match(text, position)
        if found is None:
            raise _not_understood(text[position : position + 60])
        position = found.end()
        if found["members"] is not None:
            header.constants.update((name, int(value)) for name, value in _each(_MEMBER, ",", found["members"]))
        elif found["fields"] is not None:
            header.structs[found["struct"]] = tuple(
                Declared(name, of) for of, names in _each(_FIELDS, ";", found["fields"]) for name in names.split(", "))
        elif found["function"] is not None:
            arguments = "" if found["arguments"] == "void" else found["arguments"]
            header.functions[found["function"]] = Function(found["result"], tuple(
                Declared(name, of + "*" * bool(array)) for of, name, array in _each(_ARGUMENT, ",", arguments)))
    return header


def difference(ours: Header, theirs: Header) -> str | None:
    """The first thing that two headers declare differently, in words ("... is X here and Y there"); None: nothing."""
    for kind in Header._fields:
        one: dict[str, object] = getattr(ours, kind)
        other: dict[str, object] = getattr(theirs, kind)
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                return _words(name, one.get(name), other.get(name))
    return None


def _words(name: str, one: object, other: object) -> str:
    if isinstance(one, tuple) and isinstance(other, tuple) and not isinstance(one, Function):
        for place, (mine, yours) in enumerate(zip([*one, None], [*other, None])):  # the shorter one ends in None
            if mine != yours:
                return f"field {place} of {name} is {_shown(mine)} here and {_shown(yours)} there"
    return f"{name} is {_shown(one)} here and {_shown(other)} there"


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Declared):
        return f"{value.type} {value.name}"
    if isinstance(value, Function):
        return f"{value.result} ({', '.join(map(_shown, value.arguments))})"
    return f"a struct of {len(value)} fields" if isinstance(value, tuple) else str(value)


def _each(pattern: re.Pattern[str], separator: str, text: str) -> list[tuple[str, ...]]:
    """The groups of every part of `text`; empty parts, as after the last separator, are none."""
    groups: list[tuple[str, ...]] = []
    for part in filter(None, map(str.strip, text.split(separator))):
        found = pattern.fullmatch(part)
        if found is None:
            raise _not_understood(part)
        groups.append(found.groups())
    return groups


def _not_understood(text: str) -> ValueError:
    return ValueError(f"stars.h: {text!r} is no declaration that stars.bindings.header can read")
