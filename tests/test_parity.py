"""Logits and rewards equal transformers', however the text got into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from building import cache_of
from stars.bindings import libstars
from stars.cache import BlockTable, CommitMove
from stars.kernels.types import Batch
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from tiny_models import TinyModel

PAGE, SLAB = 4, 8
TOLERANCE = 1e-4  # absolute, with logits of order 1 to 10

MODELS = {
    "llama": TinyModel("llama"),
    "llama-bias-tied": TinyModel("llama", attention_bias=True, mlp_bias=True, tied=True),
    "llama-mha-linear": TinyModel("llama", kv_heads=6, rope="linear"),
    "llama-mqa-llama3": TinyModel("llama", kv_heads=1, rope="llama3", head_dim=10),
    "llama-yarn": TinyModel("llama", rope="yarn"),
    "llama-yarn-mscale": TinyModel("llama", rope="yarn-mscale"),
    "llama-sharded-bfloat16": TinyModel("llama", dtype="bfloat16", sharded=True, rope="theta"),
    "llama-float16-v4": TinyModel("llama", dtype="float16", dialect="v4", rope="llama3"),
    "mistral-window": TinyModel("mistral", window=6, head_dim=8),
    "mistral-full": TinyModel("mistral", tied=True, dialect="v4", rope="theta"),
    "qwen2-tied": TinyModel("qwen2", tied=True),
    "qwen2-window-v4": TinyModel("qwen2", layers=4, window=5, dialect="v4", rope="yarn"),
    "qwen3": TinyModel("qwen3", head_dim=14, rope="theta"),
    "qwen3-bias-window": TinyModel("qwen3", attention_bias=True, window=7, tied=True, kv_heads=3),
    "phi3-longrope": TinyModel("phi3", hidden=60, rope="longrope", window=7),
    "phi3-partial-v4": TinyModel("phi3", hidden=60, rope="partial", dialect="v4"),
    "gemma-v4": TinyModel("gemma", head_dim=10, tied=True, dialect="v4"),
    "gemma2": TinyModel("gemma2", layers=4, head_dim=10, window=6, tied=True),
    "gemma2-bfloat16-v4": TinyModel("gemma2", layers=3, head_dim=10, window=5, dtype="bfloat16", dialect="v4"),
    "gemma3": TinyModel("gemma3_text", layers=4, head_dim=10, window=6, rope="linear", tied=True),
    "gemma3-v4": TinyModel("gemma3_text", head_dim=14, window=5, tied=True, rope="llama3", dialect="v4"),
    "smollm3": TinyModel("smollm3", layers=4, tied=True, rope="theta"),
    "smollm3-window-v4": TinyModel("smollm3", layers=5, window=5, rope="yarn", dialect="v4"),
    "olmo2-v4": TinyModel("olmo2", rope="theta", kv_heads=3, dialect="v4"),
    "olmo3": TinyModel("olmo3", layers=4, window=6, rope="yarn"),
    "olmo3-bias-v4": TinyModel("olmo3", layers=5, window=7, attention_bias=True, rope="yarn", dialect="v4"),
}
REWARD_MODELS = {
    "llama": TinyModel("llama", "reward", rope="llama3"),
    "mistral-window": TinyModel("mistral", "reward", window=6, sharded=True),
    "qwen2-bfloat16": TinyModel("qwen2", "reward", tied=True, dtype="bfloat16"),
    "qwen3-v4": TinyModel("qwen3", "reward", head_dim=14, dialect="v4"),
    "phi3": TinyModel("phi3", "reward", hidden=60, rope="longrope"),
    "gemma": TinyModel("gemma", "reward", head_dim=10),
    "gemma2-v4": TinyModel("gemma2", "reward", head_dim=10, window=6, tied=True, dialect="v4"),
    "gemma3": TinyModel("gemma3_text", "reward", head_dim=10, window=6, tied=True),
    "smollm3-v4": TinyModel("smollm3", "reward", layers=4, dialect="v4"),
    "olmo2": TinyModel("olmo2", "reward"),
    "olmo3-v4": TinyModel("olmo3", "reward", layers=4, window=6, rope="yarn", dialect="v4"),
}


@cache
def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 97, (count,), generator=generator).tolist())


TEXT = tokens(31)


pytestmark = [pytest.mark.threads, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(scope="session")
def reference(tiny_model):
    """reference(tiny, ids): transformers' logits [len(ids), vocab], or its reward [1], in float32."""
    import transformers

    @cache
    def model(tiny: TinyModel):
        kind = "AutoModelForCausalLM" if tiny.head == "lm" else "AutoModelForSequenceClassification"
        kind = getattr(transformers, kind)
        return kind.from_pretrained(tiny_model(tiny), dtype=torch.float32, attn_implementation="eager").eval()

    @cache
    def run(tiny: TinyModel, ids: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return model(tiny)(torch.tensor([ids])).logits[0]

    return run


class Row(NamedTuple):
    """One sequence of a pass in slabs: `ids` go behind what the slab holds already."""

    table: BlockTable
    slab: int
    used: int
    ids: Sequence[int]


class Runner:
    """A decoder and its cache, driven by hand."""

    def __init__(self, directory, head: str = "lm", num_pages: int = 64):
        self.decoder: Decoder = load_model(directory, dtype="float32", head=head, max_rows=64)
        self.cache = cache_of(self.decoder.config, page_size=PAGE, num_pages=num_pages, num_slabs=6, slab_len=SLAB)
        for tensor in (self.cache.k_pages, self.cache.v_pages, self.cache.k_slabs, self.cache.v_slabs):
            tensor.fill_(float("nan"))  # what was never written must never be read

    def open(self, capacity: int = 64) -> BlockTable:
        table = self.cache.open([])
        self.cache.reserve(table, capacity)
        return table

    def prefill(self, table: BlockTable, ids: Sequence[int], rows: Tensor | None = None, score: bool = False) -> Tensor:
        """Writes ids into pages behind what is there: hidden [len(ids), hidden], or rewards of `rows`, a copy."""
        start, stop = table.length, table.length + len(ids)
        slots = ints(self.cache.rows(table, start, stop))
        batch = Batch(ints(ids), ints(range(start, stop)), slots, False, ints([0, len(ids)]), ints([0]),
                      self.cache.block_tables([table]), ints([start]), ints([0]), ints([0]))
        result = self._run(batch, rows, score)
        table.length = stop
        return result

    def draft(self, lanes: Sequence[Row], rows: Tensor | None = None, score: bool = False) -> Tensor:
        """One pass in slabs over ragged lanes; lanes of one table must be adjacent. Hidden or rewards, a copy."""
        groups: list[BlockTable] = []
        group_of, token_ids, positions, slots, row_start = [], [], [], [], [0]
        for lane in lanes:
            if not groups or groups[-1] is not lane.table:
                groups.append(lane.table)
            group_of.append(len(groups) - 1)
            start = lane.table.length + lane.used
            token_ids += lane.ids
            positions += range(start, start + len(lane.ids))
            first = lane.slab * SLAB + lane.used
            slots += range(first, first + len(lane.ids))
            row_start.append(len(token_ids))
        batch = Batch(ints(token_ids), ints(positions), ints(slots), True, ints(row_start), ints(group_of),
                      self.cache.block_tables(groups), ints([lane.table.length for lane in lanes]),
                      ints([lane.slab * SLAB for lane in lanes]), ints([lane.used for lane in lanes]))
        return self._run(batch, rows, score)

    def _run(self, batch: Batch, rows: Tensor | None, score: bool) -> Tensor:
        if not score:
            return self.decoder.forward(batch, self.cache, rows).clone()
        rewards = torch.full((rows.shape[0],), torch.nan)
        self.decoder.score(batch, self.cache, rows, rewards)
        return rewards

    def commit(self, table: BlockTable, slab: int, count: int) -> None:
        self.cache.commit([CommitMove(table, slab * SLAB, count, table.length)])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden).clone()

    def decode(self, table: BlockTable, slab: int, ids: Sequence[int]) -> Tensor:
        """Token by token through one slab, committed whenever it is full and at the end: logits [len(ids), vocab]."""
        rows, used = [], 0
        for token in ids:
            rows.append(self.logits(self.draft([Row(table, slab, used, [token])])))
            used += 1
            if used == SLAB:
                self.commit(table, slab, used)
                used = 0
        self.commit(table, slab, used)
        return torch.cat(rows)


