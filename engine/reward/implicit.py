"""The implicit reward of a model that was tuned on preferences: how much likelier it makes a response than another."""

from __future__ import annotations

import math
from typing import Any

from stars.arguments import flag, real, shown
from stars.errors import RequestError, RewardError, StarsError
from stars.model.loaded import READABLE, taken
from stars.model.location import located
from stars.reward.base import Candidate, Scored, checked_rounding
from stars.reward.composite import CompositeReward
from stars.reward.logprobs import LogprobReward

NAMES = ("policy", "reference")


class ImplicitReward(CompositeReward):
    """beta * (log p_policy(response | prompt) - log p_reference(response | prompt)): the reward that DPO fits.

    It is that of arXiv 2305.18290 up to a term of the prompt alone, with which no response is preferred to another; so
    r(prompt) = 0. Both log-probabilities are raw: at temperature 1, without filters and penalties, whatever the request
    says. length_normalised: divided by the number of tokens, as SimPO's reward is, which has no reference. Then it is a
    mean and no sum: a long response gains nothing by its length, and a segment may lower what the one before it gave.

    policy, reference: directories of language models, models of transformers, or Decoders, of the engine's vocabulary;
    each is run over its new tokens alone, in a cache of its own. Both read the engine's prompt ids as they are, and no
    chat template of theirs.

    The EOS or stop token that ended a response counts as a token of it, though `Candidate.token_ids` lack it. The
    tokens that spell a stop string count, too: all that was drawn does. `Scored.per_token` has beta times the
    log-ratio of each new token, that one among them, not divided by anything: rules find it in `Judged.per_token`.

    A token that the policy gives no probability makes the reward -inf, which rejects. One that only the policy gives
    any is an error: the reference is no model to compare it with.

    quantization: of both directories, as CausalReward's.

    On a GPU it scores once the host has read the drafts. RewardError where it is made or the engine is built for a
    beta that is not above 0, and for a model that is no directory or of another vocabulary.
    """

    def __init__(self, policy: Any, reference: Any, *, beta: float = 1.0, length_normalised: bool = False,
                 quantization: str | None = "auto"):
        policy, reference = taken(policy), taken(reference)
        for name, model in zip(NAMES, (policy, reference), strict=True):
            if not isinstance(model, READABLE) and not hasattr(model, "forward"):
                raise RewardError(f"ImplicitReward.{name} is {shown(model)}, it must be a model directory, a GGUF file "
                                  "or a Decoder")
            checked_rounding("ImplicitReward", quantization, model)
        try:
            self.beta = real("ImplicitReward.beta", beta, "a finite number above 0",
                             lambda value: 0.0 < value < math.inf)
            self.length_normalised = flag("ImplicitReward.length_normalised", length_normalised)
        except RequestError as error:
            raise RewardError(str(error)) from None
        super().__init__([LogprobReward(located(model), f"{name} of an ImplicitReward", quantization)
                          for name, model in zip(NAMES, (policy, reference), strict=True)])

    def __repr__(self) -> str:
        models = ", ".join(repr(str(part.model)) if isinstance(part.model, READABLE) else "a Decoder"
                           for part in self.parts if isinstance(part, LogprobReward))
        return f"ImplicitReward({models}, beta={self.beta:g}, length_normalised={self.length_normalised})"

    def _named(self, index: int, error: StarsError) -> StarsError:
        """The same, with the model that it is about: those of a request do not say it."""
        return RequestError(_of(index, error)) if type(error) is RequestError else error

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """The difference of what the two models say of each."""
        policies, references = self.score_parts(candidates)
        return [self._compared(*those) for those in zip(candidates, policies, references, strict=True)]

    def _compared(self, candidate: Candidate, policy: Scored, reference: Scored) -> Scored:
        per_token = [self.beta * (ours - theirs)
                     for ours, theirs in zip(policy.per_token, reference.per_token, strict=True)]
        return Scored(self._reward(candidate, policy, reference), policy.tokens_run + reference.tokens_run,
                      policy.tokens_full + reference.tokens_full, (policy.handle, reference.handle), per_token)

    def _reward(self, candidate: Candidate, policy: Scored, reference: Scored) -> float | RewardError:
        ours, theirs = policy.reward, reference.reward
        for index, fault in enumerate((ours, theirs)):
            if isinstance(fault, RewardError):
                return RewardError(_of(index, fault))
        assert isinstance(ours, float) and isinstance(theirs, float)
        for name, total in zip(NAMES, (ours, theirs), strict=True):
            if math.isnan(total):
                return RewardError(f"the {name} of an ImplicitReward gave logits that are NaN or infinite: its weights "
                                   "or its dtype are at fault")
        if theirs == -math.inf:
            return RewardError("the reference of an ImplicitReward gives a response probability 0, and there is no "
                               "ratio to that: use the model that the policy was trained from")
        tokens = len(candidate.token_ids) + (candidate.stopped is not None)
        return self.beta * (ours - theirs) / (max(1, tokens) if self.length_normalised else 1)


def _of(index: int, error: StarsError) -> str:
    """An error of one of the models."""
    return f"{NAMES[index]} of an ImplicitReward: {error}"
