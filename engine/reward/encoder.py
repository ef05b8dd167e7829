"""Encoder reward models (DistilBERT, DeBERTa and the like) through transformers: bidirectional, so every score reads
the whole text again; only batching helps."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from stars.arguments import shown
from stars.config import EngineConfig
from stars.errors import ModelError, RequestError, RewardError
from stars.model.checkpoint import Checkpoint
from stars.model.location import located
from stars.model.normalisation import read_normalisation
from stars.model.tokenizer import REPLACEMENT, Tokenizer
from stars.model.tokenizer_limits import is_failure
from stars.prompt import Prompt, message_text
from stars.reward.base import (
    Candidate,
    ContextFull,
    Held,
    Reward,
    Scored,
    check_path,
    checked_batch_size,
    checked_integer,
)
from stars.reward.encoder_model import choose_padding, context_length, load_encoder, num_embeddings, one_line

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ROUNDING = 1e-4
"""How far padding may move a logit of order 1; float32 moves it by some 1e-6."""

Encoded = dict[str, list[int]]
"""What the model is given of one text, by the names of its inputs."""

logger = logging.getLogger(__name__)


class EncoderReward(Reward):
    """A sequence-classification model of transformers; the reward is one logit, computed in float32, raw unless
    config.json says `normalize_reward`: then (logit - mean) / std.

    model: directory; nothing in it is run or unpickled. inputs: "joined" reads prompt and response as one text, "pair"
    as a pair of texts (what reward models trained on questions and answers expect). label: whose logit is the reward,
    for models with several; a model with one label needs none. batch_size: texts of one forward pass; one where the
    engine is deterministic, where there is no pad token, or where padding would change a score.

    Of messages the contents are read, a line each. A response counts as `max_tokens` tokens besides its prompt: where
    that is more than the model's context, the request ends with an error before a token is drawn. A response that takes
    more tokens of the reward model than of the language model may outgrow the context all the same. Where segments are
    scored, one that does so after its first segment ends there with finish_reason "length", as at the end of a
    context. Elsewhere the request ends with an error: in a first segment, and where a finished response is scored, by
    Sample(score=True) and BestOfN.
    A tokenizer with regular expressions of its own, or with steps that make a text very long, is refused at the load.
    Needs the extra: pip install 'stars-engine[hf]'.
    """

    needs_text = True
    exclusive = True

    def __init__(self, model: str | Path, *, inputs: Literal["joined", "pair"] = "joined", label: int | None = None,
                 batch_size: int = 8):
        check_path("EncoderReward", model)
        model = located(model)
        if not isinstance(inputs, str) or inputs not in ("joined", "pair"):
            raise RewardError(f'EncoderReward.inputs is {shown(inputs)}, it must be "joined" or "pair"')
        if label is not None:
            label = checked_integer("EncoderReward.label", label, 0)
        batch_size = checked_batch_size("EncoderReward", batch_size)
        self.model_path = Path(model) if isinstance(model, str) else model
        self.inputs = inputs
        self.whole_text = "prompt" if inputs == "joined" else None
        self.label = label
        self.batch_size = self._batch_size = batch_size  # the latter: what the model bears

    def holds(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> Held:
        """The weights, which become float32; a pass over a few texts is small beside them."""
        return Held(other_bytes=torch.float32.itemsize * sum(
            info.size for info in Checkpoint(self.model_path).tensors.values()))

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Loads model and tokenizer; RewardError without transformers, for a missing head and for a label unnamed."""
        if tokenizer is None:
            raise RewardError("the model has no tokenizer.json, so the reward model cannot be given text: "
                              "add the tokenizer")
        self.model, self.tokenizer, checkpoint = load_encoder(self.model_path, config.device)
        labels = self.model.config.num_labels
        if self.label is None and labels != 1:
            raise RewardError(f"{self.model_path} has {labels} labels: choose the one whose logit is the reward with "
                              "EncoderReward(model, label=...)")
        if self.label is not None and not 0 <= self.label < labels:
            raise RewardError(f"EncoderReward.label is {self.label}, the model has labels 0 to {labels - 1}")
        self._column = self.label or 0
        self._normalisation = read_normalisation(checkpoint)
        self.max_model_len = context_length(self.model, self.tokenizer)
        self._rows = num_embeddings(self.model)
        self._pad = choose_padding(self.model, self.tokenizer)
        self._types = getattr(self.model.config.get_text_config(), "type_vocab_size", None)
        taken = inspect.signature(self.model.forward).parameters
        self._inputs = [name for name in INPUTS if name in taken]
        self._batch_size = self.batch_size if not config.deterministic and self._pad is not None else 1
        self._newest: tuple[Prompt, str, Encoded | RewardError] | None = None
        self._try_out()

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses prompts that cannot be shown as text, or fill the model's context by themselves."""
        _, encoded = self._read(prompt)
        if isinstance(encoded, RewardError):
            raise RequestError(str(encoded))
        tokens = len(encoded["input_ids"])
        if not tokens:
            raise RequestError("the prompt is empty for the reward model: give at least one character that it knows")
        if tokens > self.max_model_len:
            raise RequestError(f"the prompt makes {tokens} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: shorten the prompt")

    def open(self, prompt: Prompt, max_tokens: int) -> _Session:
        """The session is the prompt's text. RewardError where the response could not be scored to its end."""
        text, encoded = self._read(prompt)
        if isinstance(encoded, RewardError):
            raise encoded
        needed = len(encoded["input_ids"]) + max_tokens
        if needed > self.max_model_len:
            raise RewardError(f"prompt and max_tokens make {needed} tokens for the reward model, whose context is "
                              f"{self.max_model_len}: lower max_tokens or shorten the prompt")
        checked = self._checked(encoded)
        if isinstance(checked, RewardError):
            raise checked
        return _Session(text, prompt.literal)

    def fork(self, session: _Session) -> _Session:
        """The same prompt: there is no other history."""
        return session._replace()

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """A share of one forward pass."""
        return max(1, self._batch_size // responses)

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """Whole texts, the longest together, batch_size at a time; a batch that fails is scored text by text."""
        results: dict[int, Scored] = {}
        texts: dict[int, Encoded] = {}
        for index, text in enumerate(self._encode_texts([
                (candidate.session.text, (candidate.text or "").rstrip(REPLACEMENT), candidate.session.literal)
                for candidate in candidates])):
            checked = self._checked(text)
            if isinstance(checked, RewardError):
                results[index] = Scored(checked)
            else:
                texts[index] = checked
        order = sorted(texts, key=lambda index: len(texts[index]["input_ids"]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            for index, reward in zip(chosen, self._rewards([texts[index] for index in chosen]), strict=True):
                length = len(texts[index]["input_ids"])
                results[index] = Scored(reward, length, length)
        return [results[index] for index in range(len(candidates))]

    def _read(self, prompt: Prompt) -> tuple[str, Encoded | RewardError]:
        """A prompt's text, and what the model is given of it with an empty response; the newest prompt's is kept.

        RequestError for a prompt that has no text.
        """
        if self._newest is None or self._newest[0] is not prompt:
            text = _text(prompt)
            if text is None:
                raise RequestError("the reward reads text and these prompt ids cannot be decoded: give the prompt as "
                                   "text")
            self._newest = prompt, text, self._encode_texts([(text, "", prompt.literal)])[0]
        return self._newest[1:]

    def _encode_texts(self, texts: list[tuple[str, str, bool]]) -> list[Encoded | RewardError]:
        """The model's inputs for each (prompt, response, whether control tokens in them are text), or why there are
        none."""
        results: dict[int, Encoded | RewardError] = {}
        for literal in (False, True):
            places = [place for place, text in enumerate(texts) if text[2] == literal]
            if places:
                encoded = self._encode([texts[place][:2] for place in places], literal)
                results.update(zip(places, encoded, strict=True))
        return [results[place] for place in range(len(texts))]

    def _encode(self, pairs: list[tuple[str, str]], literal: bool = False) -> list[Encoded | RewardError]:
        # What is put around texts, [CLS] for example, is not looked for in them.
        options: dict[str, Any] = {"verbose": False, "split_special_tokens": True} if literal else {"verbose": False}
        try:
            if self.inputs == "joined":
                batch = self.tokenizer([first + second for first, second in pairs], **options)
            else:
                firsts, seconds = zip(*pairs, strict=True)
                batch = self.tokenizer(list(firsts), list(seconds), **options)
        except BaseException as error:  # a text's error is its own
            if not is_failure(error):
                raise
            if len(pairs) > 1:
                return [one for pair in pairs for one in self._encode([pair], literal)]
            return [RewardError(f"the reward model's tokenizer does not take this text ({one_line(error)}): change "
                                "the prompt")]
        batch = {name: batch[name] for name in self._inputs if name in batch}
        return [{name: values[i] for name, values in batch.items()} for i in range(len(pairs))]

    def _checked(self, encoded: Encoded | RewardError) -> Encoded | RewardError:
        """Why a text cannot be scored. Checked here, since on a GPU an index out of range ends the process's use of it.
        """
        if isinstance(encoded, RewardError):
            return encoded
        ids, types = encoded["input_ids"], encoded.get("token_type_ids", ())
        if len(ids) > self.max_model_len:
            return ContextFull(f"the text is {len(ids)} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: lower max_tokens")
        if max(ids, default=0) >= self._rows:
            return RewardError(f"token id {max(ids)} is outside the reward model's vocabulary of {self._rows}: use the "
                               "tokenizer it came with")
        if self._types and max(types, default=0) >= self._types:
            return RewardError(f"the reward model's tokenizer gives texts the type {max(types)} and the model knows "
                               f'{self._types} types: use inputs="joined"')
        return encoded

    def _rewards(self, texts: list[Encoded]) -> list[float | RewardError]:
        """The rewards of encoded texts, from one forward pass if it succeeds."""
        try:
            logits = self._logits(texts)
        except Exception as error:  # of one text's making, most likely: the others are scored without it
            if len(texts) > 1:
                return [reward for text in texts for reward in self._rewards([text])]
            failure = RewardError(f"the reward model raised {one_line(error)}")
            failure.__cause__ = error
            return [failure]
        if self._normalisation is not None:
            mean, std = self._normalisation
            return [(logit - mean) / std for logit in logits]
        return [*logits]

    def _logits(self, texts: list[Encoded]) -> list[float]:
        """The raw logits of encoded texts in one forward pass, filled up on the right to the longest."""
        width = max(len(text["input_ids"]) for text in texts)
        fill = {"input_ids": self._pad or 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch = {name: torch.tensor([text[name] + [fill.get(name, 0)] * (width - len(text[name])) for text in texts],
                                    device=self.model.device)
                 for name in texts[0]}  # [texts, width] each
        with torch.inference_mode():
            logits: list[float] = self.model(**batch).logits[:, self._column].float().tolist()
        return logits

    def _try_out(self) -> None:
        """Scores two texts alone and together: ModelError if it cannot, and one at a time from then on if they differ.
        """
        short, long = map(self._checked, self._encode([("a", " b"), ("a", " b c d e f g")]))
        if isinstance(short, RewardError):
            raise ModelError(f"{self.model_path} cannot score a text of two letters: {short}")
        if isinstance(long, RewardError):
            self._batch_size = 1  # a context of a few tokens, in which there is little to batch
            return
        [alone] = self._rewards([short])
        if isinstance(alone, RewardError):
            raise ModelError(f"{self.model_path} cannot score a text ({alone}): use a model that reads text alone, "
                             "with its own tokenizer") from alone.__cause__
        if self._batch_size == 1:
            return
        try:
            [alone], together = self._logits([short]), self._logits([short, long])[0]
            padded = len(short["input_ids"]) < len(long["input_ids"])
            same = padded and abs(together - alone) <= ROUNDING * max(1.0, abs(alone))
        except Exception as error:
            logger.info("%s does not take several texts at once (%s)", self.model_path, one_line(error))
            same = False
        if not same:
            logger.info("%s scores one text at a time: padding would change its scores", self.model_path)
            self._batch_size = 1


class _Session(NamedTuple):
    text: str
    literal: bool  # whether control tokens in it are text


def _text(prompt: Prompt) -> str | None:
    chat = prompt.chat
    if chat is not None:  # a line each, and of a final message that is continued the response is a part
        text = "\n".join(message_text(message) for message in chat.messages)
        return text if chat.continue_final_message else text + "\n"
    return prompt.given if isinstance(prompt.given, str) else prompt.text
