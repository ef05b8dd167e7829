"""What `sizes.needed_bytes` says of a GPU's memory against what caches, buffers and passes really take, built here."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

import stars
from building import PADDED, work_as
from held import bytes_of
from stars.kernels.top_tokens import launches, selection_rows
from stars.model.decoder import Decoder
from stars.model.reader import DTYPES
from stars.reward import CausalReward
from stars.sizes import LIBRARIES, Occupant, needed_bytes
from stars.target import CUDA, ROWS
from toy import ToyModel

POSITIONS = 4096
LM = dict(vocab=1201, seed=1, hidden=40, layers=3, heads=6, kv_heads=2, head_dim=8, intermediate=72,
          positions=POSITIONS)
RM = dict(vocab=1201, seed=2, hidden=24, layers=2, heads=4, kv_heads=4, head_dim=16, intermediate=56,
          positions=POSITIONS, head="reward")
SIZES = {
    "usual": dict(cache_tokens=8192, page_size=16, max_num_seqs=12, max_num_lanes=40, max_segment_size=32),
    "one lane": dict(cache_tokens=4096, page_size=32, max_num_seqs=1, max_num_lanes=1, max_segment_size=1),
    "segments longer than a pass": dict(cache_tokens=4096, page_size=16, max_num_seqs=3, max_num_lanes=5,
                                        max_segment_size=1500),
    "lanes beyond a pass": dict(cache_tokens=4096, page_size=16, max_num_seqs=3, max_num_lanes=2100,
                                max_segment_size=2),
}


def decoder(model: ToyModel, dtype: torch.dtype) -> Decoder:
    """A decoder that has reserved next to nothing, with activations of `dtype`, as a GPU's have."""
    given = model.decoder()
    return Decoder(given.config, given.embedding, given.layers, given.final_norm, given.head, given.score_head,
                   given.cos, given.sin, 1, dtype)


@pytest.fixture
def built(monkeypatch):
    """(engine, its reward, what was said) for sizes; the engine as a GPU's, but in this machine's memory."""
    work_as(monkeypatch, PADDED)

    def build(dtype: str = "float32", deterministic: bool = False, prefill: str = "triton", **sizes):
        monkeypatch.setattr("stars.reward.causal.check_row_invariance", lambda decoder, target: None)
        monkeypatch.setattr("stars.engine.check_row_invariance", lambda decoder, target: None)
        lm, rm = ToyModel(**LM), ToyModel(**RM)
        engine = stars.Engine(decoder(lm, DTYPES[dtype]), CausalReward(decoder(rm, DTYPES[dtype])),
                              deterministic=deterministic, **sizes)
        config = dataclasses.replace(engine.config, device="cuda", dtype=dtype, target=CUDA)
        slab_len = engine.reward.holds(None, lm.config.vocab_size, engine.config).slab_len
        occupants = {"the language model": Occupant(lm.config, DTYPES[dtype], 1000, True, 0, prefill),
                     "the reward model": Occupant(rm.config, DTYPES[dtype], 10, False, slab_len, prefill)}
        return engine, engine.reward, needed_bytes(config, occupants)

    return build


def caches(cache) -> int:
    return sum(tensor.nbytes for tensor in (cache.k_pages, cache.v_pages, cache.k_slabs, cache.v_slabs))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_said_is_what_is_taken(built, sizes, dtype, deterministic):
    """Caches, histories and weights to the byte; of activations nothing is left out, and a hundredth at most too much.
    """
    engine, reward, said = built(dtype, deterministic, **SIZES[sizes])
    assert said["the language model's cache"] == caches(engine._cache)
    assert said["the reward model's cache"] == caches(reward.cache)
    assert said["the language model's weights"] == 1000 and said["the reward model's weights"] == 10
    drafter = engine._round.drafter
    lanes = len(drafter._buffers["done"])
    scored = 16 if sizes == "one lane" else 512  # rows of the longest scoring pass that is captured
    shapes = {"draft": sum(rows <= lanes for rows in ROWS["draft"]) + max(0, lanes - 256) // 128,
              "score": sum(rows <= scored for rows in ROWS["score"]), "prefill": 5}
    passes = {shape: 2 * sum(shapes[kind] for kind in kinds) for shape, kinds in (
        (engine.model_config, ("draft", "prefill")), (reward.decoder.config, ("score", "prefill")))}
    # Of captures that come later, two passes of either model and two steps of a draft.
    later = {engine.model_config: 4, reward.decoder.config: 2}
    ranked = 2 * sum(launches(rows, LM["vocab"]) for rows in {1, min(8, lanes), lanes}) << 16
    shaped = 2 * 3 * shapes["draft"] << 16  # blend, edits and penalties, and without the last
    assert said["captured graphs"] == ranked + shaped + sum(
        (count + later[shape]) * 10 * (shape.num_layers + 1) << 16 for shape, count in passes.items())
    assert said["the words that penalties count"] == drafter._history["entries"].nbytes
    edits = drafter._edits.edits(1)
    assert said["biases, bans and masks"] == sum(
        tensor.nbytes for tensor in (edits.entries, edits.words, edits.masks))
    triton = pytest.importorskip("stars.kernels.triton.sample_step")
    sampler = triton.make_workspace(lanes, LM["vocab"], torch.device("cpu"))
    ranks = importlib.import_module("stars.kernels.triton.top_tokens")
    ranks._scratch.clear()  # of more lanes
    ranking = ranks._scratch_of(min(lanes, selection_rows(LM["vocab"])), LM["vocab"], torch.device("cpu"))
    own = engine._models.own.passes
    lm, rm = own.decoder, reward.decoder
    taken = {
        "the language model": bytes_of(lm._space, lm._logits, lm.cos, lm.sin, own._tiling._workspace,
                                       drafter._tiling._workspace, sampler.values, *ranking),
        "the reward model": bytes_of(rm._space, rm._logits, rm.cos, rm.sin, reward._passes._tiling._workspace),
    }
    for name, real in taken.items():
        assert real <= said[f"{name}'s activations"] <= 1.01 * real, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_librarys_prefill_gathers_is_said(built, dtype):
    """Keys and values of one layer, of as many positions as the cache has at most, in either model."""
    sizes = SIZES["usual"]
    alone, with_library = built(dtype, **sizes)[2], built(dtype, prefill="sdpa", **sizes)[2]
    item = DTYPES[dtype].itemsize
    for name, model in (("the language model", LM), ("the reward model", RM)):
        gathered = 2 * sizes["cache_tokens"] * model["kv_heads"] * model["head_dim"] * item
        assert with_library[f"{name}'s activations"] - alone[f"{name}'s activations"] == gathered


def test_what_is_not_named_is_little(built):
    """Lanes, tables and tiles of an engine of usual sizes and a context of 128k: a fiftieth of what is reserved for
    what nobody names."""
    engine, reward, _ = built(cache_tokens=1 << 12, page_size=16, max_num_seqs=64, max_num_lanes=64,
                              max_segment_size=128)
    own, others, drafter = engine._models.own.passes, reward._passes, engine._round.drafter
    unnamed = [own._buffers, own._rewards, others._buffers, others._rewards, drafter._buffers, engine._cache._moves,
               reward.cache._moves, own._tiling._buffers, others._tiling._buffers, drafter._tiling._buffers]
    tables = [own._block_tables, others._block_tables, drafter._block_tables]
    longer = (128 << 10) // POSITIONS
    assert bytes_of(unnamed) + longer * bytes_of(tables) < LIBRARIES // 50
