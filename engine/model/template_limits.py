"""How much a chat template may do: every loop, call, filter and operator is counted, and every text it makes.

A sandbox keeps a template from reaching out; it does not keep it from running for days or filling the memory. A few
characters suffice for either: nested loops, a macro that calls itself twice, a text doubled forty times, a width of
a thousand million. So the parsed template gets counters where it can repeat itself, and what makes texts is measured
before it is run. Counting needs no timer and no signal: it works in any thread, and stops a template at the same place
on every machine.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

MAX_STEPS = 10_000_000
"""Of one rendering. A conversation of 1,000 messages takes a few hundred thousand, in a template that goes through all
of them again for each a few million."""
MAX_TEXT = 1 << 27
"""Characters that one rendering makes, all of them together: what bounds its memory. A conversation of a million
characters is copied some twenty times."""
MAX_SUMMED = 1 << 31
"""Characters of sums of texts that nothing holds any more, which count no longer. A conversation that is put
together message by message is copied for each of them."""
LONG = 4096
"""Characters of a sum of texts that is looked after."""
READING = 8
"""Characters compared or searched that count as one: they take time, as those made do, and no memory."""
MAX_SOURCE = 200_000
"""Characters of a template: the longest in use have some 50,000, and Python compiles long ones slowly."""
MAX_WIDTH = 4096
"""Of a field, a column, an indentation, in characters."""
MAX_BITS = 1 << 15
"""Of an integer: Python writes none of more than 14,285 as text."""
ITEM, REFERENCE = 64, 8
"""What an item of a list counts as, in characters: about its bytes, if it is a text of its own, and if it is not."""
CALL = 10
"""Steps that a call of a macro counts as, or of a loop from within."""
NODES = 32
"""Nodes of a loop's or macro's body that count as one step."""

_SHALLOW = frozenset((
    "abs", "attr", "batch", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map",
    "random", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice"))
"""Filters whose work does not depend on what the items of a collection hold."""
_ITEMISING = frozenset((
    "batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "slice",
    "sort", "sum", "title", "unique", "wordcount"))
"""Filters that make an item of every character of a text, or of every word."""
_BACKWARDS = frozenset(("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"))
"""Methods of texts whose work grows with the product of both lengths: Python searches fast from the left only."""
_ENCODINGS = frozenset(("ascii", "latin-1", "latin1", "utf-8", "utf8"))
"""Others may work with the square of the text, as punycode does."""
_BACKTRACKING = frozenset(("pprint", "striptags", "urlize", "wordwrap"))
"""Filters whose work may grow with the square of the text."""
_SIZED = frozenset(("batch", "center", "indent", "round", "slice", "tojson", "wordwrap"))
"""Filters with a width, a count or a precision among their arguments."""
_COMPARING = frozenset(("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le",
                        "lessthan", "lt", "ne"))
"""Tests that look into collections."""
Node = TypeVar("Node", bound=nodes.Node)
_FIELD = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


class LimitExceeded(TemplateRuntimeError):
    """A template did more than it may."""


class Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = MAX_TEXT
        self.summed = MAX_SUMMED
        self.sums: list[str] = []

    def step(self, count: int = 1) -> None:
        """Takes `count` steps off."""
        self.steps -= count
        if self.steps < 0:
            raise LimitExceeded(f"it takes more than {MAX_STEPS} steps")

    def text(self, count: int) -> None:
        """Takes `count` characters off."""
        self.characters -= count
        if self.characters < 0 and not self._free():
            raise LimitExceeded(f"it goes through more than {MAX_TEXT} characters")

    def _free(self) -> bool:
        """Counts the sums no longer that nothing else holds; whether that sufficed, and was worth the search."""
        alone = object()
        count = sys.getrefcount(alone)
        kept, freed = [], 0
        while self.sums:
            text = self.sums.pop()
            if sys.getrefcount(text) > count:
                kept.append(text)
            else:
                freed += len(text)
        self.sums = kept
        freed = min(freed, self.summed)
        self.summed -= freed
        self.characters += freed
        return self.characters >= 0 and freed > MAX_TEXT // 8

    def weigh(self, value: Any, indent: int = 0) -> int:
        """Characters of `value`'s text, about: a collection that holds one thing many times is long only as text."""
        if type(value) is str:
            return len(value)
        total, stack = 0, [(value, 0)]
        while stack:
            self.step()
            item, depth = stack.pop()
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, int):
                total += 8 + item.bit_length() // 3
            else:
                total += ITEM
                if isinstance(item, Mapping):
                    parts: Any = (part for pair in item.items() for part in pair)
                elif isinstance(item, Namespace):
                    parts = item._Namespace__attrs.values()
                elif isinstance(item, Collection) and not isinstance(item, range):
                    parts = item
                else:
                    continue
                stack.extend((part, depth + 1) for part in parts)
            total += indent * depth
            if total > self.characters:
                self.text(total)
        return total

    def scan(self, *values: Any) -> None:
        """Counts reading `values`, whatever is in them included."""
        for value in values:
            self.text(self.weigh(value))

    def read(self, *values: Any) -> None:
        """Counts looking into `values`, which makes nothing."""
        for value in values:
            self.text(self.weigh(value) // READING)

    def taken(self, value: Any) -> Any:
        """`value`, a result, once it is counted; iterators count what they give."""
        if isinstance(value, (str, bytes)):
            self.text(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitExceeded(f"it computes an integer of more than {MAX_BITS} bits")
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self.text(REFERENCE * len(value))
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self._counted(value)
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            self.text(REFERENCE)
            yield value

    def keyed(self, values: Iterable[Any], pairs: bool = False) -> Iterator[Any]:
        """`values`, which become keys, or with `pairs` their first items: a key is compared with all of its hash. Those
        of texts cannot be foreseen and those of small integers differ; of others all may be one."""
        colliding = 0
        for value in values:
            key = value[0] if pairs and isinstance(value, (list, tuple)) and value else value
            if not isinstance(key, (str, bytes)) and (not isinstance(key, int) or abs(key) >= sys.hash_info.modulus):
                colliding += 1
                self.step(colliding if not isinstance(key, Mapping) else 1 + colliding // READING)  # an item has it
            yield value

    def width(self, *values: Any) -> None:
        """Refuses a width, count or precision that is too large."""
        for value in values:
            if isinstance(value, int) and abs(value) > MAX_WIDTH:
                raise LimitExceeded(f"it asks for a width of more than {MAX_WIDTH}")

    def percent(self, form: str | bytes, values: Any) -> None:
        """Counts `form % values`."""
        form = form.decode("latin1") if isinstance(form, bytes) else form
        if re.search(r"%\([^)]*\(", form):
            raise LimitExceeded("it formats fields whose names hold brackets")
        fields = _FIELD.findall(form)
        for number in (number for field in fields for number in field if number):
            if number == "*" or len(number) > 4 or int(number) > MAX_WIDTH:
                raise LimitExceeded(f"it asks for a width of more than {MAX_WIDTH}, or for one from its arguments")
            self.text(int(number))
        self.text(len(form) + self.weigh(values) * (max(1, len(fields)) if isinstance(values, Mapping) else 1))

    def method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Counts a call of a method of a built-in type, before it is made; the arguments to make it with."""
        if name == "join" and args and isinstance(owner, (str, bytes)):
            args = (list(args[0]), *args[1:]) if not isinstance(args[0], (str, bytes)) else args
            self.text(len(owner) * len(args[0]))
        self.scan(*args, *kwargs.values())
        given = (*args, *kwargs.values())
        numbers = [value for value in given if isinstance(value, int)]
        if isinstance(owner, (str, bytes)):
            self.text(len(owner))
            if name in ("center", "ljust", "rjust", "zfill"):
                self.width(*numbers)
            elif name in _BACKWARDS:
                self.text(len(owner) * sum(len(one) for one in given if isinstance(one, (str, bytes))) // READING)
            elif name in ("encode", "decode") and str(
                    args[0] if args else kwargs.get("encoding", "utf-8")).lower() not in _ENCODINGS:
                raise LimitExceeded("it encodes a text otherwise than in utf-8, ascii or latin-1")
            elif name == "expandtabs":
                self.width(*numbers)
                self.text(len(owner) * max([8, *numbers]))
            elif name == "replace" and len(args) > 1:
                self.replacement(owner, args[0], args[1])
            elif name == "translate":
                self.text(len(owner) * sum(map(self.weigh, args)))
            if name in ("split", "rsplit", "splitlines"):
                separator = args[0] if args else kwargs.get("sep")
                parts = (_occurrences(owner, separator) if isinstance(separator, type(owner)) and separator
                         else len(owner) // 2)
                asked = min([n for n in numbers if n >= 0], default=parts) if name != "splitlines" else parts
                self.text(ITEM * min(parts, asked))
        elif name in ("count", "index"):
            self.step(len(owner) if isinstance(owner, range) else 1)
            self.scan(owner)
        elif name == "to_bytes":
            self.width(*numbers)
        return args

    def replacement(self, value: Any, old: Any, new: Any) -> None:
        """Counts what stands in the place of every `old`."""
        if isinstance(value, (str, bytes)) and isinstance(old, type(value)):
            self.text(_occurrences(value, old) * self.weigh(new))
        else:
            self.text(self.weigh(value) * (1 + self.weigh(new)))


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a Meter for every rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, *args: Any, filters: dict[str, Callable[..., Any]], **kwargs: Any):
        super().__init__(*args, finalize=_finalize, **kwargs)
        self.context_class = _MeteredContext
        self.globals.pop("lipsum")  # text by the paragraph
        self.filters = {name: _metered_filter(name, function) for name, function in {**self.filters, **filters}.items()}
        self.filters |= {"each ": _each, "concat ": _concat, "read ": _read, "data ": _data, "taken ": _taken}
        self.tests = {name: _metered_test(name, function) for name, function in self.tests.items()}

    def compile_limited(self, source: str) -> Template:
        """The template of `source`, with its counters in place."""
        if len(source) > MAX_SOURCE:
            raise LimitExceeded(f"it has more than {MAX_SOURCE} characters")
        code = self.compile(_Counters().visit(self.parse(source)))
        return self.template_class.from_code(self, code, self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 as Jinja's own
        """Calls an object."""
        meter = _meter(__context)
        meter.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes)) or (
                isinstance(method, types.BuiltinMethodType) and not isinstance(owner, types.ModuleType)):
            args = meter.method(owner, method.__name__, args, kwargs)
            if method.__name__ == "fromkeys" and args and isinstance(args[0], Iterable):
                args = (list(meter.keyed(args[0])), *args[1:])
            if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
                return meter.taken(__self._format(meter, method, args, kwargs))
        elif isinstance(__obj, LoopContext):
            args = tuple(list(values) for values in args)
            meter.step(CALL + sum(map(len, args)))
        elif isinstance(__obj, Macro):
            meter.step(CALL)
        else:
            meter.scan(*args, *kwargs.values())
            if __obj is dict and args and isinstance(args[0], Iterable) and not isinstance(args[0], Mapping):
                args = (list(meter.keyed(args[0], pairs=True)), *args[1:])
        return meter.taken(super().call(__context, __obj, *args, **kwargs))

    def _format(self, meter: Meter, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        text = method.__self__
        if method.__name__ == "format_map":
            [kwargs], args = args, ()
        if isinstance(text, Markup):
            return Markup(_EscapeFormatter(self, meter, escape=text.escape).vformat(text, args, kwargs))
        return _Formatter(self, meter).vformat(text, args, kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator to two values."""
        meter = _meter(context)
        meter.step()
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and isinstance(left, (str, bytes)):
            meter.percent(left, right)
        elif operator == "*" and not numbers:
            many, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(many, (str, bytes, list, tuple)) and isinstance(count, int):
                meter.text(len(many) * max(0, count) * (1 if isinstance(many, (str, bytes)) else REFERENCE))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_BITS:
                raise LimitExceeded(f"it computes an integer of more than {MAX_BITS} bits")
        elif not numbers:
            for value in (left, right):
                if isinstance(value, Collection):
                    meter.text(len(value) * (1 if isinstance(value, (str, bytes)) else REFERENCE))
        result = super().call_binop(context, operator, left, right)
        # a sum of texts or lists is counted already, by its parts; markup escapes a part that is none
        if operator != "+" or type(result) not in (str, bytes, list, tuple):
            return meter.taken(result)
        if type(result) is str and len(result) >= LONG:
            meter.sums.append(result)
        return result


class _MeteredContext(Context):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.meter = Meter()

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        assert isinstance(context, _MeteredContext)
        context.meter = self.meter
        return context


def _meter(context: Context) -> Meter:
    assert isinstance(context, _MeteredContext)  # LimitedEnvironment makes no others
    return context.meter


class _Counters(NodeTransformer):
    """Puts the counters into a parsed template.

    Filters that take the context are also never run while a template is compiled, as those of constants else are.
    """

    def _within(self, node: Node) -> Node:
        return cast(Node, self.generic_visit(node))

    def visit_For(self, node: nodes.For) -> nodes.For:
        size = _nodes(node.body)
        node = self._within(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _filter("each ", node.iter, nodes.Const(1 + size // NODES))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        node = self._within(node)
        node.nodes = [_filter("data ", nodes.Const(size)), *node.nodes] if size else node.nodes
        return node

    def _body(self, node: Any) -> Any:
        size = _nodes(node.body)
        node = self._within(node)
        node.body = [nodes.Output([_filter("data ", nodes.Const(size))]), *node.body]
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        return _filter("concat ", nodes.List(self._within(node).nodes))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        node = self._within(node)
        node.expr = _reading(node.expr)
        for operand in node.ops:
            operand.expr = _reading(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        node = self._within(node)
        node.key = _reading(node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node = self._within(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter("taken ", node)
        node.arg = _reading(node.arg)
        return node


def _nodes(body: list[nodes.Node]) -> int:
    """Nodes in a body, all levels."""
    count, stack = 0, list(body)
    while stack:
        stack.extend(stack.pop().iter_child_nodes())
        count += 1
    return count


def _filter(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None)  # no template can write a name that ends in a space


def _reading(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter("read ", node)


@pass_context
def _each(context: Context, values: Any, cost: int) -> Any:
    """A loop's values: its steps are counted before it begins, where their number is known."""
    if isinstance(values, Iterator):
        return _meter(context).taken(values)
    _meter(context).step(cost * len(values) if hasattr(values, "__len__") else cost)
    return values


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    _meter(context).scan(*parts)
    return (markup_join if context.eval_ctx.autoescape else str_join)(parts)


@pass_context
def _read(context: Context, value: Any) -> Any:
    _meter(context).read(value)
    return value


@pass_context
def _data(context: Context, count: int) -> str:
    _meter(context).step(1 + count // NODES)
    _meter(context).text(count)
    return ""


@pass_context
def _taken(context: Context, value: Any) -> Any:
    return _meter(context).taken(value)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    _meter(context).step()
    _meter(context).scan(value)
    return value


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = _first_argument(function)

    @pass_context
    def metered(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        meter, given = _meter(context), (*args, *kwargs.values())
        meter.step()
        if isinstance(value, Iterator) and name in ("join", "sum"):
            value = list(value)
        if name not in _SHALLOW:
            indent = max([0, *(n for n in given if isinstance(n, int))]) if name == "tojson" else 0
            weight = meter.weigh(value, min(indent, MAX_WIDTH))
            meter.text(weight * (1 + weight // ITEM) if name in _BACKTRACKING else weight)
            meter.scan(*given)
        if isinstance(value, (str, bytes)) and name in _ITEMISING:
            meter.text(ITEM * len(value))
        if name in _SIZED:
            meter.width(*given)
        if name == "unique" and isinstance(value, Iterable):
            value = meter.keyed(value)
        if name == "format":
            meter.percent(str(value), kwargs or args)
        elif name == "indent":
            meter.text((1 + str(value).count("\n")) * max([4, *(meter.weigh(width) for width in given),
                                                           *(n for n in given if isinstance(n, int))]))
        elif name == "replace" and len(given) > 1:
            meter.replacement(value, given[0], given[1])
        elif name == "trim":
            meter.text(meter.weigh(value) * sum(len(one) for one in given if isinstance(one, str)) // READING)
        elif name in ("join", "sum") and isinstance(value, Collection):
            # a separator for each item; a sum of lists copies all that went before for each
            meter.text(len(value) * (meter.weigh(given[:1]) if name == "join" else
                                     meter.weigh(value) if any(isinstance(n, Collection) for n in given) else 1))
        return meter.taken(function(*first(context), value, *args, **kwargs))

    return metered


def _metered_test(name: str, function: Any) -> Callable[..., Any]:
    first = _first_argument(function)

    @pass_context
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        _meter(context).step()
        if name in _COMPARING:
            _meter(context).read(*args, *kwargs.values())
        return function(*first(context), *args, **kwargs)

    return metered


def _first_argument(function: Callable[..., Any]) -> Callable[[Context], tuple[Any, ...]]:
    """What a filter or test is to be given before its value, as Jinja would."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    return {None: lambda context: (), "context": lambda context: (context,),
            "eval_context": lambda context: (context.eval_ctx,),
            "environment": lambda context: (context.environment,)}[kind]


def _occurrences(text: Any, part: Any) -> int:
    """How often `part` stands in `text`: both are texts, or both bytes."""
    count: int = text.count(part)
    return count


class _Formatter(SandboxedFormatter):
    """Counts what str.format writes, field by field."""

    def __init__(self, env: LimitedEnvironment, meter: Meter, **kwargs: Any):
        super().__init__(env, **kwargs)
        self._meter = meter

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._meter.scan(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.step()
        self._meter.scan(value)
        for number in re.findall(r"\d+", format_spec):
            self._meter.width(int(number[-9:]) if len(number) < 10 else MAX_WIDTH + 1)
            self._meter.text(int(number))
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same for markup."""
