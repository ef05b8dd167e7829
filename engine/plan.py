"""What a method asks of the loop: a plan of six choices, checked before it is queued."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from stars.arguments import choice, flag, integer, real, shown
from stars.errors import RequestError, describe
from stars.exhaustions import BackUp, BestSeen, Exhaustion, Redraft, Relax, Softmax, exhaustion, steps
from stars.rules import OWN_RULES, AcceptPrefix, Always, FirstAbove, Rule, Threshold

OWN = "lm"  # the name of the engine's own model beside those of Engine(models=…)
DRAFT_SIZE = 16  # tokens drafted at a time where the method itself has no segments
MAX_ATTEMPTS = (1 << 24) - 1  # the attempt has 24 bits of the random counter
MAX_SIZE = (1 << 31) - 1
MAX_RANKS = 1 << 8  # most tokens that are enumerated: of so many there is room on a device
READS_REWARDS = tuple(OWN_RULES - {Always, AcceptPrefix})
MAX_UNIFORMS = 1 << 10  # random numbers of one attempt, or of a group's round


@dataclass(frozen=True)
class Sampled:
    """Attempts are drawn from the language model as the sampling parameters say."""


@dataclass(frozen=True)
class Enumerate:
    """Attempts are next tokens in the order of their probability, the most probable first, equal ones by their ids.

    Attempt a of a hypothesis is the a-th of those that the sampling parameters' filters keep of the penalised logits,
    k of them at most. Where fewer are kept there are fewer attempts. Nothing is drawn: all attempts differ, at
    temperature 0 too, where filters keep what they keep at temperature 1.
    """

    k: int


@dataclass(frozen=True)
class Blend:
    """Attempts are drawn from softmax(sum over models m of weight_m * log p_m), filters and penalties applied to that.

    weights: (name, weight) of each model, "lm" the engine's own, the others those of Engine(models=…). All of them read
    the same tokens. log p_m and the logits of m differ by a constant of each position, so that it makes no difference
    which are weighted.
    """

    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Model:
    """Attempts are drawn from the named model of Engine(models=…), as the sampling parameters say."""

    name: str


@dataclass(frozen=True)
class Prompted:
    """Attempts are drawn by the language model with `draft` put before the prompt, and judged by it with `judge` put
    there instead; both are texts, and an empty one stands for the prompt alone. alternate: whether the two change
    places after every segment. How they are put there says `stars.prompt.after`."""

    draft: str
    judge: str
    alternate: bool = False


@dataclass(frozen=True)
class Fixed:
    """Segments of `size` tokens (B), fewer where the response ends or max_tokens clips the last one."""

    size: int
    cut: ClassVar[float] = math.inf

    @property
    def draft(self) -> int:
        """Most tokens of one draft."""
        return self.size

    @property
    def least(self) -> int:
        """Fewest tokens of a draft that does not end the response."""
        return self.size


@dataclass(frozen=True)
class Entropy:
    """Segments that end before a token of which the language model is uncertain: once `least` tokens are drawn, where
    the entropy of its next distribution is at least `cut` nats; after `most` tokens anyway; where the response ends.

    The entropy is that of softmax(logits), penalties included: at temperature 1, over the whole vocabulary, before
    filters. So a segment is a function of what was drawn, and has a token at least.
    """

    cut: float
    least: int
    most: int

    @property
    def draft(self) -> int:
        """Most tokens of one draft."""
        return self.most


@dataclass(frozen=True)
class Whole:
    """An attempt is a whole response, drafted `piece` tokens at a time; the rule is asked when all have ended, or, if
    it reads in order, as they end."""

    piece: int = DRAFT_SIZE
    cut: ClassVar[float] = math.inf

    @property
    def draft(self) -> int:
        """Most tokens of one draft."""
        return self.piece

    @property
    def least(self) -> int:
        """Fewest tokens of a draft that does not end the response."""
        return self.piece


@dataclass(frozen=True)
class Lanes:
    """width: attempts of a hypothesis drawn at once; None lets the engine choose. attempts: at one segment of a
    hypothesis, before the plan's exhaustion; a tuple says those of the first, second, … segment, and its last number
    those of all segments after. population: hypotheses of one completion. barrier: whether a completion whose segment
    is decided waits until those of all others with a barrier are.

    Of whole responses under a rule that reads in order, width is how many may be under way beyond what is decided."""

    width: int | None = None
    attempts: int | tuple[int, ...] = 1
    population: int = 1
    barrier: bool = False

    @property
    def by_segment(self) -> tuple[int, ...]:
        """Attempts at the first, second, … segment; the last number is that of all segments after."""
        return self.attempts if isinstance(self.attempts, tuple) else (self.attempts,)


@dataclass(frozen=True)
class Hidden:
    """Each attempt's reward is what a named head of Engine(heads=…) says of the language model's hidden state, behind
    the final norm, at the attempt's last token. An attempt that is alone is not asked about: its reward is None."""

    head: str


