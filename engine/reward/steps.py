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


BY_CLASS = {"ForProcessRewardModel": QWEN, "ForTokenClassification": SEPARATED, "ForCausalLM": SHEPHERD}
"""By the end of the name of a model's class."""


def detected(shape: ModelConfig, tokenizer: Tokenizer | None) -> StepFormat:
    """The format that the class of a model says; of others, Qwen's where the vocabulary has that tag."""
    for ending, steps in BY_CLASS.items():
        if any(name.endswith(ending) for name in shape.architectures):
            return steps
    assert QWEN.tag is not None
    return QWEN if tokenizer is not None and len(_ids(tokenizer, QWEN.tag)) == 1 else SEPARATED


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class StepFraming(Framing):
    """Reads responses step by step; template and chat_template_kwargs as `CausalReward`'s.

    The text is split at the separator; a step of white space alone is left out. Every other one is followed by the
    format's `end`, and its tag is read. A last step that no separator ended is, too, and an empty response: what is
    after its text up to the tag, or the separator, is the closing. RewardError for a tag that is no single token of the
    model.
    """

    def __init__(self, tokenizer: Tokenizer, shape: ModelConfig, template: str, steps: StepFormat,
                 chat_template_kwargs: dict[str, Any], lm_tokenizer: Tokenizer | None = None):
        super().__init__(tokenizer, False, shape, template, "none", chat_template_kwargs, lm_tokenizer)
        self.steps = steps
        self._steps_tokenizer = tokenizer
        self._end = _ids(tokenizer, steps.end)
        tag = self._end if steps.tag is None else _ids(tokenizer, steps.tag)
        if not tag or (steps.tag is not None and len(tag) > 1):
            what = f"step separator {steps.end!r}" if steps.tag is None else f"step tag {steps.tag!r}"
            raise RewardError(f"the {what} makes {len(tag)} tokens of the reward model's vocabulary, and one is read: "
                              "give a step_tag that is one token, or step_tag=None to read at the separator")
        self._tag = tag[-1]
        if max(*tag, *self._end) >= shape.vocab_size:
            raise RewardError(f"the step tag {steps.tag or steps.end!r} is token {max(*tag, *self._end)}, outside the "
                              f"reward model's vocabulary of {shape.vocab_size}: use the tokenizer it came with")
        self.longest_closing = self.closing_room = len(self._end)

    def read(self, frame: Frame, text: str) -> Text:
        """What the model reads of a response's text. RewardError where the tokenizer loses a tag that was put in."""
        text = text.rstrip(REPLACEMENT)  # a character that is cut in two at a segment's end
        if not self.steps.inserted:
            return self._tagged(frame, [], text if text.strip() else "")
        *steps, rest = text.split(self.steps.separator)
        steps = [step for step in steps if step.strip()]
        rest = rest if rest.strip() else ""
        return (self._separated if self.steps.tag is None else self._tagged)(frame, steps, rest)

    def _tagged(self, frame: Frame, steps: list[str], rest: str) -> Text:
        """The whole text as it is encoded with every tag in it; in `rest` there may be tags already."""
        _, tag, end, inserted, _ = self.steps
        assert tag is not None
        closed = bool(rest.rpartition(tag)[2].strip()) if not inserted and rest else bool(rest) or not steps
        put = len(steps) + closed
        text = "".join(step + end for step in steps) + rest + (end if closed else "")
        ids = self.encode(frame.text + text, frame.special, frame.marked)
        before = frame.prefix.count(self._tag)  # a prompt may speak of tags
        tags = [place for place, token in enumerate(ids) if token == self._tag][before:]
        if len(tags) < max(1, put):
            raise RewardError(f"the step tag {tag!r} stands {max(1, put)} times in what the reward model reads, and "
                              f"its tokenizer makes {len(tags)} of its tokens there: give a step_end around the tag "
                              "that keeps it apart from the text")
        return Text(ids[: tags[-1] + 1], tags[-1], tags) if closed else Text(ids, len(ids), tags)

    def _separated(self, frame: Frame, steps: list[str], rest: str) -> Text:
        """Steps and separators, each encoded by itself, so that no token is of both."""
        ids, tags = list(frame.prefix), []
        for step in steps:
            ids += _ids(self._steps_tokenizer, step) + self._end
            tags.append(len(ids) - 1)
        ids += _ids(self._steps_tokenizer, rest) if rest else []
        if not rest and tags:
            return Text(ids, len(ids), tags)
        return Text(ids + self._end, len(ids), [*tags, len(ids) + len(self._end) - 1])

    def _render(self, prompt: Prompt) -> Frame:
        return super()._render(prompt)._replace(closing=self._end)
