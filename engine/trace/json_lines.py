"""Strict JSON, one value a line: what traces and the rows of the command line are written in."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_NESTING = 100  # of what is read: far beyond any use, and far from what exhausts the stack when it is written again


def plain(value: Any) -> Any:
    """`value` in strict JSON's terms: numbers that JSON lacks as text, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def dumps(value: Any, ascii_only: bool = False) -> str:
    """One line of strict JSON, readable text where it can be written as UTF-8."""
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    try:
        text.encode("utf8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(value, allow_nan=False)
    return text


def loads(line: bytes | str) -> Any:
    """The value of one line of strict JSON in UTF-8; ValueError says what is wrong with any other line."""
    text = line if isinstance(line, str) else line.decode("utf8")
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # advice for programmers follows
            raise ValueError("it has a number of too many digits") from None
        raise


def too_deep(value: Any) -> bool:
    """Whether a value that was read nests lists and objects more than MAX_NESTING deep."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [item for outer in level if isinstance(outer, (dict, list))
                 for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond the range of numbers")
    return number
