"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here, perhaps with a rule of its own, and a test of its law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from stars.arguments import choice, flag, integer, known_by_name, real, shown
from stars.calibration import threshold_and_beta
from stars.errors import RequestError
from stars.exhaustions import MAX_REDRAWN, First, Redraft
from stars.plan import (
    DRAFT_SIZE,
    MAX_ATTEMPTS,
    MAX_RANKS,
    MAX_SIZE,
    MAX_UNIFORMS,
    OWN,
    Blend,
    Entropy,
    Enumerate,
    Fixed,
    Hidden,
    Lanes,
    Model,
    Plan,
    Policy,
    Prompted,
    Ratio,
    Sampled,
    Score,
    Whole,
    checked_exhaustion,
)
from stars.rules import (
    AcceptPrefix,
    Always,
    Argmax,
    DropWorst,
    FirstAbove,
    FirstAccepted,
    GuidedDraft,
    Highest,
    Resample,
    RewardGuided,
    SoftArgmax,
    Threshold,
)

LEAST_TEMPERATURE = 1e-6
"""Of a softmax of scores: below it is an argmax but for ties, which is to be asked for as such."""
GUIDE_WEIGHT = 0.3
"""Of a guide without a reference, as in TITA's released code: the language model has the rest."""


@known_by_name({})
@dataclass(frozen=True)
class STARS:
    """Segment-level rejection sampling under a rising threshold (arXiv 2511.03827; parameter names are the paper's).

    A segment of `segment_size` tokens is accepted iff log u < (r - tau(n)) / beta with u ~ U(0, 1). Here
    tau(n) = min(t, r0 + n / N * (t - r0)) and r0 = (1 - alpha) * r(prompt) + alpha * t, with t = reward_threshold,
    n = response tokens including the candidate, N = max_tokens. After `max_attempts` rejections `exhaust` says what is
    done, by a name or an object of `stars.exhaustions`: unless told otherwise, the best reward seen wins. `beta = 0` is
    the hard rule r >= tau. `width` candidates are drawn at once and the first accepted in attempt order wins, so the
    width changes the speed and never the law; None lets the engine choose it.

    `barrier=True` is the synchronous batch protocol of the paper's second version: each response draws one candidate a
    round, and one whose segment is decided waits until those of all others that decode so are. The law, and each text,
    is that of `width=1`; it is there for comparison, as the engine's own batches need no such wait.

    `reward_threshold` belongs to the reward model at hand (`Engine.calibrate` measures it): there is no default. beta
    is in the reward's own units, too: "auto" takes the one that the calibration suggests, a tenth of the spread of the
    rewards of one prompt's samples.

    Exact: without the cap a segment has the law p(s) * min(1, exp((r - tau) / beta)), normalised, at any width. The cap
    is an approximation, and segments one after the other do not sample p(y) * exp(r(y) / beta) of whole responses, for
    want of a normaliser of each prefix. The form of tau is read from CARDS' code, whose parameters the paper takes
    over; its own code could not be read.
    """

    segment_size: int = 16
    max_attempts: int = 20
    alpha: float = 0.5
    beta: float | Literal["auto"] = 0.7
    reward_threshold: float | None = None
    width: int | None = None
    exhaust: Any = "best_seen"
    barrier: bool = False

    def __post_init__(self) -> None:
        _keep(self, segment_size=_size(self, "segment_size"), max_attempts=_size(self, "max_attempts", MAX_ATTEMPTS),
              width=None if self.width is None else _size(self, "width"), barrier=flag("STARS.barrier", self.barrier))
        _keep_threshold(self)
        if self.barrier and self.width not in (None, 1):
            raise RequestError(f"STARS.width is {self.width} and barrier=True draws one candidate a round: leave the "
                               "width out")

    def plan(self) -> Plan:
        """Soft or hard threshold, capped."""
        score, rule = _rising(self)
        lanes = Lanes(1 if self.barrier else self.width, self.max_attempts, barrier=self.barrier)
        return Plan(Sampled(), Fixed(self.segment_size), lanes, score, rule, self.exhaust)


