"""How a process reward model reads the steps of a response: where it is split, and what is read after each step."""

from __future__ import annotations

from typing import Any, NamedTuple

from stars.errors import RewardError
from stars.model.config import ModelConfig
from stars.model.tokenizer import REPLACEMENT, Tokenizer
from stars.prompt import Prompt
from stars.reward.framing import Frame, Framing, Text


class StepFormat(NamedTuple):
    """What stands between the steps of a response, and what stands after each of them where the model reads it."""

    separator: str  # between steps; where tags stand in the response, unused
    tag: str | None  # whose one token is read; None: the separator is, at its last token
    end: str  # what the model reads after each step in place of the separator: the tag is in it
    inserted: bool  # whether `end` is put there; otherwise the tags stand in the response already
    template: str  # as `CausalReward.template`


QWEN = StepFormat("\n\n", "<extra_0>", "<extra_0>", True, "chat")
"""Qwen2.5-Math-PRM's: steps joined by the tag, in an assistant's turn."""
SEPARATED = StepFormat("\n\n", None, "\n\n", True, "auto")
"""Token classification as TRL trains it: every step is encoded by itself, and then the separator."""
SHEPHERD = StepFormat("\n", "ки", " ки\n", True, "raw")
"""Math-Shepherd's: a tag of plain text at the end of every line."""


def detected(shape: ModelConfig, tokenizer: Tokenizer) -> StepFormat:
    """The format that the class of a model says; of others, Qwen's where the vocabulary has that tag."""
    if any(name.endswith("ForTokenClassification") for name in shape.architectures):
        return SEPARATED
    if any(name.endswith("ForCausalLM") for name in shape.architectures):
        return SHEPHERD
    named = any(name.endswith("ForProcessRewardModel") for name in shape.architectures)
    return QWEN if named or _ids(tokenizer, "<extra_0>")[1:] == [] else SEPARATED


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class StepFraming(Framing):
    """Reads responses step by step; template and chat_template_kwargs as `CausalReward`'s.

    The text is split at the separator; a step of white space alone is left out. Every other one is followed by the
    format's `end`, and its tag is read. So is a last step that no separator ended, for which the tag alone, or the
    separator, is the closing; and so is an empty response. RewardError for a tag that is no single token of the model.
    """

    def __init__(self, tokenizer: Tokenizer, shape: ModelConfig, template: str, steps: StepFormat,
                 chat_template_kwargs: dict[str, Any]):
        super().__init__(tokenizer, False, shape, template, "none", chat_template_kwargs)
        self.steps = steps
        self._steps_tokenizer = tokenizer
        self._closing = _ids(tokenizer, steps.end if steps.tag is None else steps.tag)
        if not self._closing or (steps.tag is not None and len(self._closing) > 1):
            what = "step separator" if steps.tag is None else "step tag"
            raise RewardError(f"the {what} {steps.tag or steps.end!r} makes {len(self._closing)} tokens of the reward "
                              "model's vocabulary, and one is read: give a step_tag that is one token, or step_tag=None "
                              "to read at the separator")
        if max(self._closing) >= shape.vocab_size:
            raise RewardError(f"the step tag {steps.tag!r} is token {max(self._closing)}, outside the reward model's "
                              f"vocabulary of {shape.vocab_size}: use the tokenizer it came with")
        self.longest_closing = self.closing_room = len(self._closing)

    def read(self, frame: Frame, token_ids: list[int], text: str | None) -> Text:
        """As `Framing.read`, with the tags. RewardError where the tokenizer does not keep a tag that was put in."""
        text = (text or "").rstrip(REPLACEMENT)
        if not self.steps.inserted:
            return self._standing(frame, text)
        *steps, rest = text.split(self.steps.separator)
        steps = [step for step in steps if step.strip()]
        rest = rest if rest.strip() else ""
        if self.steps.tag is None:
            return self._separated(frame, steps, rest)
        found = self._tagged(frame, "".join(step + self.steps.end for step in steps) + rest)
        if len(found.tags) < len(steps):
            raise RewardError(f"the step tag {self.steps.tag!r} was put after {len(steps)} steps, and the reward "
                              f"model's tokenizer makes its token of {len(found.tags)} of them: give a step_end around "
                              "it that keeps it apart from a step's text")
        return self._closed(found, bool(rest))

    def _standing(self, frame: Frame, text: str) -> Text:
        """Of a response in which the tags stand already."""
        assert self.steps.tag is not None
        found = self._tagged(frame, text if text.strip() else "")
        return self._closed(found, bool(text.rpartition(self.steps.tag)[2].strip()))

    def _tagged(self, frame: Frame, text: str) -> Text:
        """The whole text's ids, and where in the response the tag's is."""
        ids = frame.prefix
        if text:
            ids = self._steps_tokenizer.encode(frame.text + text, add_special_tokens=frame.special)
        [tag] = self._closing
        tags = [place for place, token in enumerate(ids) if token == tag]
        return Text(ids, len(ids), tags[frame.prefix.count(tag) :])  # the prompt may speak of tags

    def _separated(self, frame: Frame, steps: list[str], rest: str) -> Text:
        """Steps and separators, each encoded by itself, so that no token is of both."""
        ids, tags = list(frame.prefix), []
        for step in steps:
            ids += _ids(self._steps_tokenizer, step)
            ids += self._closing
            tags.append(len(ids) - 1)
        if rest:
            ids += _ids(self._steps_tokenizer, rest)
        return self._closed(Text(ids, len(ids), tags), bool(rest))

    def _closed(self, found: Text, unfinished: bool) -> Text:
        """With the closing, where a step is unfinished or nothing would be read."""
        if not unfinished and found.tags:
            return found
        ids = found.ids + self._closing
        return Text(ids, found.content, [*found.tags, len(ids) - 1])

    def _render(self, prompt: Prompt) -> Frame:
        return super()._render(prompt)._replace(closing=self._closing)
