"""The fused list of operations beside the single ones: by the torch references, against the decoder of the CPU."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from building import as_on_a_gpu, cache_of, fused_up_to
from stars import kernels
from stars.kernels.dispatch import references_only
from stars.kernels.linear import Weight
from stars.kernels.triton import tuned
from stars.model.decoder import Decoder
from stars.model.fusing import fusing, split_bytes
from stars.target import CUDA
from test_parity import PAGE, SLAB, Row, Runner, ints, tokens
from tiny_models import TinyModel
from toy import ToyModel

pytestmark = [pytest.mark.threads, pytest.mark.usefixtures("one_torch_thread")]

MODELS = {  # hidden is a multiple of 32, and nothing else of anything
    "llama-biases-tied": TinyModel("llama", hidden=96, attention_bias=True, mlp_bias=True, tied=True),
    "llama-mqa-llama3": TinyModel("llama", hidden=96, kv_heads=1, rope="llama3", head_dim=10),
    "mistral-window": TinyModel("mistral", hidden=64, window=6, head_dim=8, layers=3),
    "qwen2-window": TinyModel("qwen2", hidden=96, layers=4, window=5, rope="yarn"),
    "qwen3-bias-window-tied": TinyModel("qwen3", hidden=96, head_dim=14, attention_bias=True, window=7, tied=True),
}
REWARDS = {
    "llama": TinyModel("llama", "reward", hidden=96, rope="llama3"),
    "qwen2": TinyModel("qwen2", "reward", hidden=32, heads=4, intermediate=44),
    "qwen3-window": TinyModel("qwen3", "reward", hidden=96, head_dim=14, window=6),
}
SINGLE = ("embedding", "rms_norm", "linear", "rope_write", "swiglu")
FUSED = ("embedding_scaled", "qkv_rope", "linear_residual", "linear_swiglu", "linear_normed")


def dense(weight: Weight) -> Weight:
    """The matrix itself, in float32."""
    return Weight(weight.dense(), weight.bias, weight.out_features, weight.in_features)


class Drafting(Runner):
    """A pass in slabs over all rows is a draft's: logits instead of hidden states."""

    def __init__(self, directory, head: str = "lm", dtype: torch.dtype = torch.float32):
        super().__init__(directory, head)
        self.cache = cache_of(self.decoder.config, page_size=PAGE, num_pages=64, num_slabs=6, slab_len=SLAB,
                              dtype=dtype)
        for tensor in (self.cache.k_pages, self.cache.v_pages, self.cache.k_slabs, self.cache.v_slabs):
            tensor.fill_(torch.nan)

    def _run(self, batch, rows, score):
        if rows is None and batch.into_slab:
            return self.decoder.draft_logits(batch, self.cache).clone()
        return super()._run(batch, rows, score)


def passes(runner: Runner, head: str) -> dict[str, Tensor]:
    """Prefill in two pieces, and ragged lanes over them: what every pass returns, and what is in the cache."""
    ids = tokens(23)
    tables = [runner.open() for _ in range(2)]
    found = {"all rows": runner.prefill(tables[0], ids[:11])}
    found["picked rows"] = runner.prefill(tables[0], ids[11:], rows=ints([11, 4]))
    runner.prefill(tables[1], ids[3:7], rows=ints([3]))
    lanes = [Row(tables[0], 0, 0, ids[:3]), Row(tables[0], 1, 0, ids[5:6]), Row(tables[1], 2, 0, ids[6:11])]
    more = [Row(tables[0], 0, 3, ids[7:8]), Row(tables[1], 2, 5, ids[1:4])]
    last = (ints([2, 3, 8]), ints([0, 3])) if head == "reward" else (None, None)
    for name, given, rows in (("lanes", lanes, last[0]), ("lanes that go on", more, last[1])):
        found[name] = runner.draft(given, rows, score=head == "reward")
    cache = runner.cache
    return found | dict(k_pages=cache.k_pages, v_pages=cache.v_pages, k_slabs=cache.k_slabs, v_slabs=cache.v_slabs)


