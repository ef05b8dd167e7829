"""The dispatch table: which implementation of an operation runs. Chosen by where its tensors live, never by the caller.

A row is an operation, and its columns are

- `cuda`: tensors on a GPU go to a Triton kernel, or to a library of the card's;
- `cpu`: tensors on the CPU go to libstars, where it was built;
- `reference`: the operation in torch, on any device: what the others are held to, and what serves the rest.

A column may hold several implementations, each with its condition: the first whose condition holds runs, and where none
does, the reference. Modules of the first two columns are imported when a tensor first asks for them.

How to add an operation `double_rows`:

1. `kernels/double_rows.py`: `double_rows_reference(x, out)` in torch, and below it the row:
   `@operation(cpu="stars.bindings.libstars:double_rows", cuda="stars.kernels.triton.double_rows:double_rows",
   reference=double_rows_reference)` over `def double_rows(x: Tensor, out: Tensor) -> None: \"""What it does.\"""`.
2. `kernels/triton/double_rows.py`: a function with these parameters, and `variants()` for the compiler's check.
3. libstars: its struct and number in `bindings/stars.h`, its code in `bindings/src`, its function in the binding.
4. `kernels/__init__.py` names it. A column that is left out goes to the reference.
5. `tests/test_dispatch.py` gets a case of odd sizes, on which every implementation agrees with the reference.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from types import ModuleType
from typing import Any, Literal, NamedTuple, ParamSpec

from torch import Tensor

Column = Literal["cpu", "cuda", "reference"]
P = ParamSpec("P")

_references_only: set[int] = set()
"""Threads inside `references_only`; empty outside of comparisons, so that an operation asks no more than that."""


class Implementation(NamedTuple):
    """A function with an operation's parameters, and when it may run."""

    target: str | Callable[..., None]  # "module:function", imported when it is first needed, or the function itself
    when: Callable[..., bool] | None = None  # of the operation's arguments; None: always

    def load(self) -> Callable[..., None]:
        """The function."""
        return _imported(self.target) if isinstance(self.target, str) else self.target


class Operation(NamedTuple):
    """A row of the table."""

    call: Callable[..., None]  # the operation itself
    cpu: tuple[Implementation, ...]
    cuda: tuple[Implementation, ...]
    reference: Callable[..., None]


OPERATIONS: dict[str, Operation] = {}
"""The table, by name; filled as the operations' modules are imported."""


def operation(
    *, reference: Callable[P, None], cpu: str | Sequence[Implementation] = (),
    cuda: str | Sequence[Implementation] = (), by: str | None = None,
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes a row of the table of a function that has a signature and a docstring and no body.

    `cpu`, `cuda`: an implementation that always runs, as "module:function", or several with their conditions. `by`: the
    parameter whose device decides, or a field of it, as in "draft.steps"; the first parameter where it is None.
    """

    def declare(declared: Callable[P, None]) -> Callable[P, None]:
        parameters = list(inspect.signature(declared).parameters)
        parameter, _, field = (by or parameters[0]).partition(".")
        place = parameters.index(parameter)
        chosen: dict[Column, Callable[..., None]] = {}  # by column, once it was asked for

        @functools.wraps(declared)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            given: Any = args[place] if len(args) > place else kwargs[parameter]
            asked = column(getattr(given, field) if field else given)
            run = chosen.get(asked)
            if run is None:
                run = chosen[asked] = _choice(row, asked)
            run(*args, **kwargs)

        row = OPERATIONS[declared.__name__] = Operation(call, _implementations(cpu), _implementations(cuda), reference)
        return call

    return declare


def column(tensor: Tensor) -> Column:
    """The column of the table that serves operations on `tensor` in this thread."""
    if only_references():
        return "reference"
    if tensor.is_cuda:
        return "cuda"
    return "cpu" if tensor.is_cpu and _libstars().available() else "reference"


def only_references() -> bool:
    """Whether this thread is inside `references_only`."""
    return bool(_references_only) and get_ident() in _references_only


@contextmanager
def references_only() -> Iterator[None]:
    """Inside, every operation of this thread runs as its torch reference; those of other threads do not.

    So an engine in another thread is not taken from one implementation to the other in the midst of a recording.
    """
    thread = get_ident()
    outermost = thread not in _references_only
    try:
        _references_only.add(thread)
        yield
    finally:
        if outermost:
            _references_only.discard(thread)


def _implementations(given: str | Sequence[Implementation]) -> tuple[Implementation, ...]:
    return (Implementation(given),) if isinstance(given, str) else tuple(given)


def _choice(row: Operation, asked: Column) -> Callable[..., None]:
    """What an operation calls for a column: its first implementation whose condition holds, or else the reference."""
    implementations = () if asked == "reference" else row.cpu if asked == "cpu" else row.cuda
    otherwise = _beside_libstars(row.reference) if asked == "cpu" else row.reference
    if not implementations:
        return otherwise
    if implementations[0].when is None:
        return implementations[0].load()

    def run(*args: Any, **kwargs: Any) -> None:
        for implementation in implementations:
            if implementation.when is None or implementation.when(*args, **kwargs):
                implementation.load()(*args, **kwargs)
                return
        otherwise(*args, **kwargs)

    return run


def _beside_libstars(reference: Callable[..., None]) -> Callable[..., None]:
    """A reference that serves tensors of libstars' column: a program that is being recorded would go on without it."""

    def run(*args: Any, **kwargs: Any) -> None:
        _libstars().leave_out()
        reference(*args, **kwargs)

    return run


@functools.cache
def _imported(target: str) -> Callable[..., None]:
    module, _, name = target.partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    return function


@functools.cache
def _libstars() -> ModuleType:
    return importlib.import_module("stars.bindings.libstars")
