"""Encoder reward models (DistilBERT, DeBERTa and the like) through transformers: bidirectional, so every score reads
the whole text again; only batching helps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from stars.detokenizer import REPLACEMENT
from stars.errors import ModelError, RequestError, RewardError
from stars.prompt import Prompt
from stars.reward.base import Candidate, Limits, Reward, Scored


class EncoderReward(Reward):
    """A sequence-classification model of transformers; the reward is one raw logit, computed in float32.

    model: directory. inputs: "joined" reads prompt and response as one text, "pair" as a pair of texts (what reward
    models trained on questions and answers expect). label: whose logit is the reward, for models with several; a model
    with one label needs none. batch_size: texts of one forward pass.
    Needs the extra: pip install 'stars-engine[hf]'.
    """

    needs_text = True

    def __init__(self, model: str | Path, *, inputs: Literal["joined", "pair"] = "joined", label: int | None = None,
                 batch_size: int = 8):
        if inputs not in ("joined", "pair"):
            raise RewardError(f'EncoderReward.inputs is {inputs!r}, it must be "joined" or "pair"')
        if batch_size < 1:
            raise RewardError(f"EncoderReward.batch_size is {batch_size}, it must be at least 1")
        self.model_path = Path(model)
        self.inputs = inputs
        self.label = label
        self.batch_size = batch_size

    def bind(self, tokenizer, vocab_size: int, limits: Limits) -> None:
        """Loads model and tokenizer; RewardError without transformers, for a missing head and for a label unnamed."""
        if tokenizer is None:
            raise RewardError("the model directory has no tokenizer.json, so the reward model cannot be given text: "
                              "add the tokenizer")
        if not (self.model_path / "config.json").is_file():
            raise ModelError(f"{self.model_path} has no config.json: give the path of a model in Hugging Face format")
        try:
            import transformers
        except ImportError:
            raise RewardError("encoder reward models need transformers: pip install 'stars-engine[hf]'") from None
        try:
            self.model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.model_path, dtype=torch.float32, output_loading_info=True, local_files_only=True)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.model_path, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{self.model_path} cannot be loaded by transformers: {error}") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(f"{self.model_path} lacks the tensors {', '.join(missing[:4])}: use a checkpoint with a "
                             "trained reward head")
        self.model.eval().to(limits.device)
        labels = self.model.config.num_labels
        if self.label is None and labels != 1:
            raise RewardError(f"{self.model_path} has {labels} labels: choose the one whose logit is the reward with "
                              "EncoderReward(model, label=...)")
        if self.label is not None and not 0 <= self.label < labels:
            raise RewardError(f"EncoderReward.label is {self.label}, the model has labels 0 to {labels - 1}")
        self._column = self.label or 0
        positions = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        self.max_model_len = int(min(positions, self.tokenizer.model_max_length, 1 << 30))

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses prompts that cannot be shown as text, or fill the model's context by themselves."""
        text = _text(prompt)
        if text is None:
            raise RequestError("the reward reads text and these prompt ids cannot be decoded: give the prompt as text")
        tokens = len(self.tokenizer(text)["input_ids"])
        if tokens > self.max_model_len:
            raise RequestError(f"the prompt makes {tokens} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: shorten the prompt")

    def open(self, prompt: Prompt, max_tokens: int) -> Any:
        """The session is the prompt's text."""
        return _Session(_text(prompt))

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """A share of one forward pass."""
        return max(1, self.batch_size // responses)

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """Whole texts, the longest together, batch_size at a time."""
        firsts = [candidate.session.text for candidate in candidates]
        seconds = [candidate.text.rstrip(REPLACEMENT) for candidate in candidates]
        if self.inputs == "joined":
            encoded = self.tokenizer([first + second for first, second in zip(firsts, seconds, strict=True)])
        else:
            encoded = self.tokenizer(firsts, seconds)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        results: list[Scored | None] = [None] * len(candidates)
        for index, length in enumerate(lengths):
            if length > self.max_model_len:
                results[index] = Scored(RewardError(f"the text is {length} tokens for the reward model, whose context "
                                                    f"is {self.max_model_len}: lower max_tokens"))
        order = sorted((i for i, result in enumerate(results) if result is None), key=lambda i: lengths[i])
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({key: [values[i] for i in chosen] for key, values in encoded.items()},
                                       return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                logits = self.model(**batch).logits[:, self._column].tolist()  # [texts]
            for i, logit in zip(chosen, logits, strict=True):
                results[i] = Scored(logit, lengths[i], lengths[i])
        return results


class _Session(NamedTuple):
    text: str


def _text(prompt: Prompt) -> str | None:
    if isinstance(prompt.given, list):
        return "\n".join(str(message.get("content", "")) for message in prompt.given) + "\n"
    return prompt.given if prompt.given is not None else prompt.text