@dataclass(frozen=True)
class Ratio:
    """Each attempt's `per_token` is log p - log q of its tokens: p the language model's, under the judge's prompt where
    attempts are `Prompted`, q that of the proposal. filtered: of both as the sampling parameters draw from them, which
    is what acceptance needs; otherwise both are raw, at temperature 1 without filters."""

    filtered: bool = False


@dataclass(frozen=True)
class Score:
    """when: what the reward model reads: every attempt ("segment"), each response once, when it has ended ("end"), or
    nothing ("never"). prompt: whether it reads the prompt alone, too, as the response begins. reads: what else is read
    of every attempt before the rule sees it, by the language models themselves."""

    when: Literal["segment", "end", "never"] = "segment"
    prompt: bool = False
    reads: Hidden | Ratio | None = None


Propose = Sampled | Enumerate | Blend | Model | Prompted
PROPOSES: tuple[type[Any], ...] = (Sampled, Enumerate, Blend, Model, Prompted)


class Plan(NamedTuple):
    """The loop's six choices for one request."""

    propose: Propose
    segment: Fixed | Entropy | Whole
    lanes: Lanes
    score: Score
    decide: Rule
    exhaust: Exhaustion | str = BestSeen()  # what is done when the rule decides nothing; a name as in EXHAUSTIONS

    @property
    def whole(self) -> bool:
        """Whether an attempt is a whole response."""
        return isinstance(self.segment, Whole)

    @property
    def in_turn(self) -> bool:
        """Whether whole responses are judged one after the other, and drawn as they are wanted."""
        return self.whole and self.decide.in_order

    @property
    def ranks(self) -> int:
        """How many next tokens are enumerated; 0: attempts are drawn."""
        return self.propose.k if isinstance(self.propose, Enumerate) else 0

    @property
    def drafts_with(self) -> tuple[tuple[str, float], ...]:
        """The models that attempts are drawn from, by name, with the weights of their log-probabilities."""
        if isinstance(self.propose, Blend):
            return self.propose.weights
        return ((self.propose.name if isinstance(self.propose, Model) else OWN, 1.0),)

    @property
    def drawn_after(self) -> int:
        """Tokens that a rule may have drawn after the kept ones of an attempt."""
        return 1 if self.score.reads == Ratio(filtered=True) else 0

    @property
    def redrafts_with(self) -> str:
        """The model that draws what is redrawn, by name; the engine's own where nothing is."""
        last = steps(exhaustion(self.exhaust))[-1]
        return last.model if isinstance(last, Redraft) else OWN

    @property
    def reads_with(self) -> tuple[str, ...]:
        """The models that read what was drafted, or redraw it, by name."""
        redraws = [step.model for step in steps(exhaustion(self.exhaust)) if isinstance(step, Redraft)]
        return (*redraws, OWN) if self.score.reads is not None else tuple(redraws)


class Policy(Protocol):
    """What the engine needs of a method."""

    def plan(self) -> Plan:
        """The method in the loop's terms."""


