"""Derived sizes: the formulas of `stars.sizes` by hand, and beside what an engine really allocates."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest

import stars
from building import PADDED, config_of, work_as
from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.draft import Drafter
from stars.kernels.graph import LAUNCH_BYTES
from stars.kernels.triton import tuned
from stars.passes import Passes
from stars.reward import CausalReward
from stars.sizes import (
    ModelSizes,
    history_entries,
    language_model,
    later_bytes,
    padded_rows,
    pass_rows,
    reward_model,
    slab_length,
    table_width,
)
from stars.target import CPU, CUDA, target_of
from toy import ToyModel

GIVEN = dict(cache_tokens=1000, page_size=16, max_model_len=250, max_num_seqs=5, max_num_lanes=21, max_segment_size=113)
LM, RM = ToyModel(vocab=37, seed=1, positions=300), ToyModel(vocab=37, seed=2, positions=2000, head="reward")


def test_the_formulas_by_hand():
    config = config_of(**(GIVEN | dict(cache_tokens=1008)))
    assert (config.num_pages, config.num_slabs) == (63, 26)
    drafts = language_model(config)
    assert drafts == ModelSizes(num_slabs=26, slab_len=113, max_sequences=5, max_positions=250, max_lanes=21)
    assert (pass_rows(config, drafts), table_width(config, drafts)) == (256, 16)
    assert history_entries(config, 37) == 5 * 37 and history_entries(config, 5000) == 5 * 250
    scores = reward_model(RM.config, config, 258)
    assert scores == ModelSizes(num_slabs=26, slab_len=258, max_sequences=21, max_positions=1008 + 258, max_lanes=0)
    assert (pass_rows(config, scores), table_width(config, scores)) == (258, 80)
    assert reward_model(LM.config, config, 258).max_positions == 300  # its context is shorter than what the cache holds
    assert slab_length(config, True, 0) == slab_length(config, True, 5) == 258
    assert (slab_length(config, False, 0), slab_length(config, False, 5)) == (114, 119)
    on_gpu = dataclasses.replace(config, target=CUDA)  # where a segment's first row is its first token
    assert (slab_length(on_gpu, False, 0), slab_length(on_gpu, False, 5)) == (113, 118)


@pytest.mark.parametrize("layers", [1, 32, 80])
def test_later_graphs_have_room_for_passes_of_any_model(layers):
    """Unfused ones, by the launches that a decoder and those who run it say: two passes, and two steps of a draft."""
    model = ToyModel(layers=layers, positions=300)
    decoder, config = model.decoder(), config_of(**(GIVEN | dict(cache_tokens=1008)))
    drafter, passes = drafted_and_passed(decoder, config)
    forward = drafter._forward(1, None).launches + drafter._sample(1, True, True, True).launches
    longest = passes._forward(256, 5, None, None, False, False).launches + 1
    for graphs, launches in ((drafter._graphs, forward), (passes._graphs, longest)):
        assert graphs.later_bytes == later_bytes(model.config) == 20 * (layers + 1) << 16
        assert 2 * launches * LAUNCH_BYTES <= graphs.later_bytes


def drafted_and_passed(decoder, config) -> tuple[Drafter, Passes]:
    sizes = language_model(config)
    cache = PagedCache(decoder.config, config, sizes, decoder.dtype)
    return Drafter(decoder, cache, config), Passes(decoder, cache, config, sizes)


def test_pages_of_a_budget_that_is_no_multiple():
    """The budget is rounded up to whole pages, and is the tokens of those from then on."""
    assert config_of(cache_tokens=17, page_size=16).num_pages == 2
    config = EngineConfig.resolve(LM.config, **GIVEN)
    assert (config.cache_tokens, config.num_pages) == (1008, 63)


@pytest.mark.parametrize("target", [CPU, PADDED], ids=["cpu", "padded"])
def test_an_engine_allocates_what_the_formulas_say(monkeypatch, target):
    """Caches, block tables and the buffers of passes and drafts, of both models, idle rows included where padded."""
    work_as(monkeypatch, target)
    engine = stars.Engine(LM.decoder(), CausalReward(RM.decoder()), **GIVEN)
    config, reward, drafter = engine.config, engine.reward, engine._round.drafter
    assert config.target is target
    for passes, cache, sizes in ((engine._models.own.passes, engine._cache, language_model(config)),
                                 (reward._passes, reward.cache,
                                  reward_model(RM.config, config, 113 + target.reward_lag))):
        assert cache.k_pages.shape[1] == config.num_pages * config.page_size == 1008
        assert cache.k_slabs.shape[1] == sizes.num_slabs * sizes.slab_len
        rows, sequences = padded_rows(config, sizes), target.rows(sizes.max_sequences, "draft")
        assert passes._buffers["token_ids"].shape == (rows,) and passes._buffers["last"].shape == (sequences,)
        assert passes._block_tables.shape == (sequences, table_width(config, sizes))
        assert passes.decoder.cos.shape[0] >= sizes.max_positions
        assert passes.decoder.max_rows >= rows
        longest = table_width(config, sizes) * config.page_size
        assert sizes.max_positions <= longest < sizes.max_positions + config.page_size
    lanes = target.rows(config.max_num_lanes, "draft")
    assert lanes == (24 if target.padded else 21) and drafter._logits.shape[0] >= lanes
    assert drafter._buffers["out_tokens"].shape == (lanes, 113)
    assert drafter._block_tables.shape == (lanes, 16)
    assert drafter._history["entries"].shape == (5 * 37, 2)
    assert reward.cache.slab_len == 113 + target.reward_lag
    assert (drafter._tiling is not None) == target.padded == (reward._passes._tiling is not None)


def test_the_targets():
    """Whatever is no CPU is worked as a GPU is; one that is not padded has the rows that are asked for."""
    assert [target_of(name) for name in ("cpu", "cuda", "meta")] == [CPU, CUDA, CUDA]
    assert [CPU.rows(count, "score") for count in (1, 5, 129)] == [1, 5, 129]
    assert [CUDA.rows(count, "draft") for count in (1, 5, 129, 257)] == [1, 8, 160, 384]
    assert [CUDA.rows(count, "score") for count in (1, 129, 511, 513)] == [16, 192, 512, 640]
    assert [CUDA.rows(count, "prefill") for count in (1, 33, 257)] == [32, 64, 384]
    assert CUDA.shapes("draft", 21) == [24, 16, 12, 8, 4, 2, 1]
    assert CUDA.shapes("draft", 300) == [384, 256, 192, 160, 128, 96, 64, 48, 32, 24, 16, 12, 8, 4, 2, 1]
    assert CUDA.shapes("prefill", 2048) == [256, 192, 128, 64, 32]  # longer ones are not captured
    assert CUDA.shapes("score", 258) == [384, 256, 192, 128, 96, 64, 48, 32, 16]
    for target in (CPU, CUDA):
        assert target.captured_prefill <= target.chunk


def test_tables_of_products_end_below_what_is_launched_one_by_one():
    """Products of longer passes are one library's or one tile's, so that none of them is compiled in a round."""
    paths = list(tuned.FOLDER.glob("*.json"))
    for path in paths:
        table = tuned.read(path)
        measured = [rows for part in table for entries in part.values() for rows, _ in entries]
        assert measured and max(measured) < min(CUDA.captured_prefill, CUDA.captured_score)
    assert paths and tuned.MAX_FUSED_ROWS < CUDA.captured_prefill
    for scheme in ("fp8", "int8", "int4-32", "int4-128"):
        assert len({tuned.default("plain", scheme, rows, 4096, 4096, 227) for rows in range(128, 2049, 128)}) == 1


def test_no_room_asks_which_device_it_is_on():
    """It reads the target instead. What is looked for is found where it may stand: where a target is chosen."""
    asks = re.compile(r"""\.is_(cpu|cuda)\b|(==|!=|\bin) \(?["'](cpu|cuda)["']|["'](cpu|cuda)["'] (==|!=)""")
    package = Path(stars.__file__).parent
    rooms = sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "cli")
    asking = {path.relative_to(package).as_posix() for path in rooms if asks.search(path.read_text())}
    assert asking == {"target.py"} and len(rooms) > 40


