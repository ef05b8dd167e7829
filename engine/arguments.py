"""What a user typed, brought into Python's own types or refused by name: one rule for every argument of the package."""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from stars.errors import RequestError

MAX_SHOWN = 60  # characters of a value in a message
MAX_LISTED = 18  # names in a message
Cls = TypeVar("Cls", bound=type)


class Absent(NamedTuple):
    """A parameter that others have and this package has not."""

    neutral: tuple[Any, ...]  # values that ask for nothing and are accepted; an enum's member may stand by its name
    advice: str  # what to do instead


def shown(value: Any) -> str:
    """`repr(value)` for a message: short, and there even where a value cannot be printed."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, an object of somebody else's
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def bare(value: Any) -> Any:
    """What an array or a tensor of no dimension holds, and numpy's scalars, as Python's own; all else as it is."""
    try:
        if not isinstance(value, type) and getattr(value, "shape", None) == () and hasattr(value, "dtype"):
            return value.item()
    except Exception:  # an object of somebody else's, a tensor without values
        pass
    return value


def request_ids(given: Any) -> list[str]:
    """One id, or each of several; RequestError where there is something else."""
    ids: list[Any] = [given] if isinstance(given, (str, int)) or not isinstance(given, Iterable) else list(given)
    for one in ids:
        if not isinstance(one, (str, int)):
            raise RequestError(f"a request id is a string, and {shown(one)} is none: give one, or a list of them")
    return ids


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as int: Python's, numpy's, those of `bare`; no bool. RequestError for others and outside least .. most.
    """
    plain = bare(value)
    if isinstance(plain, numbers.Integral) and not isinstance(plain, bool):
        number = int(plain)
        if number >= least and (most is None or number <= most):
            return number
    wanted = f"an integer of at least {least}" if most is None or number_below(plain, least) else (
        f"an integer from {least} to {most}")
    raise RequestError(f"{name} is {shown(value)}, it must be {wanted}")


def real(name: str, value: Any, wanted: str, allowed: Callable[[float], bool]) -> float:
    """`value` as float, where it is a real number, fits and is `allowed`; else RequestError "… it must be `wanted`"."""
    number = as_float(value)
    if number is None or not allowed(number):
        raise RequestError(f"{name} is {shown(value)}, it must be {wanted}")
    return number


def flag(name: str, value: Any) -> bool:
    """`value` as bool: Python's and numpy's. RequestError for others: the text "no" would count as true."""
    plain = bare(value)
    if isinstance(plain, bool):
        return plain
    raise RequestError(f"{name} is {shown(value)}, it must be True or False")


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of the texts `choices`; RequestError, which lists them, for anything else."""
    if isinstance(value, str) and value in choices:
        return value
    raise RequestError(f"{name} is {shown(value)}, it must be one of {', '.join(choices)}")


def as_float(value: Any) -> float | None:
    """`value` as float if it is a real number (int, float, numpy's, a fraction) that a float can hold; no bool."""
    value = bare(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except Exception:  # OverflowError, or whatever a number of somebody else's raises
        return None


def number_below(value: Any, least: float) -> bool:
    """Whether `value` is a number below `least`."""
    number = as_float(value)
    return number is not None and not math.isnan(number) and number < least


def closest(name: str, known: Iterable[str]) -> str:
    """What to tell somebody who typed `name`, of which nothing is known."""
    known = list(known)
    found = difflib.get_close_matches(name.lower(), known, n=1)
    more = "" if len(known) <= MAX_LISTED else f" and {len(known) - MAX_LISTED} more"
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(known[:MAX_LISTED])}{more}"


def asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether `value` is one of `neutral`, told by value, and by type but for 1 and 1.0; never raises, whatever it is.
    """
    if isinstance(value, enum.Enum):
        return value.name in neutral
    value = bare(value)
    if value is None or not isinstance(value, (bool, int, float, str, list, tuple, dict)):
        return value is None and None in neutral
    return any((type(value) is type(item) or {type(value), type(item)} == {int, float}) and value == item
               for item in neutral)


def refuse_unknown(owner: str, name: str, value: Any, known: Iterable[str], absent: Mapping[str, Absent]) -> None:
    """Raises RequestError for a parameter that is not implemented, unless its value asks for nothing."""
    entry = absent.get(name)
    if entry is None:
        raise RequestError(f"{owner} has no parameter {shown(name)}: {closest(name, known)}")
    if not entry.neutral:
        raise RequestError(f"{owner} has no parameter {shown(name)}: {entry.advice}")
    if not asks_for_nothing(value, entry.neutral):
        raise RequestError(f"{owner}.{name} is not implemented: {entry.advice}")


def refuse_keywords(owner: str, others: Mapping[str, Any], takes: Callable[..., Any],
                    absent: Mapping[str, Absent]) -> None:
    """RequestError for the keywords `others`, which `takes` has not, unless `absent` has them at these values."""
    for name, value in others.items():
        refuse_unknown(owner, name, value, _parameters(takes), absent)


def known_keywords(owner: str, given: dict[str, Any], takes: Callable[..., Any], absent: Mapping[str, Absent],
                   ) -> dict[str, Any]:
    """The keywords of `given` that `takes` has; RequestError for others, unless `absent` has them at these values."""
    known = _parameters(takes)
    kept = {name: value for name, value in given.items() if name in known}
    for name in given.keys() - kept.keys():
        refuse_unknown(owner, name, given[name], known, absent)
    return kept


@functools.cache
def _parameters(takes: Callable[..., Any]) -> list[str]:
    """Names that `takes` may be given as keywords."""
    return [name for name, parameter in inspect.signature(takes).parameters.items()
            if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD]


def refuse_others(call: str, others: Mapping[str, Any], elsewhere: Mapping[str, str], known: Iterable[str]) -> None:
    """Raises RequestError for keywords that `call` has not: `elsewhere` says of some where they belong instead."""
    for name, value in others.items():
        if name not in elsewhere:
            raise RequestError(f"{call} has no parameter {shown(name)}: {closest(name, known)}")
        if value is not None:
            raise RequestError(f"{call} has no parameter {shown(name)}: {elsewhere[name]}")


def known_by_name(absent: Mapping[str, Absent]) -> Callable[[Cls], Cls]:
    """Makes a dataclass refuse keywords it has not in one sentence, and take those of `absent` at neutral values."""
    def decorate(cls: Cls) -> Cls:
        generated = cls.__init__  # type: ignore[misc]

        @functools.wraps(generated)  # which keeps the signature for help() and editors
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            generated(self, *args, **known_keywords(cls.__name__, kwargs, generated, absent))

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return decorate


def refuse_bare_prompt(prompt: Any) -> None:
    """Points to the dictionary that is meant where a message, a list of messages or of token ids stands alone."""
    if isinstance(prompt, dict):
        bare = "role" in prompt and "messages" not in prompt
        what, form = "a single message", '{"messages": [...]}'
    elif isinstance(prompt, (list, tuple)) and prompt:
        bare = all(isinstance(item, dict) and "role" in item for item in prompt)
        what, form = "a bare list of messages", '{"messages": [...]}'
        if not bare:
            bare = all(isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in prompt)
            what, form = "a bare list of token ids", '{"prompt_token_ids": [...]}'
    else:
        return
    if bare:
        raise RequestError(f"the prompt is {what}: give {form}")
