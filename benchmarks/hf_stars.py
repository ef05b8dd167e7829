"""STARS written on transformers, as well as its caches allow: the loop that the engine is compared with.

The language model and the reward model each keep a KV cache. A round drafts `width` candidates as one batch over a
prefix that is copied once per accepted segment, and the reward model reads only the new tokens, `rm_lanes` candidates
at a time in attempt order, until one is accepted. Rejected tokens are cropped. Logits are computed for the last
position alone. `no_cache=True` is the published peers' way instead: every token and every score runs the whole text.
`cache="captured"` is the loop at its fastest: static buffers, and on a GPU every step of a draft and every scoring pass
a replayed CUDA graph (`hf_captured.py`).

One request at a time, full attention only, and no EOS: the loop exists to be timed at fixed lengths. Parameters are
read from objects with the fields of `stars.SamplingParams` and `stars.STARS`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from hf_captured import CapturedHistory
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

CacheKind = Literal["dynamic", "preallocated", "captured"]
Draw = Callable[[Tensor, int, int, int], Tensor]
"""(logits [rows, vocab], segment, attempt of row 0, position in the segment) -> token ids [rows]."""


class HFSegment(NamedTuple):
    """A committed segment."""

    token_ids: list[int]
    reward: float
    accepted: bool
    attempts: int  # up to the winner, or all on a fallback


@dataclass
class HFOutput:
    """A response, and what was run for it."""

    token_ids: list[int] = field(default_factory=list)
    segments: list[HFSegment] = field(default_factory=list)
    rounds: int = 0
    attempts_counted: int = 0
    accepted: int = 0
    fallbacks: int = 0
    lm_tokens_drawn: int = 0
    rm_tokens_scored: int = 0
    prompt_seconds: float = 0.0  # of the prompt's passes
    seconds: float = 0.0  # of the tokens alone


def load_pair(model: str, reward: str, dtype: str = "float32"):
    """(language model, reward model) of two directories, ready for inference."""
    kind = getattr(torch, dtype)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=kind, attn_implementation="sdpa").eval()
    rm = AutoModelForSequenceClassification.from_pretrained(reward, dtype=kind, attn_implementation="sdpa").eval()
    return lm, rm


class HFStars:
    """The loop over one pair of transformers models.

    width: candidates drafted at once. rm_lanes: candidates the reward model reads at once. cache: transformers' own
    DynamicCache, which copies the history at every step, or buffers of the final size, which are appended to in place,
    or those read whole under a mask, in captured graphs. Then a loop may be used again and again for prompts and
    responses of one length, and captures once.
    """

    def __init__(self, lm, rm, *, width: int = 8, rm_lanes: int = 2, cache: CacheKind = "preallocated",
                 no_cache: bool = False):
        for model in (lm, rm):
            if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
                raise ValueError(f"{model.config.model_type} has a sliding window, which this loop does not crop")
        self.lm, self.rm = lm, rm
        self.width = width
        self.rm_lanes = min(rm_lanes, width)
        self.cache_kind = cache
        self.no_cache = no_cache
        self._captured: dict = {}  # histories, by model and size

    @torch.inference_mode()
    def generate(self, prompt: list[int], params, policy, *, accept_rate: float | None = None, draw: Draw | None = None,
                 uniform: Callable[[int, int], float] | None = None) -> HFOutput:
        """One response of exactly params.max_tokens tokens.

        accept_rate: accept with this probability whatever the reward says (it is computed all the same), so that two
        loops can be timed over the same number of attempts. draw and uniform(segment, attempt) replace the loop's own
        random numbers.
        """
        begin = time.perf_counter()
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        device = next(self.lm.parameters()).device
        if draw is None:
            draw = _captured_sampler(params) if self.cache_kind == "captured" else _sampler(params, seed, device)
        uniform = uniform if uniform is not None else _uniforms(seed)
        total = params.max_tokens
        lm = self._history(self.lm.model, self.width, len(prompt) + total)
        rm = self._history(self.rm.model, self.rm_lanes, len(prompt) + total)
        ids = torch.tensor([prompt], device=device)  # [1, prompt]
        if len(prompt) > 1:
            lm.extend(ids[:, :-1])
            lm.expand()
        target, alpha = policy.reward_threshold, policy.alpha
        prompt_reward = self._rewards(rm.extend(ids))[0]
        rm.expand()
        start = target if alpha == 1.0 or math.isinf(target) else (1.0 - alpha) * prompt_reward + alpha * target
        if device.type != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        output = HFOutput(prompt_seconds=started - begin)
        last = prompt[-1]
        while len(output.token_ids) < total:
            size = min(policy.segment_size, total - len(output.token_ids))
            length = len(output.token_ids) + size
            tau = target if math.isinf(target) else min(target, start + length / total * (target - start))
            last = self._segment(lm, rm, last, size, tau, params, policy, accept_rate, draw, uniform, output)
        if device.type != "cpu":
            torch.cuda.synchronize()
        output.seconds = time.perf_counter() - started
        return output

    def _segment(self, lm, rm, last: int, size: int, tau: float, params, policy, accept_rate: float | None, draw: Draw,
                 uniform: Callable[[int, int], float], output: HFOutput) -> int:
        """Draws, scores and commits one segment; returns its last token."""
        most = 1 if params.temperature == 0 else policy.max_attempts
        index, tried, best = len(output.segments), 0, (-math.inf, None)
        while tried < most:
            lanes = min(self.width, most - tried)
            drafted = self._draft(lm, last, lanes, size, index, tried + 1, draw)  # [lanes, size]
            output.rounds += 1
            output.lm_tokens_drawn += lanes * size
            for first in range(0, lanes, self.rm_lanes):
                group = drafted[first : first + self.rm_lanes]  # [group, size]
                rm.set_rows(len(group))
                rewards = self._rewards(rm.extend(group))
                output.rm_tokens_scored += group.numel()
                for offset, reward in enumerate(rewards):
                    attempt = tried + first + offset + 1
                    output.attempts_counted += 1
                    u = uniform(index, attempt)
                    if u < accept_rate if accept_rate is not None else _accepts(u, reward, tau, policy.beta):
                        lm.keep(first + offset, size)
                        rm.keep(offset, size)
                        output.accepted += 1
                        return _commit(output, drafted[first + offset], reward, True, attempt)
                    if best[1] is None or reward > best[0]:
                        best = (reward, drafted[first + offset])
                rm.rewind(size)
            lm.rewind(size)
            tried += lanes
        # The best seen is run again rather than kept: its tokens are two short passes, and this is rare.
        reward, tokens = best
        output.fallbacks += 1
        lm.set_rows(1)
        rm.set_rows(1)
        lm.extend(torch.cat([tokens.new_tensor([last]), tokens[:-1]])[None])
        rm.extend(tokens[None])
        lm.keep(0, size)
        rm.keep(0, size)
        return _commit(output, tokens, reward, False, tried)

    def _draft(self, lm, last: int, lanes: int, size: int, segment: int, attempt: int, draw: Draw) -> Tensor:
        """[lanes, size] token ids; the history then holds the inputs, so all of them but the last."""
        lm.set_rows(lanes)
        head = self.lm.lm_head
        if self.cache_kind == "captured" and not self.no_cache:
            return lm.draft(head, last, lanes, size, lambda logits, position: draw(logits, segment, attempt, position))
        token = torch.full((lanes,), last, device=head.weight.device)
        drafted = torch.empty(lanes, size, dtype=torch.int64, device=head.weight.device)
        for position in range(size):
            logits = head(lm.extend(token[:, None])).float()  # [lanes, vocab]
            token = draw(logits, segment, attempt, position)
            drafted[:, position] = token
        return drafted

    def _rewards(self, hidden: Tensor) -> list[float]:
        """Raw rewards of hidden [rows, hidden] at the last tokens."""
        return self.rm.score(hidden)[:, 0].float().tolist()

    def _history(self, backbone, rows: int, capacity: int) -> _Cached | _Recomputed | CapturedHistory:
        if self.no_cache:
            return _Recomputed(backbone, rows)
        if self.cache_kind == "captured":
            key = (id(backbone), rows, capacity)
            if key not in self._captured:
                self._captured[key] = CapturedHistory(backbone, rows, capacity)
            self._captured[key].clear()
            return self._captured[key]
        return _Cached(backbone, rows, capacity, self.cache_kind)


class _Cached:
    """A model and its KV cache: up to `rows` rows that share one history between rounds."""

    def __init__(self, backbone, rows: int, capacity: int, kind: CacheKind):
        self.backbone = backbone
        self.device = next(backbone.parameters()).device
        self.rows = rows
        self.in_place = kind == "preallocated"
        if self.in_place:
            layers = [_PreallocatedLayer(rows, capacity) for _ in range(backbone.config.num_hidden_layers)]
            self.cache = Cache(layers=layers)
        else:
            self.cache = DynamicCache(config=backbone.config)

    def extend(self, ids: Tensor) -> Tensor:
        """Runs ids [rows, n] after the history; hidden state [rows, hidden] of the last one."""
        states = self.backbone(input_ids=ids, past_key_values=self.cache, use_cache=True).last_hidden_state
        return states[:, -1]

    def expand(self) -> None:
        """From one row to all of them."""
        if self.in_place:
            for layer in self.cache.layers:
                layer.spread(0, layer.get_seq_length())
        elif self.rows > 1:
            self.cache.batch_repeat_interleave(self.rows)

    def set_rows(self, rows: int) -> None:
        """The next `extend` brings this many rows; all histories are equal now."""
        current = rows if self.in_place or not self.cache.is_initialized else self.cache.batch_size
        if current != rows:
            self.cache.batch_select_indices(torch.arange(rows, device=self.device) % current)

    def rewind(self, tokens: int) -> None:
        """Forgets the last `tokens` of every row."""
        if not self.in_place and self.cache.get_seq_length() == tokens:
            self.cache = DynamicCache(config=self.backbone.config)  # cropped to nothing, it would keep its old rows
        else:
            self.cache.crop(-tokens)

    def keep(self, row: int, tokens: int) -> None:
        """Row `row`, whose last `tokens` are new, becomes the history of all rows."""
        if self.in_place:
            for layer in self.cache.layers:
                layer.spread(row, tokens)
        elif self.rows > 1:
            self.cache.batch_select_indices(torch.full((self.rows,), row, device=self.device))


class _PreallocatedLayer(DynamicLayer):
    """Keys and values in buffers of the final size; `keys` and `values` are views of the part in use."""

    def __init__(self, rows: int, capacity: int):
        super().__init__()
        self.rows, self.capacity = rows, capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends [rows, heads, n, head_dim] in place."""
        rows, heads, new, dim = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (self.rows, heads, self.capacity, dim)
            self.all_keys, self.all_values = key_states.new_empty(shape), value_states.new_empty(shape)
            start = 0
        else:
            start = self.keys.shape[-2]
        end = start + new
        self.all_keys[:rows, :, start:end] = key_states
        self.all_values[:rows, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:rows, :, :end], self.all_values[:rows, :, :end]
        return self.keys, self.values

    def spread(self, row: int, tokens: int) -> None:
        """Copies the last `tokens` of `row` into the other rows."""
        if self.rows == 1:
            return
        end = self.keys.shape[-2]
        for buffer in (self.all_keys, self.all_values):
            part = buffer[:, :, end - tokens : end]
            part.copy_(part[row : row + 1].clone())


