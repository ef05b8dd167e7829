"""Whether a grammar has a text at all: rules and schemas that only lead to themselves never end.

What parses is a grammar to llguidance, such as `start: "a" start`, whose texts never come to an end. Both answers here
err on one side: what is not understood is taken to end, and then max_tokens does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

MAX_PASSES = 64
"""Times that all rules are looked at: as deep as they may stand on each other. Deeper ones are taken to end."""
MAX_WORK = 1 << 21
"""Rules times passes that are looked at."""

Ends = Callable[[str], bool]  # whether what is named so is known to end


def _solve(names: Mapping[str, Callable[[Ends], bool]]) -> set[str]:
    """Those of `names` that end: their conditions are asked until no more do."""
    ending: set[str] = set()
    left = dict(names)
    for count in range(MAX_PASSES + 1):
        if count == MAX_PASSES or count * len(left) > MAX_WORK:
            return set(names)
        found = [name for name, condition in left.items() if condition(lambda other: other in ending
                                                                       or other not in names)]
        if not found:
            return ending
        ending.update(found)
        for name in found:
            del left[name]
    return ending


# -- JSON schemas -----------------------------------------------------------------------------------------------------


def schema_ends(schema: Any) -> bool:
    """Whether some JSON value that is finite may match `schema`, as far as its references and required parts say."""
    refs = dict.fromkeys(_refs(schema))
    if not refs:
        return True
    targets = {ref: _target(schema, ref) for ref in refs}
    named = {ref: (lambda ends, node=node: _node_ends(node, ends)) for ref, node in targets.items()}
    ending = _solve(named)
    return _node_ends(schema, lambda ref: ref in ending)


def _refs(node: Any) -> Iterator[str]:
    """All references in a schema."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Mapping):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _target(schema: Any, ref: str) -> Any:
    """What a reference names; what cannot be found is anything."""
    if not ref.startswith("#"):
        return {}
    node = schema
    for part in ref[1:].split("/")[1:]:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return {}
    return node


def _node_ends(node: Any, ends: Ends) -> bool:
    if not isinstance(node, Mapping):
        return node is not False
    if "const" in node or "enum" in node:
        return True
    if isinstance(node.get("$ref"), str) and not ends(node["$ref"]):
        return False
    for name, combine in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        children = node.get(name)
        if isinstance(children, list) and children and not combine(_node_ends(child, ends) for child in children):
            return False
    kind = node.get("type")
    if kind in ("object", ["object"]):
        return all(_node_ends(child, ends) for child in _required(node))
    if kind in ("array", ["array"]):
        least = node.get("minItems", 0)
        if isinstance(least, int) and least > 0:
            prefix = node.get("prefixItems")
            first = prefix if isinstance(prefix, list) else []
            rest = [node.get("items", {})] if least > len(first) else []
            return all(_node_ends(child, ends) for child in [*first[:least], *rest])
    return True