@known_by_name({})
@dataclass(frozen=True)
class CARDS:
    """Cascade reward sampling (arXiv 2406.16306; parameter names are its code's, as far as that has names).

    A segment ends before the token whose predictive distribution is uncertain: at least `min_segment` tokens are drawn,
    then H >= `entropy_threshold` ends it, and `max_segment` tokens do. H is the entropy in nats of softmax(logits) over
    the whole vocabulary: at temperature 1 and before top-k, whatever the tokens are drawn with. With `option="soft"` it
    is accepted iff log u < (r - tau(n)) / beta, u ~ U(0, 1), with "hard" iff r >= tau(n), whatever beta. tau and r0 are
    those of STARS: tau(n) = min(t, r0 + n / N * (t - r0)), r0 = (1 - alpha) * r(prompt) + alpha * t, t =
    reward_threshold, n = response tokens including the candidate, N = max_tokens.

    Of `max_attempts` candidates the last one is not tested, as in the published loop, whose limit of 20 regenerations
    makes 21: the best reward of all of them, the earliest of equals, is then taken, or what else `exhaust` says.

    Where this differs from the published code: EOS ends a segment and the response; the last segment is clipped at
    max_tokens, where theirs runs over; the temperature and filters of the draw are those of the SamplingParams, where
    theirs has the temperature equal to beta and top_k 40 (`SamplingParams(temperature=0.7, top_k=40)` is its default);
    log u is compared, where exp(...) may overflow; penalties, which it has not, count for H. Several candidates may be
    drawn at once (`width`), which changes the speed and never the law. A relaxed threshold tests the last one too.

    Exact and approximate are what they are for STARS: a segment, without the cap, and not the whole response.

    `reward_threshold` belongs to the reward model at hand (`Engine.calibrate` measures it): there is no default.
    """

    entropy_threshold: float = 3.0
    min_segment: int = 4
    max_segment: int = 64
    max_attempts: int = 21
    alpha: float = 0.5
    beta: float | Literal["auto"] = 0.7
    reward_threshold: float | None = None
    option: str = "soft"
    width: int | None = None
    exhaust: Any = "best_seen"

    def __post_init__(self) -> None:
        _keep(self, max_segment=_size(self, "max_segment"), max_attempts=_size(self, "max_attempts", MAX_ATTEMPTS),
              width=None if self.width is None else _size(self, "width"),
              entropy_threshold=real("CARDS.entropy_threshold", self.entropy_threshold, "nats, 0 or above",
                                     lambda value: value >= 0.0))
        _keep(self, min_segment=_size(self, "min_segment", self.max_segment),
              option=_choice(self, "option", ("soft", "hard")))
        _keep_threshold(self)

    def plan(self) -> Plan:
        """Segments cut by entropy, soft or hard threshold, capped; the last attempt is not tested."""
        score, rule = _rising(self)
        if self.option == "hard":
            rule = replace(rule, beta=0.0)
        return Plan(Sampled(), Entropy(self.entropy_threshold, self.min_segment, self.max_segment),
                    Lanes(self.width, self.max_attempts), score, replace(rule, tests_last=False), self.exhaust)


@known_by_name({})
@dataclass(frozen=True)
class Sample:
    """Plain sampling from the language model, exactly as the sampling parameters say; `score=True` adds one reward of
    the finished response.

    What is drawn at once is a segment, of 16 tokens. Where requests come while others decode and wide rounds are long,
    as on a CPU, it is fewer, so that who comes waits less: no token is another one for that.
    """

    score: bool = False

    def __post_init__(self) -> None:
        _keep(self, score=flag("Sample.score", self.score))

    def plan(self) -> Plan:
        """Every draft is kept."""
        return Plan(Sampled(), Fixed(DRAFT_SIZE), Lanes(1), Score("end" if self.score else "never"), Always())