@pytest.fixture
def called(monkeypatch) -> Counter[str]:
    """How often each operation of a decoder was called."""
    counts: Counter[str] = Counter()

    def counted(name, operation):
        return lambda *given: (counts.update([name]), operation(*given))[1]

    for name in (*SINGLE, *FUSED, "attention", "take_rows", "score"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    return counts


def fused(directory, head: str = "lm", **options) -> tuple[Drafting, tuned.Table]:
    """A runner whose decoder's passes of up to 128 rows are fused under the table."""
    runner = Drafting(directory, head)
    runner.decoder = as_on_a_gpu(runner.decoder, **options)
    return runner, fused_up_to(128, runner.decoder)


@pytest.mark.parametrize("head, name", [("lm", name) for name in MODELS] + [("reward", name) for name in REWARDS])
def test_fused_passes_are_those_of_the_cpu(tiny_model, called, head, name):
    """Hidden states, logits, rewards, keys and values, within float32; and nothing of the other list was called."""
    directory = tiny_model((MODELS if head == "lm" else REWARDS)[name])
    theirs = passes(Drafting(directory, head), head)
    assert not set(called) & set(FUSED)
    called.clear()
    runner, table = fused(directory, head)
    with tuned.using(table), references_only():
        ours = passes(runner, head)
    for what, wanted in theirs.items():
        # float32 sums in another order, of logits and states of order 1 to 10.
        torch.testing.assert_close(ours[what], wanted, rtol=1e-5, atol=1e-4, equal_nan=True)
    layers = runner.decoder.config.num_layers
    drafts = 2 if head == "lm" else 0
    assert called == Counter(
        embedding_scaled=5, qkv_rope=5 * layers, attention=5 * layers, linear_residual=10 * layers,
        linear_swiglu=5 * layers, linear_normed=drafts, rms_norm=3, take_rows=2 * (4 - drafts), score=2 - drafts)


def test_few_rows_are_fused_and_many_are_not(tiny_model, called):
    """By the number of rows alone, over the same weights; a decoder says what it launches."""
    directory = tiny_model(MODELS["llama-biases-tied"])
    runner, _ = fused(directory)
    table, ids = runner.open(), tokens(23)
    layers = runner.decoder.config.num_layers
    with tuned.using(fused_up_to(3, runner.decoder)), references_only():
        runner.prefill(table, ids)
        assert called["rms_norm"] == 2 * layers + 1 and not called["qkv_rope"]
        called.clear()
        got = runner.draft([Row(table, 0, 0, ids[:3])])
        assert called["qkv_rope"] == layers and not called["linear"]
        assert [runner.decoder.launches(rows) for rows in (1, 3, 4)] == [6 * layers + 2] * 2 + [10 * layers + 2]
    with tuned.using(fused_up_to(200, runner.decoder)):
        assert [runner.decoder.launches(rows) for rows in (128, 129)] == [6 * layers + 2, 10 * layers + 2]
    theirs = Drafting(directory)
    table = theirs.open()
    theirs.prefill(table, ids)
    torch.testing.assert_close(got, theirs.draft([Row(table, 0, 0, ids[:3])]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tiny, deterministic", [
    (TinyModel("llama"), False),  # 36 features are no blocks of 32
    (MODELS["qwen2-window"], True),
], ids=["hidden", "deterministic"])
def test_what_is_never_fused(tiny_model, called, tiny, deterministic):
    """A table that names the model changes nothing, and no room is taken."""
    runner = Drafting(tiny_model(tiny))
    config = runner.decoder.config
    shape = tuned.ModelShape(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
                             config.intermediate_size, config.vocab_size)
    with tuned.using(tuned.Table(chains={(shape, "fp32"): ((128, True),)})), references_only():
        runner.decoder = as_on_a_gpu(runner.decoder, deterministic=deterministic)
        passes(runner, "lm")
        assert runner.decoder.launches(1) == 10 * config.num_layers + 2
    assert called["rope_write"] and not set(called) & set(FUSED)
    assert not any(tensor.numel() for tensor in runner.decoder._split)


def test_float16_is_never_fused(called):
    """The residual stream times a norm's weight, not divided by its length yet, can be beyond the largest number."""
    decoder = as_on_a_gpu(ToyModel(hidden=32).decoder(), "fp16")
    assert decoder.dtype == decoder.layers[0].o.values.dtype == torch.float16 and decoder._fusing is None
    assert split_bytes(decoder.config, torch.float16, "int8") == 0 < split_bytes(decoder.config, torch.bfloat16, "int8")


def test_weights_of_another_type_are_never_fused():
    """Neither libstars' packed ones nor wider ones: the kernels take the activations' type."""
    decoder = as_on_a_gpu(ToyModel(hidden=32).decoder())
    assert fusing(decoder.config, torch.float32, decoder._ends()) == decoder._fusing is not None
    assert fusing(decoder.config, torch.bfloat16, decoder._ends()) is None
    assert fusing(decoder.config, torch.float32, ToyModel(hidden=32).decoder()._ends()) is None


def test_fused_passes_in_bfloat16_are_as_exact(tiny_model):
    """Beside the same weights in float32, logits err no more than those of the single operations, or little more."""
    directory = tiny_model(TinyModel("llama", hidden=96, layers=4, vocab=397))
    exact = Drafting(directory)
    given = as_on_a_gpu(exact.decoder, "bf16")
    exact.decoder = as_on_a_gpu(given)  # of the rounded weights
    errors = []
    for rows in (0, 128):
        runner = Drafting(directory, dtype=torch.bfloat16)
        runner.decoder = given
        with tuned.using(fused_up_to(rows, given)), references_only():
            found, wanted = passes(runner, "lm"), passes(exact, "lm")
        assert found["lanes"].dtype == torch.float32
        errors.append(float((found["lanes"] - wanted["lanes"]).square().mean().sqrt()))
    single, fused = errors
    assert 0.005 < single < 0.2 and fused < 1.2 * single, errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4-32", "int4-128"])
def test_quantised_weights_are_those_of_their_matrices(monkeypatch, tiny_model, called, scheme, tied):
    """Few rows fused, without a table, and many not: as the CPU's decoder over the dequantised matrices."""
    directory = tiny_model(TinyModel("llama", hidden=128, heads=4, intermediate=256, tied=tied, attention_bias=True))
    runner, theirs = Drafting(directory), Drafting(directory)
    with references_only():
        ours = runner.decoder = as_on_a_gpu(runner.decoder, scheme)
        assert ours.layers[0].down.quant.name == scheme and (ours.head.quant is None) == tied
        theirs.decoder = as_on_a_gpu(Decoder(
            ours.config, ours.embedding, ours.layers, ours.final_norm, ours.head, None, ours.cos, ours.sin, 64))
        found, wanted = passes(runner, "lm"), passes(theirs, "lm")
        for what, tensor in wanted.items():
            torch.testing.assert_close(found[what], tensor, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert called["linear_swiglu"] == 5 * 2 == called["swiglu"]
        called.clear()
        monkeypatch.setattr(tuned, "MAX_FUSED_ROWS", 4)
        table = runner.open()
        runner.prefill(table, tokens(9))
        assert called["linear"] == 4 * 2 and not called["qkv_rope"]


def test_some_quantised_layers_are_enough_and_a_quantised_head_is_not(tiny_model, called):
    """A library could take neither; but what it takes of a mixed decoder is not worth another list of operations."""
    directory = tiny_model(TinyModel("llama", hidden=128, heads=4, intermediate=256))
    for part in ("down", "head"):
        runner, theirs = Drafting(directory), Drafting(directory)
        quantised, plain = as_on_a_gpu(runner.decoder, "int8"), as_on_a_gpu(runner.decoder)
        layers, head = plain.layers, plain.head
        if part == "head":
            head = quantised.head
        else:
            layers = [mine._replace(down=its.down) for mine, its in zip(layers, quantised.layers, strict=True)]
        with references_only(), patch("stars.model.decoder.target_of", lambda device: CUDA):
            runner.decoder, theirs.decoder = (
                Decoder(plain.config, plain.embedding, given, plain.final_norm, last, None, plain.cos, plain.sin, 64)
                for given, last in ((layers, head), ([one._replace(down=dense(one.down)) for one in layers],
                                                     dense(head))))
            found, wanted = passes(runner, "lm"), passes(theirs, "lm")
        for what, tensor in wanted.items():
            torch.testing.assert_close(found[what], tensor, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert called["qkv_rope"] == (10 if part == "down" else 0)
        called.clear()


def test_the_cpu_is_never_fused_and_takes_no_room(called):
    decoder = ToyModel(hidden=32).decoder()
    assert decoder._fusing is None and not any(tensor.numel() for tensor in decoder._split)


@pytest.mark.parametrize("head", ["lm", "reward"])
@pytest.mark.parametrize("scheme", ["fp32", "fp8", "int4-32"])
def test_the_room_of_fused_passes_is_what_is_said(scheme, head):
    """For as many rows as are fused, to the byte; quantised passes of up to 128 rows are, without a table."""
    model = ToyModel(vocab=1501, hidden=1088, heads=17, kv_heads=1, head_dim=64, intermediate=2048, head=head)
    given = model.decoder()
    alone = as_on_a_gpu(given, scheme)

    def said() -> int:
        return split_bytes(model.config, torch.float32, scheme, head == "reward")

    assert said() == sum(tensor.nbytes for tensor in alone._split) and (said() > 0) == (scheme != "fp32")
    with tuned.using(fused_up_to(5, alone)):
        alone.reserve_fused()
        assert said() == sum(tensor.nbytes for tensor in alone._split) > 0
        assert not bool(alone._split.tickets.any())