def ints(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def tiny(request) -> TinyModel:
    return request.param


@pytest.fixture(params=REWARD_MODELS.values(), ids=REWARD_MODELS.keys())
def tiny_reward(request) -> TinyModel:
    return request.param


def test_scale_of_the_references(tiny, reference):
    """Logits are of order 1 to 10, so that the tolerance means something."""
    assert 1 < reference(tiny, TEXT).std() < 10
    assert reference(tiny, TEXT).abs().max() < 60


def test_prefill(tiny, tiny_model, reference, operations):
    """All logits of a prompt in one pass, and those of selected rows, in any order and repeated."""
    runner = Runner(tiny_model(tiny))
    expected = reference(tiny, TEXT)
    assert_close(runner.logits(runner.prefill(runner.open(), TEXT)), expected)
    picked = [30, 0, 17, 17]
    hidden = runner.prefill(runner.open(), TEXT, ints(picked))
    assert_close(runner.logits(hidden), expected[picked])


def test_decode_through_slabs(tiny, tiny_model, reference, operations):
    """Token by token behind a prompt, committing every full slab: windows and page boundaries are crossed."""
    runner = Runner(tiny_model(tiny))
    table = runner.open()
    prompt = 6
    runner.prefill(table, TEXT[:prompt])
    assert_close(runner.decode(table, 2, TEXT[prompt:]), reference(tiny, TEXT)[prompt:])
    assert table.length == len(TEXT)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window-v4", "qwen3", "phi3-longrope", "gemma2",
                                  "gemma3", "smollm3-window-v4", "olmo2-v4", "olmo3"])