@known_by_name({})
@dataclass(frozen=True)
class RejectionSampling:
    """Rejection sampling of whole responses under a constant threshold, as the paper of CARDS compares with
    (arXiv 2406.16306; parameter names are those of STARS).

    A response is accepted iff log u < (r - reward_threshold) / beta with u ~ U(0, 1); `beta = 0` is the hard rule
    r >= reward_threshold. The first accepted in the order of attempts wins, and after `max_attempts` rejections what
    `exhaust` says (the code of CARDS draws one more, which it does not test). Without the cap a response has the law
    p(y) * min(1, exp((r(y) - reward_threshold) / beta)), normalised, exactly. Where no response exceeds the threshold
    that is the sequence-level target p(y) * exp(r(y) / beta); the cap is an approximation, and a threshold that is
    exceeded flattens the top.

    At most `width` responses are under way beyond what is decided; None lets the engine choose. The width changes the
    speed and never the law.
    """

    reward_threshold: float | None = None
    beta: float | Literal["auto"] = 0.7
    max_attempts: int = 20
    width: int | None = None
    exhaust: Any = "best_seen"

    def __post_init__(self) -> None:
        threshold, beta = threshold_and_beta("RejectionSampling", self.reward_threshold, self.beta)
        _keep(self, max_attempts=_size(self, "max_attempts"), reward_threshold=threshold, beta=beta,
              exhaust=_exhaust(self), width=None if self.width is None else _size(self, "width"))

    def plan(self) -> Plan:
        """Each attempt is one of a population of whole responses, which are drawn as the rule wants them."""
        assert self.reward_threshold is not None and not isinstance(self.beta, str)
        return Plan(Sampled(), Whole(DRAFT_SIZE), Lanes(self.width, population=self.max_attempts), Score("end"),
                    FirstAccepted(float(self.beta), float(self.reward_threshold)), self.exhaust)


@known_by_name({})
@dataclass(frozen=True)
class BestOfN:
    """Draws `n` whole responses and returns the one of the highest reward (arXiv 2009.01325, 2112.09332).

    With `temperature` above 0 it is soft best-of-N (arXiv 2505.03156, whose lambda it is): response i is returned with
    probability softmax(r_i / temperature). Its law tends to p(y) * exp(r(y) / temperature), normalised, as n grows; at
    any n it is what is said here, exactly.
    """

    n: int = 8
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, n=_size(self, "n"), temperature=real(
            "BestOfN.temperature", self.temperature, "a finite number, 0 (the best) or above",
            lambda value: 0.0 <= value < math.inf))

    def plan(self) -> Plan:
        """Plain sampling of n whole responses, argmax or softmax of their rewards. The best of one is a scored sample.
        """
        if self.n == 1:
            return Sample(score=True).plan()
        rule = SoftArgmax(float(self.temperature)) if self.temperature else Argmax()
        return Plan(Sampled(), Whole(DRAFT_SIZE), Lanes(1, population=self.n), Score("end"), rule)


@known_by_name({})
@dataclass(frozen=True)
class BlockwiseBestOfK:
    """Draws `k` candidates of every segment and keeps the one of the highest reward (blockwise best-of-K of controlled
    decoding, arXiv 2310.17022).

    `k` may be a sequence: that many candidates of the first, second, … segment, and its last number from then on. A
    falling one is AdaSearch (arXiv 2510.23334): at a fixed budget of candidates most are drawn where a response begins.
    How they fall is for the caller to say, such as k=(16, 8, 4, 2). The papers call the numbers K and n_k.

    Exact: the reward of a kept segment has the distribution function F(x)^k, with F that of one draw. With regard to
    p(y) * exp(r(y) / beta) it is a search.
    """

    k: int | Sequence[int] = 8
    segment_size: int = 16

    def __post_init__(self) -> None:
        k = self.k
        if isinstance(k, Sequence) and not isinstance(k, (str, bytes)):
            if not k:
                raise RequestError("BlockwiseBestOfK.k is empty, it must have the candidates of one segment at least")
            counts: Any = tuple(integer(f"BlockwiseBestOfK.k[{index}]", count, 1, MAX_ATTEMPTS)
                                for index, count in enumerate(k))
        else:
            counts = _size(self, "k", MAX_ATTEMPTS)
        _keep(self, k=counts, segment_size=_size(self, "segment_size"))

    def plan(self) -> Plan:
        """All k attempts in one round if there is room, argmax of their rewards."""
        k = self.k if isinstance(self.k, int) else tuple(self.k)
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(k if isinstance(k, int) else max(k), k),
                    Score("segment"), Argmax())


