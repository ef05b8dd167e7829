"""A process reward model: the probability that each step of a response is good, and one reward of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from stars.arguments import shown
from stars.config import EngineConfig
from stars.errors import RewardError
from stars.model.config import ModelConfig, load_config
from stars.model.heads import RewardHead
from stars.model.loader import inspect_model
from stars.model.tokenizer import Tokenizer
from stars.reward.base import Candidate, Held
from stars.reward.causal import CausalReward
from stars.reward.framing import Framing, Text
from stars.reward.session import Session
from stars.reward.steps import SHEPHERD, StepFormat, StepFraming, detected

SHEPHERD_LABELS = ("-", "+")
"""Tokens whose logits are the labels of a language model that judges steps: bad and good."""
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1], "min": min, "prod": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


class ProcessReward(CausalReward):
    """A decoder with a head of two labels, read at a tag after every step of a response: softmax[good_label].

    The response's text is split at step_separator; steps of white space alone are left out. What the model reads is
    every step followed by the tag, in place of the separator; the reward is the aggregate of these P(good) over the
    tags: "last", "min", "prod" or "mean". The last step has a tag though no separator ended it, which is scored and
    dropped, and an empty response has one: every beginning of a response has a score, in [0, 1], and r(x) is that of
    the tag behind the prompt.

    model: HF directory, or a Decoder with a head that gives probabilities, and `tokenizer`. head, quantization: as
    CausalReward's; without a head the two labels of the directory's head, or those of a `…ForCausalLM` for "-" and "+".
    What follows is detected from the model's class where it is left out, and `format` shows it once the engine is
    built:

    - step_separator: "\\n\\n"; of a plain language model "\\n".
    - step_tag: a text that is one token. "<extra_0>" of a `…ForProcessRewardModel`, "ки" of a `…ForCausalLM`
      (Math-Shepherd). None, of a `…ForTokenClassification` as TRL trains it: nothing is put in; steps and separators
      are encoded each by itself and the separator's last token is read.
    - step_end: the text put after each step, with the tag in it; the tag alone, or " ки\\n".
    - insert_tag: False where the language model writes the tags itself. Before it has, the closing's is read; a
      response that ends without any is an error. A tag that is a special token of the language model's vocabulary is in
      no text, so it must be put in.
    - template: as CausalReward's; "chat" of a `…ForProcessRewardModel`.

    A step tag in the response's own text is read like any other. Text is encoded again at every score, whichever
    tokenizer the language model has, and the cache is kept up to the longest common prefix; scores of tags in it are
    kept with it. Both models need a tokenizer. RewardError where the engine is built for a tag that is not one token,
    or a head without two labels; in a request, where the tokenizer merges a tag with what stands around it.
    """

    whole_text = None
    readings = 4  # of a candidate, in one pass: the steps that a segment ends, and the closing

    def __init__(self, model: Any, *, step_separator: str | None = None, step_tag: str | None = "auto",
                 step_end: str | None = None, insert_tag: bool = True,
                 aggregate: Literal["last", "min", "prod", "mean"] = "last",
                 template: Literal["auto", "chat", "raw"] | None = None, good_label: int = 1, head: Any = "auto",
                 tokenizer: Any = None, chat_template_kwargs: dict[str, Any] | None = None,
                 quantization: str | None = "auto"):
        super().__init__(model, head=head, tokenizer=tokenizer, template="auto" if template is None else template,
                         chat_template_kwargs=chat_template_kwargs, quantization=quantization)
        for name, value, allowed in (("step_separator", step_separator, "text, or left out"),
                                     ("step_tag", step_tag, "text of one token, or None for the separator"),
                                     ("step_end", step_end, "text with the tag in it, or left out")):
            if value is not None and (not isinstance(value, str) or not value):
                raise RewardError(f"ProcessReward.{name} is {shown(value)}, it must be {allowed}")
        if not isinstance(aggregate, str) or aggregate not in AGGREGATES:
            raise RewardError(f"ProcessReward.aggregate is {shown(aggregate)}, it must be one of "
                              f"{', '.join(map(repr, AGGREGATES))}")
        if good_label not in (0, 1) or isinstance(good_label, bool):
            raise RewardError(f"ProcessReward.good_label is {shown(good_label)}, it must be 0 or 1")
        if good_label == 0 and (hasattr(model, "forward") or head != "auto"):
            raise RewardError("ProcessReward.good_label=0 is about the two labels of a directory's head, and a head "
                              "was given: let that head give the probability of the good label")
        if not insert_tag and step_tag is None:
            raise RewardError("ProcessReward.insert_tag=False says that tags stand in the response, and step_tag=None "
                              "that there is none: give the step_tag, or leave insert_tag out")
        self.aggregate = aggregate
        self.good_label = good_label
        self.step_separator, self.step_tag, self.step_end = step_separator, step_tag, step_end
        self.insert_tag = insert_tag
        self.given_template = template
        self.format: StepFormat | None = None

    def holds(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> Held:
        """As CausalReward's, of the head that is meant."""
        self._choose_head()
        return super().holds(tokenizer, vocab_size, config)

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """As CausalReward's; what was detected is `format` from here on."""
        self._choose_head()
        super().bind(tokenizer, vocab_size, config)
        head = self.decoder.score_head
        if not isinstance(head, RewardHead) or head.activation == "none":
            raise RewardError("ProcessReward.model has a head that gives no probability of a label: use a model with "
                              "two labels, say which with head, or score it as a CausalReward")
        assert isinstance(self.framing, StepFraming)
        self.format = self.framing.steps

    def _choose_head(self) -> None:
        """Says which rows of which head are the bad label and the good one, where it was left out."""
        if self.head != "auto" or hasattr(self.model, "forward"):
            return
        own = self._own_tokenizer()
        if own is None or detected(load_config(self.model), own) != SHEPHERD:
            form = inspect_model(self.model, "reward").reward_head
            if form is not None and form.labels == 1:
                raise RewardError(f"{self.model} has a reward head of one label where the steps' bad and good ones are "
                                  "needed: use a model with two labels, or score responses with CausalReward")
            if form is None or not self.good_label:  # labels that their class does not explain, or the other one
                self.head = {"rows": [1 - self.good_label, self.good_label]}
            return
        rows = [own.encode(label, add_special_tokens=False)[-1] for label in SHEPHERD_LABELS]
        self.head = {"tensor": "lm_head", "rows": rows if self.good_label else rows[::-1]}

    def aggregate_of(self, scores: Sequence[float]) -> float:
        """As `aggregate` says; NaN where a score is."""
        return math.nan if any(map(math.isnan, scores)) else AGGREGATES[self.aggregate](scores)

    def _read(self, session: Session, token_ids: list[int], text: str | None) -> Text:
        assert isinstance(self.framing, StepFraming)
        return self.framing.read(session.frame, text or "")

    def _lacks(self, candidate: Candidate) -> RewardError | None:
        steps = self.format
        assert steps is not None  # bound
        if not candidate.ended or steps.inserted or steps.tag is None or steps.tag in (candidate.text or ""):
            return None
        return RewardError(f"the response has ended without a step tag {steps.tag!r}: have the language model write "
                           "one after each step, or leave out insert_tag=False, so that they are put in")

    def _framing(self, tokenizer: Tokenizer | None, vocab_size: int, shape: ModelConfig) -> Framing:
        own = self._own_tokenizer()
        if own is None or tokenizer is None:
            side = "process reward model" if own is None else "model"
            raise RewardError(f"the {side} has no tokenizer.json, and steps are found in text: add its tokenizer to "
                              "the directory, or give ProcessReward(tokenizer=...)")
        steps = self._steps(detected(shape, own))
        return StepFraming(own, shape, steps.template, steps, self.chat_template_kwargs, tokenizer)

    def _steps(self, steps: StepFormat) -> StepFormat:
        """What was detected, with what was given in its place."""
        if self.step_tag != "auto":
            end = steps.end if self.step_tag == steps.tag else self.step_tag
            steps = steps._replace(tag=self.step_tag, end=end or "")
        if self.step_separator is not None:
            steps = steps._replace(separator=self.step_separator)
        if steps.tag is None:
            if self.step_end is not None or not self.insert_tag:
                given = "step_end" if self.step_end is not None else "insert_tag=False"
                raise RewardError(f"ProcessReward.{given} is about a step tag, and this model is read at the "
                                  "separator: give step_tag too")
            steps = steps._replace(end=steps.separator)
        elif self.step_end is not None:
            if steps.tag not in self.step_end:
                raise RewardError(f"ProcessReward.step_end is {shown(self.step_end)}, it must have the step tag "
                                  f"{steps.tag!r} in it")
            steps = steps._replace(end=self.step_end)
        template = steps.template if self.given_template is None else self.given_template
        return steps._replace(inserted=self.insert_tag, template=template)