def test_reject_and_redo(name, tiny_model, reference, operations):
    """After a rejected draft the next one, and all after its commit, are as if it had never been: bit by bit."""
    tiny = MODELS[name]
    prompt, rejected, kept, rest = TEXT[:11], tokens(7, seed=1), tokens(6, seed=2), tokens(9, seed=3)
    expected = reference(tiny, prompt + kept + rest)

    def run(reject: bool) -> Tensor:
        runner = Runner(tiny_model(tiny))
        table = runner.open()
        runner.prefill(table, prompt)
        if reject:
            for used, token in enumerate(rejected):
                runner.draft([Row(table, 3, used, [token])])
        return torch.cat([runner.decode(table, 3, kept), runner.decode(table, 3, rest)])

    redone = run(reject=True)
    assert_close(redone, expected[len(prompt) :])
    assert torch.equal(redone, run(reject=False))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-bias-window", "gemma3", "olmo3"])
def test_lanes_of_several_requests(name, tiny_model, reference, operations):
    """Ragged lanes over two histories in one pass: each sees its own history and slab only."""
    tiny = MODELS[name]
    runner = Runner(tiny_model(tiny))
    first, second = runner.open(), runner.open()
    runner.prefill(first, TEXT[:5])
    runner.prefill(second, TEXT[3:20])
    drafts = [tokens(count, seed=10 + count) for count in (5, 1, 8, 3)]
    tables = [(first, TEXT[:5]), (first, TEXT[:5]), (second, TEXT[3:20]), (second, TEXT[3:20])]
    lanes = [Row(table, slab, 0, ids) for (table, _), slab, ids in zip(tables, (4, 0, 2, 5), drafts)]
    logits = runner.logits(runner.draft(lanes))
    offset = 0
    for (_, prompt), ids in zip(tables, drafts):
        expected = reference(tiny, prompt + ids)[len(prompt) :]
        assert_close(logits[offset : offset + len(ids)], expected)
        offset += len(ids)
    more = [Row(lane.table, lane.slab, len(lane.ids), [9]) for lane in lanes if len(lane.ids) < SLAB]
    expected = [reference(tiny, prompt + ids + (9,))[-1] for (_, prompt), ids in zip(tables, drafts) if len(ids) < SLAB]
    assert_close(runner.logits(runner.draft(more)), torch.stack(expected))


@pytest.mark.parametrize("prompt", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 1, 3 * PAGE, 3 * PAGE + 1])
def test_page_boundaries(prompt, tiny_model, reference, operations):
    """Prompts that end at a page's edge, and drafts committed across one."""
    tiny = MODELS["mistral-window"]
    runner = Runner(tiny_model(tiny))
    table = runner.open()
    assert_close(runner.logits(runner.prefill(table, TEXT[:prompt])), reference(tiny, TEXT)[:prompt])
    for stop in (prompt + 3, prompt + 3 + SLAB, prompt + 4 + SLAB):
        start = table.length
        assert_close(runner.decode(table, 1, TEXT[start:stop]), reference(tiny, TEXT)[start:stop])