@known_by_name({})
@dataclass(frozen=True)
class SpeculativeRejection:
    """Best-of-N whose worst are given up on the way (arXiv 2410.20290; parameter names are its code's).

    `n` responses are drawn side by side. After each segment the m that are live, finished ones included, are ranked by
    reward, and the best max(1, round((1 - alpha) * m)) stay. In the end the highest reward wins.

    The paper draws until its GPU's memory is full and ranks then, so that the rounds depend on the machine; here a
    round is `segment_size` tokens, so that the law does not. What is said here is sampled exactly; of best-of-n it is
    an approximation, as good as rewards of prefixes are.
    """

    n: int = 8
    alpha: float = 0.5
    segment_size: int = 16

    def __post_init__(self) -> None:
        _keep(self, n=_size(self, "n"), segment_size=_size(self, "segment_size"),
              alpha=real("SpeculativeRejection.alpha", self.alpha, "at least 0 and below 1",
                         lambda value: 0.0 <= value < 1.0))

    def plan(self) -> Plan:
        """A population of n, one attempt each at every segment."""
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(1, population=self.n), Score("segment"),
                    DropWorst(float(self.alpha)))


@known_by_name({})
@dataclass(frozen=True)
class SegmentBeam:
    """Beam search over segments by reward, as chunk-level beam search (arXiv 2405.19262) and the beam search of
    process reward models (arXiv 2408.03314) do it.

    `beams` hypotheses draw `candidates` segments each. Of all of them, and of the responses that had finished, the best
    `beams` by reward go on: a hypothesis may go on several times, or not at all. In the end the highest reward wins. A
    search: it samples from no distribution that could be named.
    """

    beams: int = 4
    candidates: int = 4
    segment_size: int = 16

    def __post_init__(self) -> None:
        _keep(self, beams=_size(self, "beams"), candidates=_size(self, "candidates", MAX_ATTEMPTS),
              segment_size=_size(self, "segment_size"))

    def plan(self) -> Plan:
        """A population of `beams`, which begin with the same prompt and draw by themselves from the start."""
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(self.candidates, self.candidates, self.beams),
                    Score("segment"), Highest(self.beams))


@known_by_name({})
@dataclass(frozen=True)
class ParticleFilter:
    """Sequential Monte Carlo (particle filtering, arXiv 2502.01618, 2306.03081) for p(y) * exp(r(y) / beta).

    After each segment `particles` responses are resampled from the live ones in proportion to exp((r - r_parent) /
    beta), with r the reward of a response so far and r_parent that before the segment (the prompt's own cancels); one
    that had finished weighs 1. resampling: "multinomial", each by itself, or "systematic", evenly spaced with one
    random number. final: "best", the highest reward of all particles, or "sample", one of them at random.

    Exact: with final="sample" the completion has the law p(y) * exp(r(y) / beta), normalised over whole responses, in
    the limit of many particles; with few it is biased towards p. With final="best" it is a search, which samples from
    no such law. One particle is a plain sample. The code of the first paper weighs by exp(logit of a process reward) of
    the whole prefix, without r_parent; what is said here is the weight that makes the limit right.
    """

    particles: int = 8
    beta: float = 0.7
    segment_size: int = 16
    resampling: str = "multinomial"
    final: str = "best"

    def __post_init__(self) -> None:
        _keep(self, particles=_size(self, "particles", MAX_UNIFORMS), segment_size=_size(self, "segment_size"),
              beta=real("ParticleFilter.beta", self.beta, "a finite number above 0",
                        lambda value: 0.0 < value < math.inf),
              resampling=_choice(self, "resampling", ("multinomial", "systematic")),
              final=_choice(self, "final", ("best", "sample")))

    def plan(self) -> Plan:
        """A population of particles, one attempt each at every segment."""
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(1, population=self.particles), Score("segment"),
                    Resample(self.particles, float(self.beta), self.resampling == "systematic", self.final == "sample"))


@known_by_name({})
@dataclass(frozen=True)
class ARGS:
    """Alignment as Reward-Guided Search, token by token (Khanov, Burapacheep, Li, ICLR 2024; arXiv 2402.01694).

    The `topk` most probable next tokens are enumerated, and each is scored by logit + weight * r, r the reward of the
    response with that token. "greedy" takes the highest score, the more probable token of equals; "stochastic" draws
    from softmax(score / temperature). Both are exact. Names and defaults are those of the authors' page and code, which
    calls the second method "topk".

    What differs from their code. EOS is a candidate like any other, ends the response where it is chosen, and the
    reward reads the response without it (their code reads it as a token, and goes on after it). The reward need not
    share the language model's tokenizer. `temperature` of SamplingParams does not enter the scores: it shapes what
    top_p and min_p keep. Of what these and its top_k keep the `topk` are enumerated, so a smaller top_k leaves fewer;
    penalties count in the logits. The random numbers are the engine's own.
    """

    topk: int = 10
    weight: float = 1.0
    method: Literal["greedy", "stochastic"] = "greedy"
    temperature: float = 0.7

    def __post_init__(self) -> None:
        _keep(self, topk=_size(self, "topk", MAX_RANKS), weight=_finite(self, "weight"),
              method=_choice(self, "method", ("greedy", "stochastic")),
              temperature=_temperature(self, "temperature"))

    def plan(self) -> Plan:
        """All of the topk attempts in one round if there is room, the highest score or a draw by it."""
        return _guided(self.topk, RewardGuided(self.weight, self.temperature if self.method == "stochastic" else 0.0))


