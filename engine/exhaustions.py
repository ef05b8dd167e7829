"""What the loop does where a rule decides nothing and no attempt is left: a plan's `exhaust`, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar


@dataclass(frozen=True)
class BestSeen:
    """The attempt of the highest reward, the earliest of equals; without rewards the first."""

    draws: ClassVar[bool] = False  # whether `key` reads its random number

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """Of a hypothesis' attempts the one of the highest key is kept, the earliest of equals."""
        return -math.inf if reward is None else reward


@dataclass(frozen=True)
class First:
    """The first attempt, whatever its reward."""

    draws: ClassVar[bool] = False

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """As `BestSeen.key`."""
        return -attempt


@dataclass(frozen=True)
class Last:
    """The last attempt, whatever its reward."""

    draws: ClassVar[bool] = False

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """As `BestSeen.key`."""
        return attempt


@dataclass(frozen=True)
class Softmax:
    """Attempt i with probability exp(r_i / temperature) / sum over the attempts j seen of exp(r_j / temperature).

    A reward of -inf is never kept, unless all are: then the first is. Drawn as the argmax of r_i + temperature * g_i,
    with standard Gumbel noise g_i.
    """

    temperature: float = 1.0
    draws: ClassVar[bool] = True

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """As `BestSeen.key`; uniform: the attempt's own, in (0, 1)."""
        if reward is None or reward == -math.inf:
            return -math.inf
        return reward - self.temperature * math.log(-math.log(uniform))


@dataclass(frozen=True)
class Refuse:
    """Nothing: the response ends with finish_reason "refused" and what was committed before."""


@dataclass(frozen=True)
class Relax:
    """The rule is asked again about all attempts seen, with `State.relaxed` = 1, 2, … `times`; nothing is drawn.

    A threshold is lowered by `relaxed * by`, and tests every attempt with the random number that it had. Where nothing
    is accepted after `times`, `then` applies.
    """

    by: float
    times: int = 1
    then: Any = BestSeen()


@dataclass(frozen=True)
class BackUp:
    """The newest committed segment is taken back and drawn anew, at most `times` in a response; no random number of it
    comes again. In the first segment, or where none is left, `then` applies."""

    times: int = 1
    then: Any = BestSeen()


@dataclass(frozen=True)
class Redraft:
    """`model`, a name as in Engine(models=…) or "lm", draws `attempts` at the segment, and of those alone `decide`, a
    rule, keeps one; without it the first is kept, and none is scored.

    They are numbered after the plan's own, so that all of their random numbers are others. `decide` is given their
    rewards, not what else the plan's score reads, and no memory. Where it decides nothing either, the highest reward of
    them is kept. A segment that was redrawn counts as a fallback, and its attempts are not among those of the accept
    rate. Only for plans of one hypothesis that draw segments.
    """

    model: str
    attempts: int = 1
    decide: Any = None


Pick = BestSeen | First | Last | Softmax
Exhaustion = Pick | Relax | BackUp | Refuse | Redraft
EXHAUSTIONS: Mapping[str, Callable[..., Exhaustion]] = MappingProxyType({
    "best_seen": BestSeen, "first": First, "last": Last, "softmax": Softmax, "relax": Relax, "back_up": BackUp,
    "refuse": Refuse, "redraft": Redraft})
"""Exhaustions by the names that stand for them; "relax:0.5", "softmax:0.7", "back_up:2" and "redraft:small" give the
first argument."""
MAX_RELAXED = 1 << 10  # times that a rule is asked again
MAX_REDRAWN = 1 << 16  # attempts of another model
MAX_BACKED_UP = 1 << 20  # segments that a response takes back: it has no more


def exhaustion(given: Any) -> Exhaustion:
    """An exhaustion by its name, or as it is, with numbers of Python's own; ValueError says what it must be."""
    made = _by_name(given) if isinstance(given, str) else given
    if isinstance(made, Softmax):
        return Softmax(_above_zero("temperature", made.temperature))
    if isinstance(made, (Relax, BackUp)):
        then = exhaustion(made.then)
        if type(made) in [type(step) for step in steps(then)]:
            raise ValueError(f"it must hold {type(made).__name__} once: give what it has as `then` another end")
        if isinstance(made, Relax):
            return Relax(_above_zero("by", made.by), _times(made.times, MAX_RELAXED), then)
        return BackUp(_times(made.times, MAX_BACKED_UP), then)
    if isinstance(made, Redraft):
        if not isinstance(made.model, str) or not made.model:
            raise ValueError("it must have the name of the model that redraws")
        if made.decide is not None and (isinstance(made.decide, type) or not callable(made.decide)):
            raise ValueError("its decide must be a rule, or None")
        return Redraft(made.model, _times(made.attempts, MAX_REDRAWN), made.decide)
    if isinstance(made, (BestSeen, First, Last, Refuse)):
        return made
    raise ValueError(f"it must be one of {', '.join(EXHAUSTIONS)}, or an object such as "
                     "stars.exhaustions.Softmax(temperature=0.5)")


def steps(choice: Exhaustion) -> tuple[Exhaustion, ...]:
    """What is tried, one after the other: `choice`, what it has as `then`, and so on."""
    return choice, *(steps(choice.then) if isinstance(choice, (Relax, BackUp)) else ())


def _by_name(given: str) -> Any:
    name, colon, argument = given.partition(":")
    if name == "relax" and not colon:
        raise ValueError('it must say by how much, as "relax:0.5" does')
    if name == "redraft" and not colon:
        raise ValueError('it must say by which model, as "redraft:small" does')
    if not colon:
        return EXHAUSTIONS[name]() if name in EXHAUSTIONS else None
    try:
        if name == "back_up":
            return BackUp(int(argument))
        if name == "redraft":
            return Redraft(argument)
        return {"softmax": Softmax, "relax": Relax}[name](float(argument))
    except ValueError:
        raise ValueError("it must have a number after the colon") from None
    except KeyError:
        return None


def _above_zero(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except (OverflowError, ValueError):
        number = math.nan
    if not 0.0 < number < math.inf:
        raise ValueError(f"its {name} must be a finite number above 0")
    return number


def _times(value: Any, most: int) -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else 0
    if not 1 <= number <= most:
        raise ValueError(f"its times must be an integer from 1 to {most}")
    return number