@pytest.mark.parametrize("chunk", [1, PAGE, 7, 30])
@pytest.mark.parametrize("name", ["llama-yarn", "qwen3-bias-window"])
def test_chunked_prefill(name, chunk, tiny_model, reference, operations):
    """A prompt in pieces is the prompt in one."""
    tiny = MODELS[name]
    runner = Runner(tiny_model(tiny))
    table = runner.open()
    pieces = [runner.logits(runner.prefill(table, TEXT[i : i + chunk])) for i in range(0, len(TEXT), chunk)]
    assert_close(torch.cat(pieces), reference(tiny, TEXT))


def test_rewards_from_scratch(tiny_reward, tiny_model, reference, operations):
    """The reward of a whole text is transformers' logit at its last token."""
    runner = Runner(tiny_model(tiny_reward), head="reward")
    for count in (1, 7, 31):
        rewards = runner.prefill(runner.open(), TEXT[:count], ints([count - 1]), score=True)
        assert_close(rewards, reference(tiny_reward, TEXT[:count]))


def test_rewards_incremental(tiny_reward, tiny_model, reference, operations):
    """Segments scored in slabs, the winner committed, equal scores from scratch; losers leave no trace."""
    runner = Runner(tiny_model(tiny_reward), head="reward")
    table = runner.open()
    text = TEXT[:9]
    runner.prefill(table, text)
    for segment, counts in enumerate([(8, 3, 5), (1, 8, 8), (4, 2, 7)]):
        candidates = [tokens(count, seed=20 + 10 * segment + lane) for lane, count in enumerate(counts)]
        lanes = [Row(table, lane, 0, ids) for lane, ids in enumerate(candidates)]
        last = ints([sum(counts[: lane + 1]) - 1 for lane in range(3)])
        rewards = runner.draft(lanes, last, score=True)
        assert_close(rewards, torch.cat([reference(tiny_reward, text + ids) for ids in candidates]))
        runner.commit(table, 1, counts[1])
        text += candidates[1]


def test_sharded_equals_single(tiny_model, operations):
    """The same weights in one file and in many give the same bits."""
    single, sharded = (Runner(tiny_model(sharded=sharded)) for sharded in (False, True))
    assert len(list(tiny_model(sharded=True).glob("*.safetensors"))) > 3
    assert torch.equal(*(runner.logits(runner.prefill(runner.open(), TEXT)) for runner in (single, sharded)))


def test_rounded_to_bfloat16(tiny_model, operations):
    """dtype="bfloat16" rounds the matrices and, where bfloat16 pairs are multiplied, what they are multiplied with."""
    import transformers

    directory = tiny_model(MODELS["llama-bias-tied"])
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16().float())
        expected = model(torch.tensor([TEXT])).logits[0]
    runner = Runner(directory)
    exact = runner.logits(runner.prefill(runner.open(), TEXT))
    runner.decoder = load_model(directory, dtype="bfloat16", max_rows=64)
    rounded = runner.logits(runner.prefill(runner.open(), TEXT))
    difference = (expected - exact).abs()  # what rounding the matrices does
    assert difference.max() > 10 * TOLERANCE
    if operations == "libstars" and libstars.isa() == "avx512_bf16":
        # Both factors of a product are rounded to the same relative error: as large a difference again.
        assert 0 < (rounded - expected).abs().mean() < 2 * difference.mean()
    else:
        assert_close(rounded, expected)


def test_buffers_stay_where_they_are(tiny_model, operations):
    """Every pass of a shape reads and writes the same addresses: that is what a recorded pass relies on."""
    runner = Runner(tiny_model(MODELS["llama"]))
    table = runner.open()
    runner.prefill(table, TEXT[:5])
    batch = Batch(ints([7]), ints([5]), ints([0]), True, ints([0, 1]), ints([0]), runner.cache.block_tables([table]),
                  ints([5]), ints([0]), ints([0]))
    addresses = set()
    for _ in range(3):
        hidden = runner.decoder.forward(batch, runner.cache)
        addresses.add((hidden.data_ptr(), runner.decoder.logits(hidden).data_ptr()))
        runner.decoder.reserve(8)  # less than there is: nothing moves
    assert len(addresses) == 1
