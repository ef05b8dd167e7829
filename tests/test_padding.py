"""The shapes of a captured graph, run eagerly: idle lanes, rows and sequences must change nothing that anyone reads."""

from __future__ import annotations

import pytest
import torch

from building import PADDED, config_of
from stars.buffers import Buffers
from stars.cache import PagedCache
from stars.draft import Drafter, LaneSpec
from stars.kernels.dispatch import references_only
from stars.kernels.philox import pack_stream
from stars.passes import Passes, Span
from stars.sampling import SamplingParams
from stars.sizes import ModelSizes
from stars.target import CPU, CUDA, ROWS, Target
from toy import ToyModel

PROMPTS = [[1, 2, 3], [4, 1, 1, 2, 3, 4, 2, 1, 3, 4, 4, 1, 2, 2, 3, 1, 4]]


def setting(model: ToyModel, target: Target):
    decoder = model.decoder()
    config = config_of(target, max_num_lanes=16, max_num_seqs=2, max_segment_size=6)
    sizes = ModelSizes(num_slabs=32, slab_len=8, max_sequences=16, max_positions=64, max_lanes=0)
    cache = PagedCache(decoder.config, config, sizes, decoder.dtype)
    # What an idle row might read by mistake must not go unnoticed.
    for tensor in (cache.k_pages, cache.v_pages, cache.k_slabs, cache.v_slabs):
        tensor.fill_(1e4)
    return decoder, cache, Passes(decoder, cache, config, sizes), config


@pytest.mark.parametrize("counts", [(1, 0), (3, 2), (5, 6), (9, 4)])
def test_drafts_with_idle_lanes_are_the_same(counts):
    """Lanes are padded to a bucket: tokens, log-probabilities and slabs of the real ones keep their bits."""
    results = []
    for target in (CPU, PADDED):
        decoder, cache, passes, config = setting(ToyModel(vocab=5, seed=3), target)
        drafter = Drafter(decoder, cache, config)
        tables = [cache.open(prompt[:-1]) for prompt in PROMPTS]
        passes.prefill([(table, prompt, len(prompt) - 1) for table, prompt in zip(tables, PROMPTS, strict=True)])
        lanes = [LaneSpec(tables[which], PROMPTS[which][-1], cache.take_slab(), 2 + attempt % 5, 11, attempt + 1,
                          pack_stream(0, which), SamplingParams(), (0,))
                 for which, count in enumerate(counts) for attempt in range(count)]
        drafts = [drafter.draft(lanes) for _ in range(2)]  # recorded, then replayed
        assert drafts[0] == drafts[1]
        # Whatever idle lanes did, no slab but those of the lanes was written.
        used = torch.zeros(cache.num_slabs * cache.slab_len, dtype=torch.bool)
        for lane in lanes:
            used[lane.slab * cache.slab_len : (lane.slab + 1) * cache.slab_len] = True
        assert cache.k_slabs[:, ~used].eq(1e4).all() and cache.v_slabs[:, ~used].eq(1e4).all()
        results.append((drafts[0], cache.k_slabs[:, used].clone()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("sizes", [(1,), (3, 5), (7, 7, 1, 2, 6)])
def test_scores_with_idle_rows_are_the_same(sizes):
    """Rows and sequences of a scoring pass are padded: rewards keep their bits and pages are left alone."""
    results = []
    for target in (CPU, PADDED):
        _, cache, passes, _ = setting(ToyModel(vocab=5, seed=4, head="reward"), target)
        table = cache.open(PROMPTS[1])
        passes.prefill([(table, PROMPTS[1], len(PROMPTS[1]))])
        pages = cache.k_pages.clone()
        spans = []
        for size in sizes:
            start = cache.take_slab() * cache.slab_len
            ids = [1 + i % 4 for i in range(size)]
            spans.append(Span(table, ids, len(PROMPTS[1]), range(start, start + size)))
        rewards = [passes.score(spans) for _ in range(2)]
        assert rewards[0] == rewards[1]
        assert torch.equal(cache.k_pages, pages)
        results.append(rewards[0])
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["draft", "score", "prefill"])
def test_a_pass_is_padded_to_no_fewer_rows(kind):
    """Rows do not shrink as counts grow, and each is a shape that start-up captures, where it is captured at all."""
    sizes = [CUDA.rows(count, kind) for count in range(1, 700)]
    assert all(size >= count for count, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert [CUDA.rows(size, kind) for size in ROWS[kind]] == list(ROWS[kind])
    for most in (1, 3, 16, 64, 200, 256, 300, 512, 699):
        found = {size for size in sizes[:most] if size <= CUDA.captured(kind)}
        assert CUDA.shapes(kind, most) == sorted(found, reverse=True)


def test_buffers_are_one_memory_on_the_cpu():
    """What the host writes is what the operations read, without a transfer, and fields do not overlap."""
    buffers = Buffers(CPU, a=(torch.int32, (3,)), b=(torch.float32, (2, 2)), c=(torch.int64, (5,)))
    for name, value in (("a", 1), ("b", 2.5), ("c", -1)):
        buffers.host(name)[:] = value
    buffers.upload()
    assert buffers["a"].tolist() == [1] * 3 and buffers["b"].tolist() == [[2.5] * 2] * 2
    assert buffers["c"].tolist() == [-1] * 5 and buffers["c"].dtype == torch.int64
    buffers.fetch()
    buffers.wait()
    assert buffers.host("a").tolist() == [1] * 3


@pytest.mark.parametrize("move", [Buffers.upload, Buffers.fetch])
def test_a_transfer_whose_event_was_not_recorded_is_waited_for(monkeypatch, move):
    """An interrupt may come between the two, and the event would be that of the transfer before."""
    class Event:
        def record(self) -> None:
            raise KeyboardInterrupt

        def synchronize(self) -> None:
            waited.append("event")

    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("device"))
    buffers = Buffers(CPU, a=(torch.int32, (3,)))
    buffers._sent = [Event()]  # as on a device with memory of its own
    with pytest.raises(KeyboardInterrupt):
        move(buffers)
    buffers.wait()
    buffers.wait()
    assert waited == ["device", "event", "event"]


def test_long_prompts_through_a_library_fill_the_same_pages():
    """torch's SDPA in the place of our attention, over ragged prompts and a second chunk; float32 within rounding."""
    prompts = [[1, 2, 3, 4, 1, 2, 3] * 3, [4, 1, 1, 2, 3], [2] * 11, [3, 1] * 9]
    kept = []
    with references_only():  # libstars would record its own operations alone
        for backend in ("triton", "sdpa"):
            _, cache, passes, _ = setting(ToyModel(vocab=5, seed=6), PADDED._replace(chunk=16, captured_prefill=4))
            passes.prefill_backend = backend
            tables = [cache.open(prompt) for prompt in prompts]
            passes.prefill([(table, prompt, len(prompt)) for table, prompt in zip(tables, prompts, strict=True)])
            kept.append([cache.k_pages[:, cache.rows(table, 0, table.length).tolist()] for table in tables])
    for ours, theirs in zip(*kept, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