def test_a_configuration_is_frozen():
    config = EngineConfig.resolve(LM.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 32
    assert config.target is CPU and "Target" not in repr(config)


def test_the_engines_keywords_are_those_of_its_configuration():
    """Spelled out in both signatures: the same names with the same defaults, so that help and editors show them."""
    engine, config = (inspect.signature(function).parameters for function in (stars.Engine, EngineConfig.resolve))
    shared = [name for name in config if name != "model"]
    assert shared == ["device", "dtype", "deterministic", "cache_tokens", "gpu_memory_utilization", "page_size",
                      "max_model_len", "max_num_seqs", "max_num_lanes", "max_segment_size", "prefill_backend",
                      "max_num_batched_tokens", "quantization", "reward_quantization"]
    assert [engine[name].default for name in shared] == [config[name].default for name in shared]
    assert [name for name in engine if name not in shared] == ["model", "reward", "tokenizer", "models", "heads",
                                                               "tracer_provider", "others"]
    assert engine["others"].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(("given", "words"), [
    (dict(max_lanes=3), r"Engine has no parameter 'max_lanes': did you mean max_num_lanes\?"),
    (dict(tensor_parallel_size=2), "Engine.tensor_parallel_size is not implemented: "),
    (dict(frobnicate=math.nan), "Engine has no parameter 'frobnicate': there are model, device, dtype, "),
])
def test_other_keywords_are_only_ever_refused(given, words):
    with pytest.raises(stars.RequestError, match=words):
        stars.Engine(LM.decoder(), **given)
    engine = stars.Engine(LM.decoder(), tensor_parallel_size=1, **GIVEN)
    assert engine.config == EngineConfig.resolve(LM.config, **GIVEN)