@known_by_name({})
@dataclass(frozen=True)
class RAD:
    """Reward-Augmented Decoding, token by token (Deng and Raffel, EMNLP 2023; arXiv 2310.09520).

    Of the `topk` most probable next tokens one is drawn from softmax((logit + beta * r) / temperature), r the reward of
    the response with that token, clamped to 0 .. 1; `inverse` steers by 1 - r instead. That is exact. Names and
    defaults are those of the authors' code, method "linear", at transformers' temperature of 1.

    What differs from their code. Their reward model was trained to give 0 to 1 at every prefix: for rewards of another
    range, such as a raw logit, set `clamp=False` and a smaller beta. Any reward serves, and one that reads prefixes
    incrementally, as theirs does (`CausalReward`), reads a token of each candidate. Theirs is given candidate tokens
    that were encoded anew one by one, ours the response. Of EOS, of SamplingParams and of random numbers the same holds
    as for ARGS.
    """

    topk: int = 20
    beta: float = 30.0
    inverse: bool = False
    clamp: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _keep(self, topk=_size(self, "topk", MAX_RANKS), beta=_finite(self, "beta"),
              inverse=flag("RAD.inverse", self.inverse), clamp=flag("RAD.clamp", self.clamp),
              temperature=_temperature(self, "temperature"))

    def plan(self) -> Plan:
        """All of the topk attempts in one round if there is room, a draw by their scores."""
        # beta * (1 - r) is -beta * r but for a constant.
        weight = -self.beta if self.inverse else self.beta
        least, most = (0.0, 1.0) if self.clamp else (-math.inf, math.inf)
        return _guided(self.topk, RewardGuided(weight, self.temperature, least, most))


@known_by_name({})
@dataclass(frozen=True)
class MARA:
    """MARA: a small head on the language model's hidden state accepts or rejects the next token's candidates in the
    order of their probability (IJCAI 2025, arXiv 2505.19743).

    The candidates are the tokens that the filters of SamplingParams keep, the most probable first, `topk` of them at
    most: `SamplingParams(temperature=0.8, top_k=40, top_p=0.95)` are the published evaluation's. The language model is
    run on each, and `head`, a name of Engine(heads=…), says P(accept) from its hidden state there, behind the final
    norm. The first with P(accept) > 0.5 is taken, and where there is none the first of all. A candidate that is alone
    is taken without being asked about. `Attempt.reward` is P(accept); no reward model is read,
    but with `score=True` once, when the response has ended.

    Exact, and nothing is drawn: a text is a function of the prompt, greedy over the candidates in their order; the
    temperature shapes what top_p and min_p keep, and the seed makes no difference. The candidates are run as lanes of
    one pass, or, with a `width`, so many at a time up to the first that is accepted: the text is the same.

    What differs from the published code. It runs candidates one by one. Of its strategies this is the default; the
    others are the same in the reverse order, a random one of the accepted, and the one of the highest P(accept) if that
    is over 0.5. EOS is a candidate like any other, and run like one. A head is a safetensors file of the actor's own
    names, which `stars convert-head` makes of its pickle; benchmarks/train_agent.py fits one.
    """

    head: str = "agent"
    topk: int = 40
    width: int | None = None
    score: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.head, str) or not self.head:
            raise RequestError(f"MARA.head is {shown(self.head)}, it must be the name of a head of Engine(heads=…)")
        _keep(self, topk=_size(self, "topk", MAX_RANKS), score=flag("MARA.score", self.score),
              width=None if self.width is None else _size(self, "width"))

    def plan(self) -> Plan:
        """Tokens that are enumerated, read by the head in order."""
        width = self.topk if self.width is None else self.width
        return Plan(Enumerate(self.topk), Fixed(1), Lanes(width, self.topk),
                    Score("end" if self.score else "never", reads=Hidden(self.head)), FirstAbove(), First())