def _required(node: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of the properties that an object must have."""
    properties, required = node.get("properties"), node.get("required")
    others = node.get("additionalProperties", {})
    for name in required if isinstance(required, list) else ():
        if isinstance(properties, Mapping) and isinstance(name, str) and name in properties:
            yield properties[name]
        else:
            yield others


# -- Lark's rules -----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"""
    (?P<skip>[ \t\r]+|//[^\n]*|\#[^\n]*)|(?P<line>\n)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[imslux]*|<[^>\n]*>)
    |(?P<name>[A-Za-z_][A-Za-z0-9_\-]*)|(?P<number>-?\d+)
    |(?P<sign>\.\.|->|[:|()\[\]{},?!*+~&=.@])|(?P<directive>%\w+)""", re.VERBOSE)


class _Token(NamedTuple):
    kind: str
    text: str


class _Unknown(Exception):
    """Something that this file does not know of the dialect."""


def rules_end(grammar: str) -> bool:
    """Whether `start` of a Lark grammar leads to some text."""
    try:
        rules = {name: _Body(body).condition() for name, body in _rules(grammar)}
    except (_Unknown, RecursionError):
        return True
    return "start" not in rules or "start" in _solve(rules)


def _rules(grammar: str) -> Iterator[tuple[str, list[_Token]]]:
    """Names and bodies of the rules; those whose names are upper-case are regular expressions, and end."""
    for line in _logical_lines(_tokens(grammar)):
        if line[0].kind == "directive":
            continue
        if line[0].text in ("?", "!") and len(line) > 1:  # what they say is of trees
            line = line[1:]
        name = line[0].text
        colon = next((place for place, token in enumerate(line) if token.text == ":"), None)
        if line[0].kind != "name" or colon is None:
            raise _Unknown
        if name[0].islower() or name[0] == "_" and name.islower():
            yield name, line[colon + 1 :]


def _tokens(grammar: str) -> Iterator[_Token]:
    place = 0
    while place < len(grammar):
        found = _TOKEN.match(grammar, place)
        if found is None or found.lastgroup is None:
            raise _Unknown
        place = found.end()
        if found.lastgroup == "directive" and found.group() in ("%json", "%llguidance", "%regex", "%lark"):
            place = _after_braces(grammar, place)
        if found.lastgroup != "skip":
            yield _Token(found.lastgroup, found.group())


def _after_braces(grammar: str, place: int) -> int:
    """Where what stands in braces from `place` on ends: JSON, whose texts may hold braces too."""
    depth = 0
    for found in re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]]|true|false').finditer(grammar, place):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found.group(), 0)
        if depth <= 0:
            return found.end()
    raise _Unknown


def _logical_lines(tokens: Iterator[_Token]) -> Iterator[list[_Token]]:
    """Rules and directives: a line goes on where the next begins with `|`, or a bracket is open."""
    line: list[_Token] = []
    depth, fresh = 0, False  # fresh: whether a line has just begun
    for token in tokens:
        if token.kind == "line":
            fresh = depth == 0
            continue
        if fresh and line and token.text != "|":
            yield line
            line = []
        fresh = False
        depth += (token.text in "([{") - (token.text in ")]}") if token.kind == "sign" else 0
        line.append(token)
    if line:
        yield line


class _Body:
    """What stands right of a rule's colon, read once from left to right."""

    def __init__(self, tokens: list[_Token]):
        self._tokens = [*tokens, _Token("end", "")]
        self._place = 0

    def condition(self) -> Callable[[Ends], bool]:
        """Whether it ends, by which rules do."""
        found = self._choice()
        if self._next.kind != "end":
            raise _Unknown
        return found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._place]

    def _take(self, text: str) -> bool:
        """Goes over `text`, if it comes next."""
        if self._next.text != text or self._next.kind == "text":
            return False
        self._place += 1
        return True

    def _choice(self) -> Callable[[Ends], bool]:
        choices = [self._sequence()]
        while self._take("|"):
            choices.append(self._sequence())
        return lambda ends: any(choice(ends) for choice in choices)

    def _sequence(self) -> Callable[[Ends], bool]:
        parts: list[Callable[[Ends], bool]] = []
        while self._next.text not in ("|", ")", "]") or self._next.kind == "text":
            if self._next.kind == "end":
                break
            if self._take("->"):
                self._place += 1
                continue
            parts.append(self._repeated())
        return lambda ends: all(part(ends) for part in parts)

    def _repeated(self) -> Callable[[Ends], bool]:
        part = self._one()
        while True:
            if self._take("?") or self._take("*"):
                part = _always
            elif self._take("+"):
                pass
            elif self._take("~"):
                part = self._at_least(part)
                if self._take(".."):
                    self._number()
            elif self._take("{"):
                part = self._at_least(part)
                while not self._take("}"):
                    if self._next.kind not in ("number", "sign"):
                        raise _Unknown
                    self._place += 1
            else:
                return part

    def _at_least(self, part: Callable[[Ends], bool]) -> Callable[[Ends], bool]:
        """`part` so often as the next number says."""
        if self._next.text == ",":
            return _always
        return part if self._number() else _always

    def _number(self) -> int:
        if self._next.kind != "number":
            raise _Unknown
        self._place += 1
        return int(self._tokens[self._place - 1].text)

    def _one(self) -> Callable[[Ends], bool]:
        token = self._next
        if self._take("("):
            inner = self._choice()
            if not self._take(")"):
                raise _Unknown
            return inner
        if self._take("["):
            self._choice()
            if not self._take("]"):
                raise _Unknown
            return _always
        self._place += 1
        if token.kind == "name":
            name = token.text
            return lambda ends: ends(name)
        if token.kind in ("text", "directive"):
            if self._take(".."):  # a range of letters
                self._place += 1
            return _always
        raise _Unknown


def _always(ends: Ends) -> bool:
    return True
