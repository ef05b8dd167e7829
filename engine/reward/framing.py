"""How a causal reward model reads a prompt, and what stands around the responses to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stars.chat import Chat, control_tokens, rendered, split
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
    marked: bool = False  # whether that text has marks in it, where control tokens of the prompt are text


class Text(NamedTuple):
    """What the model reads of a response."""

    ids: list[int]  # of prompt, response and closing
    content: int  # of them without the closing
    tags: Sequence[int] = ()  # where step tags stand among them, in order; none: the reward is read at the last token


class Framing:
    """Renders prompts for one reward model; template, close and chat_template_kwargs as `CausalReward`'s.

    shape: the reward model's. lm_tokenizer: the language model's, by whose chat template messages are rendered where
    the reward model reads what that one is fed. RewardError where the model lacks what `close` asks for.
    """

    def __init__(self, tokenizer: Tokenizer | None, same_vocabulary: bool, shape: ModelConfig, template: str,
                 close: str, chat_template_kwargs: dict[str, Any], lm_tokenizer: Tokenizer | None = None):
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
        self._lm_tokenizer = lm_tokenizer
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
        chat = prompt.chat
        if self._template == "chat" or (self._template == "auto" and chat is not None):
            return self._chat(chat, prompt)
        if self._close == "template":
            raise RequestError('close="template" needs a chat prompt: give {"messages": [...]}, or use '
                               'template="chat"')
        if self.encoder is None:
            return Frame(prompt.token_ids, "", False, self._eos)
        if prompt.text is None:
            raise RequestError("these prompt ids cannot be decoded for the reward model's vocabulary: give the prompt "
                               "as text")
        special = chat is None and prompt.special  # a rendered template holds its special tokens
        text, marked = self._raw(chat, prompt, prompt.text)
        return Frame(self.encode(text, special, marked), text, special, self._eos, marked)

    def _raw(self, chat: Chat | None, prompt: Prompt, text: str) -> tuple[str, bool]:
        """The prompt as the language model reads it, and whether it is marked for this model's control tokens."""
        if not prompt.literal:
            return text, False
        control = control_tokens(self._tokenizer)
        if chat is None:
            marked = control.mark(text)
            return marked, marked != text
        if prompt.cut:
            raise RequestError("these messages were cut, and the reward model cannot tell which control tokens in them "
                               'are text: leave truncate_prompt_tokens out, or build its reward with template="chat"')
        return rendered(chat, self._lm_tokenizer, control)

    def encode(self, text: str, special: bool, marked: bool) -> list[int]:
        """The reward model's ids of a text that begins with a frame's, whose `special` and `marked` these are."""
        assert self._tokenizer is not None
        if marked:
            return self._tokenizer.control_tokens.encode(text, special)
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _chat(self, chat: Chat | None, prompt: Prompt) -> Frame:
        """The frame that the reward model's chat template makes of a conversation; without one, of the text as a turn.
        """
        if self._tokenizer is None or not self._tokenizer.has_chat_template:
            raise RequestError("the reward model has no chat template: give the prompt as text, or build "
                               'its reward with template="raw"')
        if chat is None:
            if prompt.text is None:
                raise RequestError("these prompt ids cannot be decoded for the reward model's chat template: give "
                                   'the prompt as text, or use template="raw"')
            chat = Chat([{"role": "user", "content": prompt.text}])
        control = control_tokens(self._tokenizer) if prompt.literal else None
        before, after, marked = split(chat, self._tokenizer, self._chat_template_kwargs, control)
        prefix = self.encode(before, False, marked)
        closing = self.encode(after, False, marked) if self._close == "template" else self._eos
        return Frame(prefix, before, False, closing, marked)
