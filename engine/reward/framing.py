"""How a causal reward model reads a prompt, and what stands around the responses to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stars.errors import RequestError, RewardError
from stars.model.config import ModelConfig
from stars.model.tokenizer import Tokenizer
from stars.prompt import Prompt
from stars.sizes import MAX_CLOSING


class Frame(NamedTuple):
    """What stands around the responses to one prompt."""

    prefix: list[int]  # the reward model's ids of the prompt
    text: str  # the prompt's text, where responses are re-encoded
    special: bool  # whether that text is encoded with special tokens around it
    closing: list[int]  # ids after every response


class Text(NamedTuple):
    """What the model reads of a response."""

    ids: list[int]  # of prompt, response and closing
    content: int  # of them without the closing
    tags: Sequence[int] = ()  # where step tags stand among them, in order; none: the reward is read at the last token


class Framing:
    """Renders prompts for one reward model; template, close and chat_template_kwargs as `CausalReward`'s.

    shape: the reward model's. RewardError where the model lacks what `close` asks for.
    """

    def __init__(self, tokenizer: Tokenizer | None, same_vocabulary: bool, shape: ModelConfig, template: str,
                 close: str, chat_template_kwargs: dict[str, Any]):
        if close == "template" and (tokenizer is None or not tokenizer.has_chat_template):
            raise RewardError('close="template" needs a chat template, which the reward model does not have: '
                              'use close="none" or "eos"')
        eos = shape.eos_token_ids[:1]
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
        if close == "eos" and not eos:
            raise RewardError('close="eos" needs an EOS token, which the reward model does not name: use close="none"')
        self.encoder = None if same_vocabulary else tokenizer  # of texts, where the LM's ids are not passed through
        self._tokenizer = tokenizer
        self._template = template
        self._close = close
        self._eos = list(eos) if close == "eos" else []
        self._chat_template_kwargs = chat_template_kwargs
        self._newest: tuple[Prompt, Frame] | None = None
        self.longest_closing = len(self._eos)  # of the frames so far
        self.closing_room = MAX_CLOSING if close == "template" else len(self._eos)  # of most frames to come

    def frame(self, prompt: Prompt) -> Frame:
        """How the model reads this prompt and what stands around its responses; the newest prompt's is kept.

        A request is checked, asked for room at every step it waits and opened once a sample, always with one prompt.
        Raises RequestError for a prompt that cannot be rendered.
        """
        if self._newest is None or self._newest[0] is not prompt:
            frame = self._render(prompt)
            self.longest_closing = max(self.longest_closing, len(frame.closing))
            self._newest = prompt, frame
        return self._newest[1]

    def _render(self, prompt: Prompt) -> Frame:
        messages = prompt.given if isinstance(prompt.given, list) else None
        if self._template == "chat" or (self._template == "auto" and messages is not None):
            return self._chat(messages, prompt.text)
        if self._close == "template":
            raise RequestError('close="template" needs a chat prompt: give {"messages": [...]}, or use '
                               'template="chat"')
        if self.encoder is None:
            return Frame(prompt.token_ids, "", False, self._eos)
        if prompt.text is None:
            raise RequestError("these prompt ids cannot be decoded for the reward model's vocabulary: give the prompt "
                               "as text")
        special = messages is None  # a rendered template holds its special tokens
        return Frame(self.encoder.encode(prompt.text, add_special_tokens=special), prompt.text, special, self._eos)

    def _chat(self, messages: list[dict[str, Any]] | None, text: str | None) -> Frame:
        """The frame that the reward model's chat template makes of `messages`; without them, of `text` as a turn."""
        if self._tokenizer is None or not self._tokenizer.has_chat_template:
            raise RequestError("the reward model has no chat template: give the prompt as text, or build "
                               'its reward with template="raw"')
        if messages is None:
            if text is None:
                raise RequestError("these prompt ids cannot be decoded for the reward model's chat template: give "
                                   'the prompt as text, or use template="raw"')
            messages = [{"role": "user", "content": text}]
        before, after = self._tokenizer.split_template(messages, **self._chat_template_kwargs)
        prefix = self._tokenizer.encode(before, add_special_tokens=False)
        closing = self._tokenizer.encode(after, add_special_tokens=False) if self._close == "template" else self._eos
        return Frame(prefix, before, False, closing)