def plan_of(policy: Any) -> Plan:
    """The plan of any object with `plan()`, its numbers checked and Python's own; RequestError names what is wrong.

    A round trusts a plan: what a policy of somebody else's gets wrong is found before it is queued.
    """
    if isinstance(policy, type):
        raise RequestError(f"policy is the class {policy.__name__}: give an object such as "
                           "stars.STARS(reward_threshold=1.0)")
    name = type(policy).__name__
    try:
        method = getattr(policy, "plan", None)
        plan = method() if callable(method) else None
    except Exception as error:
        raise RequestError(f"{name}.plan() raised {describe(error)}: mend the policy") from error
    if not callable(method):
        raise RequestError(f"policy is {name}, it must be an object such as stars.STARS(reward_threshold=1.0)")
    if not isinstance(plan, Plan):
        raise RequestError(f"{name}.plan() returned {shown(plan)}, it must return a stars.plan.Plan")
    try:
        return _checked(plan, f"{name}.plan()")
    except RequestError:
        raise
    except Exception as error:  # an attribute of somebody else's that cannot be read
        raise RequestError(f"{name}.plan() returned a plan that raised {describe(error)}: mend the policy") from error


def _checked(plan: Plan, where: str) -> Plan:
    """Each choice by itself, then how they go together."""
    propose = _checked_proposal(f"{where}.propose", plan.propose)
    lanes, score = _one_of(f"{where}.lanes", plan.lanes, Lanes), _one_of(f"{where}.score", plan.score, Score)
    segment = plan.segment
    if isinstance(segment, Fixed):
        segment = Fixed(integer(f"{where}.segment.size", segment.size, 1, MAX_SIZE))
    elif isinstance(segment, Whole):
        segment = Whole(integer(f"{where}.segment.piece", segment.piece, 1, MAX_SIZE))
    elif isinstance(segment, Entropy):
        least = integer(f"{where}.segment.least", segment.least, 1, MAX_SIZE)
        segment = Entropy(real(f"{where}.segment.cut", segment.cut, "nats, 0 or above", lambda value: value >= 0.0),
                          least, integer(f"{where}.segment.most", segment.most, least, MAX_SIZE))
    else:
        raise RequestError(f"{where}.segment is {shown(segment)}, it must be a stars.plan.Fixed, Entropy or Whole")
    lanes = Lanes(None if lanes.width is None else integer(f"{where}.lanes.width", lanes.width, 1, MAX_SIZE),
                  _attempts(f"{where}.lanes.attempts", lanes.attempts),
                  integer(f"{where}.lanes.population", lanes.population, 1, MAX_SIZE),
                  flag(f"{where}.lanes.barrier", lanes.barrier))
    choice(f"{where}.score.when", score.when, ("segment", "end", "never"))
    score = Score(score.when, flag(f"{where}.score.prompt", score.prompt), _checked_reads(f"{where}.score.reads",
                                                                                          score.reads))
    exhaust = _checked_decide(f"{where}.exhaust", checked_exhaustion(f"{where}.exhaust", plan.exhaust))
    rule = _checked_rule(f"{where}.decide", plan.decide)
    checked = Plan(propose, segment, lanes, score, rule, exhaust)
    _check_together(checked, exhaust, where)
    return checked


def _checked_proposal(where: str, propose: Any) -> Propose:
    """What attempts are drawn from."""
    if isinstance(propose, Enumerate):
        return Enumerate(integer(f"{where}.k", propose.k, 1, MAX_RANKS))
    if isinstance(propose, Blend):
        weights = tuple((_named(f"{where}.weights", name), real(f"{where}.weights[{shown(name)}]", weight,
                                                                "a finite number", math.isfinite))
                        for name, weight in propose.weights)
        if not weights:
            raise RequestError(f"{where}.weights is empty, it must have a model's name and its weight")
        return Blend(weights)
    if isinstance(propose, Model):
        return Model(_named(f"{where}.name", propose.name))
    if isinstance(propose, Prompted):
        for name in ("draft", "judge"):
            text = getattr(propose, name)
            if not isinstance(text, str):
                raise RequestError(f"{where}.{name} is {shown(text)}, it must be a text")
        return Prompted(propose.draft, propose.judge, flag(f"{where}.alternate", propose.alternate))
    if not isinstance(propose, Sampled):
        names = ", ".join(kind.__name__ for kind in PROPOSES[:-1])
        raise RequestError(f"{where} is {shown(propose)}, it must be a stars.plan.{names} or {PROPOSES[-1].__name__}")
    return propose


def _checked_reads(where: str, reads: Any) -> Hidden | Ratio | None:
    """What else is read of an attempt."""
    if isinstance(reads, Hidden):
        return Hidden(_named(f"{where}.head", reads.head))
    if isinstance(reads, Ratio):
        return Ratio(flag(f"{where}.filtered", reads.filtered))
    if reads is not None:
        raise RequestError(f"{where} is {shown(reads)}, it must be a stars.plan.Hidden or Ratio, or None")
    return None


