"""Toy models with enumerable segments: real decoders without files, and a second implementation of them in numpy.

`ToyModel.logits` and `ToyModel.reward` recompute everything in float64 from the formulas of the llama family and know
nothing of caches, batches or the engine's kernels: what they and the engine agree on is right twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from stars import kernels
from stars.engine import Engine
from stars.model.config import ModelConfig, parse_config
from stars.model.decoder import Decoder, LayerWeights
from stars.model.rope import rope_tables
from stars.outputs import RequestOutput
from stars.reward import CausalReward

EOS = 0
"""A token like any other, except that it ends a response."""


class ToyModel:
    """Random weights of a small llama: next-token distributions are peaked but not degenerate, and depend on history.

    `sharpness` is about the standard deviation of the logits (of the reward, for head="reward").
    """

    def __init__(self, vocab: int = 5, seed: int = 0, *, head: Literal["lm", "reward"] = "lm", hidden: int = 16,
                 layers: int = 2, heads: int = 2, kv_heads: int = 1, head_dim: int = 8, intermediate: int = 24,
                 positions: int = 256, eos: Sequence[int] = (EOS,), sharpness: float = 1.0):
        kind = "ForCausalLM" if head == "lm" else "ForSequenceClassification"
        self.config: ModelConfig = parse_config({
            "model_type": "llama", "architectures": ["Llama" + kind], "vocab_size": vocab, "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "intermediate_size": intermediate, "max_position_embeddings": positions,
            "rms_norm_eps": 1e-6, "rope_theta": 100.0, "eos_token_id": list(eos), "id2label": {"0": "reward"},
        }, {}, "a toy model")
        self.head = head
        generator = np.random.default_rng(seed)

        def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
            # Values that bfloat16 holds exactly: a packed weight may be stored so.
            values = torch.tensor(generator.standard_normal((rows, columns)) * scale / math.sqrt(columns))
            return values.bfloat16().float().numpy()

        def norm() -> np.ndarray:
            return (1 + 0.2 * generator.standard_normal(hidden)).astype(np.float32)

        self.embedding = matrix(vocab, hidden, math.sqrt(hidden))
        self.layers = [dict(
            input_norm=norm(), q=matrix(heads * head_dim, hidden, 1.5), k=matrix(kv_heads * head_dim, hidden, 1.5),
            v=matrix(kv_heads * head_dim, hidden), o=matrix(hidden, heads * head_dim), mlp_norm=norm(),
            gate=matrix(intermediate, hidden), up=matrix(intermediate, hidden), down=matrix(hidden, intermediate),
        ) for _ in range(layers)]
        self.final_norm = norm()
        self.out = matrix(vocab if head == "lm" else 1, hidden, sharpness)
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def decoder(self) -> Decoder:
        """The engine's decoder with these weights."""
        config = self.config
        layers = [LayerWeights(
            torch.tensor(layer["input_norm"]), _pack(layer["q"], layer["k"], layer["v"]), None, None, _pack(layer["o"]),
            torch.tensor(layer["mlp_norm"]), _pack(layer["gate"], layer["up"]), _pack(layer["down"]),
        ) for layer in self.layers]
        cos, sin = rope_tables(config.rope, config.head_dim, config.max_position_embeddings)
        out = _pack(self.out)
        return Decoder(config, _pack(self.embedding), layers, torch.tensor(self.final_norm),
                       out if self.head == "lm" else None, out if self.head == "reward" else None, cos, sin, 64)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Float64 logits [vocab] of the token after `ids`."""
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self._last_row(ids)
        return self._known[key]

    def reward(self, ids: Sequence[int]) -> float:
        """The raw score of `ids`."""
        return float(self.logits(ids)[0])

    def _last_row(self, ids: Sequence[int]) -> np.ndarray:
        config = self.config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        count = len(ids)
        frequencies = 100.0 ** (-np.arange(0, width, 2) / width)
        angles = np.arange(count)[:, None] * frequencies  # [tokens, width / 2]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight

        def rotate(x: np.ndarray) -> np.ndarray:  # [tokens, heads, width], first half against second half
            a, b = x[..., : width // 2], x[..., width // 2 :]
            return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

        x = self.embedding.astype(np.float64)[list(ids)]  # [tokens, hidden]
        for layer in self.layers:
            h = norm(x, layer["input_norm"])
            q = rotate((h @ layer["q"].T.astype(np.float64)).reshape(count, heads, width))
            k = rotate((h @ layer["k"].T.astype(np.float64)).reshape(count, kv_heads, width))
            v = (h @ layer["v"].T.astype(np.float64)).reshape(count, kv_heads, width)
            k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
            scores = np.where(np.tril(np.ones((count, count), dtype=bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(count, -1) @ layer["o"].T.astype(np.float64)
            h = norm(x, layer["mlp_norm"])
            gate = h @ layer["gate"].T.astype(np.float64)
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"].T)) @ layer["down"].T.astype(np.float64)
        return norm(x[-1], self.final_norm) @ self.out.T.astype(np.float64)


class Digits:
    """A tokenizer whose tokens below 10 are digits: text and ids say the same."""

    bos_token = bos_token_id = None
    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The digits."""
        return [int(digit) for digit in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The same without EOS."""
        return "".join(str(token) for token in token_ids if token != EOS)


def toy_pair(vocab: int, seeds: tuple[int, int], *, sharpness: float = 1.5, layers: int = 1, positions: int = 96,
             ) -> tuple[ToyModel, ToyModel]:
    """A language model and a reward model of its vocabulary; `sharpness` is the reward model's."""
    return (ToyModel(vocab, seeds[0], layers=layers, positions=positions),
            ToyModel(vocab, seeds[1], layers=layers, positions=positions, head="reward", sharpness=sharpness))


def toy_engine(model: ToyModel, reward: Any = None, **options: Any) -> Engine:
    """An engine around `model`, judged by `reward`, which may be a ToyModel; small sizes unless told otherwise."""
    settings = dict(cache_tokens=4096, page_size=4, max_num_seqs=16, max_num_lanes=64, max_segment_size=16)
    if isinstance(reward, ToyModel):
        reward = CausalReward(reward.decoder())
    return Engine(model.decoder(), reward, **(settings | options))


def scripted_engine(tokenizer: Any, vocab: int, script: Sequence[int], prompt_tokens: int, reward: Any = None,
                    eos: int = EOS, **options: Any) -> Engine:
    """An engine whose model writes `script` after any prompt of `prompt_tokens` tokens, then EOS."""
    engine = toy_engine(ToyModel(vocab, seed=5, layers=1, eos=(eos,)), reward, tokenizer=tokenizer, **options)
    table = torch.tensor([*script] + [eos] * 80)
    decoder = engine._models.own.passes.decoder
    forward, seen = decoder.forward, []

    def noting(batch, cache, rows=None):
        seen[:] = [batch.positions.clone()]
        return forward(batch, cache, rows)

    def logits(hidden, out=None):
        place = seen[0].long() - (prompt_tokens - 1)  # of the token to come in the response
        drawn = torch.nn.functional.one_hot(table[place], vocab).float() * 100 - 50
        return drawn if out is None else out.copy_(drawn)

    decoder.forward, decoder.logits = noting, logits
    engine._round.drafter._graphs.run = lambda parts, done, times=1: [
        part.call() for _ in range(times) if not bool(done.all()) for part in parts]
    return engine


def table_reward(seed: int = 0, scale: float = 1.0) -> Callable[[Sequence[int]], float]:
    """r(response ids): a sum of a random number for each token at each place, and an offset for the empty response."""
    table = scale * np.random.default_rng(1000 + seed).standard_normal((64, 256))

    def reward(ids: Sequence[int]) -> float:
        return float(0.4 * scale + sum(table[place % 64, token] for place, token in enumerate(ids)))

    return reward


def facts(output: RequestOutput) -> list:
    """What two runs of one request must agree on outside deterministic mode: all but the last bits of log-probabilities
    (rewards are a function of the tokens here)."""
    return [(completion.token_ids, completion.finish_reason, completion.reward,
             [(segment.token_ids, segment.reward, segment.threshold, segment.accepted,
               [attempt._replace(logprob=0.0) for attempt in segment.attempts]) for segment in completion.segments])
            for completion in output.outputs]


def ids(length: int, vocab: int = 5, seed: int = 0) -> list[int]:
    """A random prompt without EOS."""
    return np.random.default_rng(seed).integers(1, vocab, length).tolist()


def _pack(*matrices: np.ndarray) -> kernels.Weight:
    return kernels.pack(torch.tensor(np.concatenate(matrices)))