@known_by_name({})
@dataclass(frozen=True)
class PersonaJudge:
    """Persona-Judge: one language model under two preference prompts, of which one drafts and the other judges
    (Findings of ACL 2025, arXiv 2504.12663).

    `gamma` tokens are drawn from q, the model after the preference `draft` and the prompt; p is the same model after
    the preference `judge` and the prompt. Token i is accepted with probability min(1, p_i / q_i), in order. In place of
    the first rejected one a token is drawn from max(p - q, 0), normalised, and after gamma accepted ones one from p.
    `alternate` exchanges the two preferences after every round: the paper's method. Without it this is the paper's
    "base judge". `score=True` adds one reward of the finished response.

    p and q are what the sampling parameters draw from, temperature and filters included, each normalised over what it
    keeps; at temperature 0 both are the most probable token. What is sampled, exactly: each token x of a round has the
    law min(p, q)(x) + max(p - q, 0)(x) = p(x) of that round's judge, given those before it. So fixed roles are plain
    sampling after `judge`, and `draft` changes the speed alone. With `alternate` a round's tokens are its judge's, and
    where a round ends depends on both: a text follows neither preference alone, nor a mixture that could be named.

    Before messages a preference is a user's turn of its own, rendered with a generation prompt, and the messages follow
    as they are rendered by themselves. Before a text it is put as it stands, so end it as it should be divided from the
    prompt; before token ids its own are put. An empty one is the prompt alone. Outputs have the prompt as it was given.

    What differs from the published code. There the residual is max(p - q, 0) only where the sum of p - q comes out
    positive, else max(q - p, 0); that sum is 0, so that rounding decides, and the law is p no more. Here it is the
    right one, and there is no other. Random numbers are those of a response and a round, where the code sets one seed
    before every comparison. The response ends with EOS, and never exceeds max_tokens.
    """

    draft: str = "Be as helpful as you can. "
    judge: str = "Be as harmless as you can. "
    gamma: int = 4
    alternate: bool = True
    score: bool = False

    def __post_init__(self) -> None:
        for name in ("draft", "judge"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise RequestError(f"PersonaJudge.{name} is {shown(text)}, it must be the text of a preference")
        _keep(self, gamma=_size(self, "gamma", MAX_UNIFORMS), alternate=flag("PersonaJudge.alternate", self.alternate),
              score=flag("PersonaJudge.score", self.score))

    def plan(self) -> Plan:
        """One attempt a round, whose tokens are accepted in order."""
        return Plan(Prompted(self.draft, self.judge, self.alternate), Fixed(self.gamma), Lanes(1),
                    Score("end" if self.score else "never", reads=Ratio(filtered=True)), AcceptPrefix(self.gamma))


@known_by_name({})
@dataclass(frozen=True)
class TokenGuidance:
    """Token-level guidance by a second model: TITA (arXiv 2510.21794), GenARM (arXiv 2410.08193), proxy tuning and DPO
    at decoding.

    `guide` and `reference` are names of Engine(models=…), "lm" the engine's own model. With a reference every token is
    drawn from softmax(log p + weight * (log p_guide - log p_reference)), weight 1 unless given: TITA's paper, and a DPO
    model's ratio to its reference as a reward of each token. Without one it is softmax((1 - weight) * log p + weight *
    log p_guide), weight 0.3 unless given, as TITA's released code has it. `lm_weight` replaces the language model's own
    weight, 1 or 1 - weight: with 1 and no reference it is GenARM's p * p_guide ** weight. Where `reference` is "lm",
    two models are run and not three; a model whose weights add up to 0 is not run.

    Temperature, top_k, top_p, min_p and penalties of SamplingParams apply to the blend; at temperature 0 its most
    probable token is taken. repetition_penalty, which asks for the sign of a logit, sees the weighted sum of the
    models' logits. Log-probabilities that are reported are those of the blend. `score=True` adds one reward of the
    finished response.

    Exact: every token has the law above, in float32, and no cap or search enters. A token that one of the models whose
    weight is not 0 forbids (its logit is -inf) is not drawn.

    What differs. TITA's released code takes the most probable token: that is temperature 0.
    """

    guide: str = "guide"
    reference: str | None = None
    weight: float | None = None
    lm_weight: float | None = None
    score: bool = False

    def __post_init__(self) -> None:
        _keep(self, guide=_model(self, "guide"),
              reference=None if self.reference is None else _model(self, "reference"),
              weight=None if self.weight is None else _finite(self, "weight"),
              lm_weight=None if self.lm_weight is None else _finite(self, "lm_weight"),
              score=flag("TokenGuidance.score", self.score))
        if self.guide == self.reference:
            raise RequestError(f"TokenGuidance.reference is {shown(self.reference)}, the guide itself, and their ratio "
                               "is 1: name the model that the guide was made from, or leave the reference out")

    def plan(self) -> Plan:
        """Plain sampling from the blend."""
        if self.reference is None:
            weight = GUIDE_WEIGHT if self.weight is None else self.weight
            weights = [(OWN, 1.0 - weight), (self.guide, weight)]
        else:
            weight = 1.0 if self.weight is None else self.weight
            weights = [(OWN, 1.0), (self.guide, weight), (self.reference, -weight)]
        if self.lm_weight is not None:
            weights[0] = OWN, self.lm_weight
        return Sample(self.score).plan()._replace(propose=Blend(tuple(weights)))


@known_by_name({})
@dataclass(frozen=True)
class RewardGuidedSpeculation:
    """Reward-guided speculative decoding: a small model drafts a segment, and the language model redraws it where the
    reward does not accept it (RSD, arXiv 2501.19324; GSI, arXiv 2506.04118).

    `small` names the model of Engine(models=…) that drafts; the engine's own redraws. While drafts are kept, that one
    runs nothing but the prompt ("rsd"), and reads what was kept, in one pass, where it redraws.

    variant "rsd": one draft s is kept if r(s) >= `reward_threshold` (t), with beta = 0, else with probability
    min(1, exp((r(s) - t) / beta)), which is a(s); what is redrawn is kept unscored. Exact: with P_S and P_L the laws of
    a segment under the small and the large model, as the SamplingParams draw, a segment is s with probability

        P_S(s) a(s) + (1 - sum over s' of P_S(s') a(s')) P_L(s).

    variant "gsi": `n` drafts s_i; i is drawn with probability softmax(beta * v), v_i = r(s_i) + (1 / beta) *
    log(P_L(s_i) / P_S(s_i)), and kept if v_i >= t. Otherwise the large model draws n segments, and one of them is kept
    with probability softmax(beta * r). Exact, as the method is defined; softmax over all segments of log P_L + beta * r
    is only its limit of many drafts and t = -inf. Here beta is the paper's, which multiplies rewards; the ratios are at
    temperature 1 and without filters, as those of its code are, and so the tilt is that of the draw where the
    SamplingParams have neither; penalties are refused.

    What differs from their code. Segments are of `segment_size` tokens, not steps up to an empty line; the reward is
    asked of the response so far. RSD's code has a threshold of 0.7, for a process reward between 0 and 1: here there is
    no default, `Engine.calibrate` measures one. GSI's code compares beta * v with its threshold, and ends a response
    whose rewards are all below 0.1. A segment that was redrawn counts as a fallback (`Segment.redrawn`,
    `Segment.model`), and the accept rate is that of drafts. The last segment's reward is asked in any case.
    """

    small: str = "small"
    reward_threshold: float | None = None
    beta: float | Literal["auto"] = 0.0
    segment_size: int = 16
    variant: Literal["rsd", "gsi"] = "rsd"
    n: int = 4

    def __post_init__(self) -> None:
        threshold, beta = threshold_and_beta("RewardGuidedSpeculation", self.reward_threshold, self.beta)
        _keep(self, segment_size=_size(self, "segment_size"), variant=_choice(self, "variant", ("rsd", "gsi")),
              n=_size(self, "n", MAX_REDRAWN), reward_threshold=threshold, beta=beta)
        if self.variant == "gsi" and (isinstance(self.beta, str)
                                      or not LEAST_TEMPERATURE <= beta <= 1.0 / LEAST_TEMPERATURE):
            raise RequestError(f"RewardGuidedSpeculation.beta is {shown(self.beta)} and variant=\"gsi\" multiplies "
                               f"rewards by it: give a number from {LEAST_TEMPERATURE:g} to {1 / LEAST_TEMPERATURE:g}, "
                               "such as 1 over the beta that STARS would have")

    def plan(self) -> Plan:
        """A draft of the small model under a constant threshold, or several of which one is drawn; then a redraft."""
        assert self.reward_threshold is not None and not isinstance(self.beta, str)
        if self.variant == "rsd":
            return Plan(Model(self.small), Fixed(self.segment_size), Lanes(1, 1), Score("segment"),
                        Threshold(1.0, self.beta, self.reward_threshold), Redraft(OWN))
        return Plan(Model(self.small), Fixed(self.segment_size), Lanes(self.n, self.n),
                    Score("segment", reads=Ratio()), GuidedDraft(self.beta, self.reward_threshold),
                    Redraft(OWN, self.n, SoftArgmax(1.0 / self.beta)))


POLICIES: dict[str, type[Policy]] = {
    "stars": STARS,
    "cards": CARDS,
    "sample": Sample,
    "best-of-n": BestOfN,
    "blockwise": BlockwiseBestOfK,
    "rejection-sampling": RejectionSampling,
    "speculative-rejection": SpeculativeRejection,
    "segment-beam": SegmentBeam,
    "particle-filter": ParticleFilter,
    "args": ARGS,
    "rad": RAD,
    "mara": MARA,
    "persona-judge": PersonaJudge,
    "token-guidance": TokenGuidance,
    "rsd": RewardGuidedSpeculation,
}
"""Every policy of the package by the name that the command line knows it by."""


def parameters_of(policy: str) -> list[str]:
    """The parameters that a policy of POLICIES has."""
    return [field.name for field in fields(cast(Any, POLICIES[policy]))]


def _keep_threshold(policy: STARS | CARDS) -> None:
    """Checks the numbers of a rising threshold, and what is done where it accepts nothing."""
    name = type(policy).__name__
    threshold, beta = threshold_and_beta(name, policy.reward_threshold, policy.beta)
    _keep(policy, reward_threshold=threshold, beta=beta, exhaust=_exhaust(policy),
          alpha=real(f"{name}.alpha", policy.alpha, "a number between 0 and 1", lambda value: 0.0 <= value <= 1.0))


def _rising(policy: STARS | CARDS) -> tuple[Score, Threshold]:
    """What is scored for a rising threshold, and the rule."""
    assert policy.reward_threshold is not None and not isinstance(policy.beta, str)
    # An infinite threshold swallows r(prompt) in the formula of r0: alpha = 1 says the same without computing it.
    alpha = policy.alpha if math.isfinite(policy.reward_threshold) else 1.0
    return (Score("segment", prompt=alpha != 1.0),
            Threshold(float(alpha), float(policy.beta), float(policy.reward_threshold)))


def _guided(topk: int, rule: RewardGuided) -> Plan:
    return Plan(Enumerate(topk), Fixed(1), Lanes(topk, topk), Score("segment"), rule)


def _finite(policy: Any, name: str) -> float:
    return real(f"{type(policy).__name__}.{name}", getattr(policy, name), "a finite number", math.isfinite)


def _model(policy: Any, name: str) -> str:
    """Its field `name`, a model's name."""
    value = getattr(policy, name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{type(policy).__name__}.{name} is {shown(value)}, it must be the name of a model of "
                           f"Engine(models=…), or {OWN!r}")
    return value


def _temperature(policy: Any, name: str) -> float:
    return real(f"{type(policy).__name__}.{name}", getattr(policy, name),
                f"a finite number of at least {LEAST_TEMPERATURE:g}",
                lambda value: LEAST_TEMPERATURE <= value < math.inf)


def _size(policy: Any, name: str, maximum: int = MAX_SIZE) -> int:
    return integer(f"{type(policy).__name__}.{name}", getattr(policy, name), 1, maximum)


def _choice(policy: Any, name: str, choices: tuple[str, ...]) -> str:
    return choice(f"{type(policy).__name__}.{name}", getattr(policy, name), choices)


def _exhaust(policy: Any) -> Any:
    """Its field `exhaust`, a name or an object, checked."""
    checked_exhaustion(f"{type(policy).__name__}.exhaust", policy.exhaust)
    return policy.exhaust


def _keep(policy: Any, **values: Any) -> None:
    """Puts checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)