def _named(where: str, name: Any) -> str:
    """A model's or a head's name."""
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where} has {shown(name)}, it must be the name of a model or a head")
    return name


def _check_together(plan: Plan, exhaust: Exhaustion, where: str) -> None:
    propose, segment, lanes, score, rule, _ = plan
    most = max(lanes.by_segment)
    if score.prompt and score.when == "never":
        raise RequestError(f'{where} asks for the reward of the prompt and has score.when="never": score the responses '
                           "too, or set score.prompt to False")
    if plan.whole and (lanes.attempts != 1 or score.when == "segment"):
        raise RequestError(f"{where} has whole responses, each of which is one attempt, scored at its end at most: set "
                           'lanes.attempts to 1 and score.when to "end" or "never", and ask for a population')
    if isinstance(propose, Enumerate):
        if segment != Fixed(1):
            raise RequestError(f"{where} enumerates single tokens and has segments of {shown(segment)}: set segment to "
                               "Fixed(1)")
        if most > propose.k:
            raise RequestError(f"{where} has {most} attempts of {propose.k} tokens that are enumerated: set "
                               "lanes.attempts to at most that")
    if isinstance(propose, Prompted) != (score.reads == Ratio(filtered=True)):
        raise RequestError(f"{where} has a filtered Ratio and no Prompted proposal, or the reverse: they go together")
    if isinstance(propose, Prompted) and not isinstance(segment, Fixed):
        raise RequestError(f"{where} is Prompted and has segments of {shown(segment)}: set segment to Fixed(…)")
    if isinstance(rule, AcceptPrefix) and not (isinstance(propose, Prompted) and segment == Fixed(rule.most)):
        raise RequestError(f"{where} accepts prefixes of {shown(rule.most)} tokens: set segment to "
                           f"Fixed({shown(rule.most)}), and propose to Prompted(…)")
    hidden = isinstance(score.reads, Hidden)
    if hidden and not (isinstance(propose, Enumerate) and score.when != "segment"):
        raise RequestError(f"{where}.score.reads=Hidden gives tokens that are enumerated their rewards: set propose to "
                           'Enumerate(k), and score.when to "end" or "never"')
    if hidden and isinstance(rule, READS_REWARDS) and not isinstance(rule, FirstAbove):
        raise RequestError(f"{where} decides by rewards, of which score.reads=Hidden gives none to an attempt that is "
                           "alone: decide by FirstAbove, or by a rule of your own")
    in_time = hidden or score.when == ("end" if plan.whole else "segment")
    too_late = (f"by rewards and has score.when={score.when!r}, which gives none in time: score every segment "
                '("segment"), or whole responses at their end ("end")')
    if isinstance(rule, READS_REWARDS) and not in_time:
        raise RequestError(f"{where} decides {too_late}")
    if isinstance(rule, Threshold) and rule.alpha != 1.0 and not score.prompt:
        raise RequestError(f"{where} has a threshold that starts from the prompt's reward and does not ask for that: "
                           "set score.prompt to True, or alpha to 1")
    if isinstance(rule, Threshold) and not rule.tests_last and lanes.population > 1:
        raise RequestError(f"{where} has a threshold that does not test the last attempt, and a population of "
                           f"{lanes.population}: set lanes.population to 1, or tests_last to True")
    for step in steps(exhaust):
        if isinstance(step, Softmax) and not in_time:
            raise RequestError(f"{where}.exhaust draws {too_late}")
        if isinstance(step, BackUp) and (lanes.population > 1 or plan.whole):
            raise RequestError(f"{where}.exhaust takes segments back, which whole responses and a population have not: "
                               "use another exhaustion, or one hypothesis with segments")
        if isinstance(step, Redraft):
            _check_redraft(plan, step, where)
            most += step.attempts
    for step in steps(exhaust):
        times = step.times + 1 if isinstance(step, BackUp) else 1
        if isinstance(step, (BackUp, Redraft)) and most * times > MAX_ATTEMPTS:
            raise RequestError(f"{where} draws a segment of {most} attempts up to {times} times, "
                               f"and random numbers are enough for {MAX_ATTEMPTS}: lower one of the two")