class _Recomputed:
    """The same face over no cache at all: every call runs the whole text of every row."""

    def __init__(self, backbone, rows: int):
        self.backbone = backbone
        self.rows = rows
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=next(backbone.parameters()).device)  # [rows, length]

    def extend(self, ids: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.backbone(input_ids=self.ids, use_cache=False).last_hidden_state[:, -1]

    def expand(self) -> None:
        self.ids = self.ids.expand(self.rows, -1)

    def set_rows(self, rows: int) -> None:
        self.ids = self.ids[:1].expand(rows, -1)

    def rewind(self, tokens: int) -> None:
        self.ids = self.ids[:, :-tokens]

    def keep(self, row: int, tokens: int) -> None:
        self.ids = self.ids[row : row + 1].expand(self.rows, -1)


def _commit(output: HFOutput, tokens: Tensor, reward: float, accepted: bool, attempts: int) -> int:
    token_ids = tokens.tolist()
    output.segments.append(HFSegment(token_ids, reward, accepted, attempts))
    output.token_ids += token_ids
    return token_ids[-1]


def _accepts(uniform: float, reward: float, tau: float, beta: float) -> bool:
    """log u < (reward - tau) / beta; beta 0 is the hard rule; -inf never, and a threshold of +inf admits nothing."""
    if reward == -math.inf or tau == math.inf:
        return False
    if tau == -math.inf:
        return True
    return reward >= tau if beta == 0 else math.log(uniform) < (reward - tau) / beta


def _sampler(params, seed: int, device: torch.device | str = "cpu") -> Draw:
    """Temperature and top-k: the softmax is over the kept logits alone."""
    if params.top_p != 1.0 or params.min_p != 0.0:
        raise ValueError("this loop samples with temperature and top_k only")
    generator = torch.Generator(device).manual_seed(seed & (1 << 63) - 1)
    temperature, top_k = params.temperature, params.top_k

    def draw(logits: Tensor, segment: int, attempt: int, position: int) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=1)
        if not 0 < top_k < logits.shape[1]:
            return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
        values, ids = logits.topk(top_k, dim=1, sorted=False)  # [rows, top_k]
        chosen = torch.multinomial((values / temperature).softmax(dim=1), 1, generator=generator)
        return ids.gather(1, chosen)[:, 0]

    return draw


def _captured_sampler(params) -> Draw:
    """As `_sampler`, by numbers of the device's own generator: nothing that a capture forbids."""
    _sampler(params, 0)  # whose refusals are these, too

    def draw(logits: Tensor, segment: int, attempt: int, position: int) -> Tensor:
        if params.temperature == 0:
            return logits.argmax(dim=1)
        top_k = params.top_k if 0 < params.top_k < logits.shape[1] else 0
        values, ids = logits.topk(top_k, dim=1, sorted=False) if top_k else (logits, None)
        odds = (values / params.temperature).softmax(dim=1)
        chosen = (odds / torch.empty_like(odds).exponential_()).argmax(dim=1, keepdim=True)
        return (chosen if ids is None else ids.gather(1, chosen))[:, 0]

    return draw


def _uniforms(seed: int) -> Callable[[int, int], float]:
    generator = random.Random(seed)

    def uniform(segment: int, attempt: int) -> float:
        return 1.0 - generator.random()  # in (0, 1]

    return uniform