def _check_redraft(plan: Plan, redraft: Redraft, where: str) -> None:
    propose, _, lanes, score, _, _ = plan
    if lanes.population > 1 or plan.whole:
        raise RequestError(f"{where}.exhaust redraws a segment of one hypothesis, which whole responses and a population "
                           "have not: use another exhaustion, or one hypothesis with segments")
    if isinstance(propose, (Enumerate, Prompted)):
        raise RequestError(f"{where}.exhaust redraws what was {type(propose).__name__}, which is no draw from the "
                           "prompt: use Sampled, Blend or Model, or another exhaustion")
    if isinstance(redraft.decide, READS_REWARDS) and score.when != "segment":
        raise RequestError(f"{where}.exhaust.decide decides by rewards and has score.when={score.when!r}, which gives "
                           'none in time: score every segment ("segment")')
    if isinstance(redraft.decide, Threshold) and redraft.decide.alpha != 1.0 and not score.prompt:
        raise RequestError(f"{where}.exhaust.decide has a threshold that starts from the prompt's reward, which is not "
                           "asked for: set score.prompt to True, or alpha to 1")


def checked_exhaustion(where: str, given: Any) -> Exhaustion:
    """`stars.exhaustions.exhaustion(given)`; RequestError names `where` it was given."""
    try:
        return exhaustion(given)
    except ValueError as error:
        raise RequestError(f"{where} is {shown(given)}, {error}") from None


def _checked_decide(where: str, exhaust: Exhaustion) -> Exhaustion:
    """`exhaust`, the rule of a Redraft in it checked."""
    if isinstance(exhaust, (Relax, BackUp)):
        return replace(exhaust, then=_checked_decide(f"{where}.then", exhaust.then))
    if isinstance(exhaust, Redraft) and exhaust.decide is not None:
        return replace(exhaust, decide=_checked_rule(f"{where}.decide", exhaust.decide))
    return exhaust


def _attempts(where: str, value: Any) -> int | tuple[int, ...]:
    """A number of attempts, or those of several segments."""
    if not isinstance(value, tuple):
        return integer(where, value, 1, MAX_ATTEMPTS)
    if not value:
        raise RequestError(f"{where} is empty, it must have the attempts of one segment at least")
    return tuple(integer(f"{where}[{index}]", count, 1, MAX_ATTEMPTS) for index, count in enumerate(value))


def _checked_rule(where: str, rule: Any) -> Rule:
    """`rule` if it is one, Threshold with numbers of Python's own."""
    if isinstance(rule, type) or not callable(rule) or not hasattr(rule, "in_order") or not hasattr(rule, "uniforms"):
        raise RequestError(f"{where} is {shown(rule)}, it must be a rule: an object to be called with (judged, state) "
                           "that has the attributes in_order and uniforms, such as stars.rules.Argmax()")
    flag(f"{where}.in_order", rule.in_order)
    integer(f"{where}.uniforms", rule.uniforms, 0, MAX_UNIFORMS)
    integer(f"{where}.group_uniforms", getattr(rule, "group_uniforms", 0), 0, MAX_UNIFORMS)
    if not isinstance(rule, Threshold):
        checked: Rule = rule
        return checked
    return replace(
        rule, alpha=real(f"{where}.alpha", rule.alpha, "between 0 and 1", lambda value: 0.0 <= value <= 1.0),
        beta=real(f"{where}.beta", rule.beta, "finite, 0 or above", lambda value: 0.0 <= value < math.inf),
        reward_threshold=real(f"{where}.reward_threshold", rule.reward_threshold, "a number",
                              lambda value: not math.isnan(value)),
        tests_last=flag(f"{where}.tests_last", rule.tests_last))


def rule_name(rule: Rule) -> str:
    """A rule as an error names it."""
    name = getattr(rule, "__name__", None)
    return name if isinstance(name, str) else type(rule).__name__


Choice = TypeVar("Choice")


def _one_of(where: str, value: Any, kind: type[Choice]) -> Choice:
    if isinstance(value, kind):
        return value
    raise RequestError(f"{where} is {shown(value)}, it must be a stars.plan.{kind.__name__}")
