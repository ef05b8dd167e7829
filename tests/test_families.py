"""What families differ in besides logits: longrope's two sets of factors, orders of rows, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import stars
from stars.errors import ModelError
from stars.kernels.quant import QuantWeight, dequantize, quantize
from stars.model.checkpoint import Checkpoint
from stars.model.config import load_config, parse_config
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from stars.model.rope import RopeConfig, head_order, rope_tables
from test_parity import MODELS, REWARD_MODELS, TEXT, Runner, assert_close, ints, tokens
from tiny_models import TinyModel

PHI3 = MODELS["phi3-longrope"]
ORIGINAL = 48  # tokens that its short factors are for
LONG = tokens(61, seed=4)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def transformers_logits(directory: Path, ids: tuple[int, ...]) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                              attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


# -- longrope ---------------------------------------------------------------------------------------------------------


def test_longrope_takes_its_factors_by_the_longest_text(tiny_model, caplog):
    """The short ones unless max_model_len says more; the long ones are said, and are transformers' of long texts."""
    directory = tiny_model(PHI3)
    assert load_config(directory).context_length == ORIGINAL
    with caplog.at_level(logging.INFO, "stars"):
        assert load_model(directory).cos.shape[0] == load_model(directory, max_model_len=ORIGINAL).cos.shape[0] == 48
        assert not caplog.records
        runner = Runner(directory)
        runner.decoder = load_model(directory, max_model_len=ORIGINAL + 1, max_rows=64)
    assert "takes longrope's long factors, as max_model_len is 49" in caplog.text
    assert runner.decoder.config.context_length == 128
    runner.decoder.reserve_positions(64)
    logits = runner.logits(runner.prefill(runner.open(), LONG))
    assert_close(logits, transformers_logits(directory, LONG))
    short = Runner(directory)
    assert (short.logits(short.prefill(short.open(), LONG[:40])) - logits[:40]).abs().max() > 0.1


def test_an_engine_chooses_longrope_by_max_model_len(tiny_model):
    directory = tiny_model(PHI3)
    assert stars.Engine(directory, cache_tokens=128).config.max_model_len == ORIGINAL
    engine = stars.Engine(directory, cache_tokens=128, max_model_len=100)
    assert engine.config.max_model_len == 100
    params = stars.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    [output] = engine.generate({"prompt_token_ids": list(LONG)}, params, use_tqdm=False)
    assert output.outputs[0].token_ids == (int(transformers_logits(directory, LONG)[-1].argmax()),)
    with pytest.raises(stars.RequestError, match="max_model_len is 129, the model's context is 128"):
        stars.Engine(directory, max_model_len=129)


def test_a_reward_of_longrope_reads_texts_of_the_original_length(tiny_model):
    engine = stars.Engine(tiny_model(MODELS["llama"]), tiny_model(REWARD_MODELS["phi3"]), cache_tokens=128)
    assert engine.reward.max_model_len == ORIGINAL and not engine.reward.decoder.config.rope.long


# -- parts of heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "share"), [(10, 0.65), (8, 0.5), (128, 0.75), (6, 1.0)])
def test_the_order_of_a_head_pairs_what_is_rotated(head_dim, share):
    """Pairs (i, i + head_dim / 2) of the order are the pairs of the rotated part, and the others stand still."""
    rope = RopeConfig(partial_rotary_factor=share)
    dim, half = rope.rotary_dim(head_dim), head_dim // 2
    order = head_order(rope, head_dim) or list(range(head_dim))
    assert sorted(order) == list(range(head_dim))
    assert [(order[i], order[i + half]) for i in range(dim // 2)] == [(i, i + dim // 2) for i in range(dim // 2)]
    cos, sin = rope_tables(rope, head_dim, 9)
    assert cos.shape == sin.shape == (9, half)
    assert bool((cos[:, dim // 2 :] == 1).all()) and bool((sin[:, dim // 2 :] == 0).all())
    assert bool((sin[1:, : dim // 2] != 0).all())


def test_rows_of_a_quantised_matrix_are_put_in_order_too(tiny_model, monkeypatch):
    """Logits of a file whose fused matrices are int8 are those of the matrices that they stand for."""
    directory = tiny_model(MODELS["phi3-partial-v4"])
    read = Checkpoint.read

    def logits(dequantised: bool) -> torch.Tensor:
        def quantised(self, name: str) -> torch.Tensor | QuantWeight:
            tensor = read(self, name)
            if "_proj" not in name:
                return tensor
            quant = quantize(tensor, "int8")
            return dequantize(quant) if dequantised else quant

        monkeypatch.setattr(Checkpoint, "read", quantised)
        runner = Runner(directory)
        return runner.logits(runner.prefill(runner.open(), TEXT))

    got, wanted = logits(False), logits(True)
    # A product with int8 rounds its rows to 8 bits or not at all, by the instruction set.
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


# -- layers -----------------------------------------------------------------------------------------------------------


def test_layers_share_the_tables_of_their_rotation(tiny_model):
    """Two bases, and none: as many tables as there are rotations, all of them longer where more positions are asked."""
    gemma3: Decoder = load_model(tiny_model(MODELS["gemma3"]), max_model_len=50)
    assert [cos is gemma3.cos for cos, _ in gemma3._rotations] == [False, True, False, True]
    assert gemma3._rotations[0][0] is gemma3._rotations[2][0]
    gemma3.reserve_positions(90)
    assert {table.shape[0] for pair in gemma3._rotations for table in pair} == {90}
    smollm3 = load_model(tiny_model(MODELS["smollm3"]), max_model_len=50)
    cos, sin = smollm3._rotations[3]
    assert bool((cos == 1).all()) and bool((sin == 0).all()) and smollm3._rotations[2][0] is smollm3.cos


def test_embeddings_are_scaled_as_transformers_rounds_it(tiny_model):
    """To the type that activations have: sqrt(36) is exact, sqrt(10) is not."""
    decoder = load_model(tiny_model(TinyModel("gemma", hidden=10, heads=1, kv_heads=1, head_dim=10, tied=True)))
    assert decoder._embedding_scale == torch.tensor(10**0.5).item()
    half = Decoder(decoder.config, decoder.embedding, decoder.layers, decoder.final_norm, decoder.head, None,
                   decoder.cos, decoder.sin, 1, torch.bfloat16)
    assert half._embedding_scale == 3.15625


def test_what_inspect_says(tiny_model, run):
    code, out, _ = run("inspect", str(tiny_model(MODELS["gemma3"])))
    assert code == 0 and "gemma3_text (Gemma3ForCausalLM)" in out
    assert "linear (theta 10000, factor 2.5); default (theta 300) in 2 of 4 layers" in out
    assert "1 layers 6 tokens, 1 layers full, 1 layers 6 tokens" in out
    code, out, _ = run("inspect", str(tiny_model(PHI3)))
    assert code == 0 and "longrope (theta 10000, short factors up to 48 tokens, 0.65 of each head)" in out
    code, out, _ = run("inspect", str(tiny_model(REWARD_MODELS["gemma3"])))
    assert code == 0 and "Gemma3TextForSequenceClassification" in out and "reward (one row, its logit)" in out


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "activation": ("gemma2", {"hidden_activation": "relu"}, "activation 'relu', which is not supported: use a model "
                   "with one of silu, swish, gelu_pytorch_tanh"),
    "exact gelu": ("gemma3", {"hidden_activation": "gelu"}, "activation 'gelu', which is not supported"),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention, by which tokens see "
                  "those that follow"),
    "softcap": ("gemma2", {"final_logit_softcapping": -30.0}, "final_logit_softcapping = -30.0 where a positive"),
    "attention softcap": ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping = '50' where a positive"),
    "scale": ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 where a positive number"),
    "layer type": ("olmo3", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
                   "layers of type 'chunked_attention'"),
    "layer types": ("gemma2", {"layer_types": ["full_attention"]}, "1 layer_types for 4 layers"),
    "pattern": ("gemma2", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
    "no rope": ("smollm3", {"no_rope_layers": [1, 1]}, r"no_rope_layers = \[1, 1\] where a 1 \(rotated\) or 0"),
    "no rope values": ("smollm3", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers = "),
    "interval": ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    "one rope": ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
                 "one set of rope_parameters where each type of layer needs its own"),
    "ropes": ("gemma2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope parameters of its own for "
              "each layer type"),
    "rope list": ("olmo3", {"rope_parameters": {"full_attention": [1], "sliding_attention": {}}}, "not an object"),
    "part": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.55}},
             r"rotates 5 dimensions of each head \(partial_rotary_factor 0.55 of head_dim 10\)"),
    "share": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}},
              "partial_rotary_factor = 1.5 where a number above 0 and at most 1"),
    "no part": ("olmo2", {"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
    "factors": ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor":
                                             [1.0] * 5}}, "2 numbers in rope short_factor for 5 pairs"),
    "no factors": ("phi3", {"rope_parameters": {"rope_type": "su", "short_factor": [1.0] * 5}},
                   "rope long_factor = None where a list of numbers"),
    "factor": ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4 + [0.0],
                                            "long_factor": [1.0] * 5}}, "rope short_factor = 0.0 where a positive"),
}
BASES = {"gemma2": "gemma2", "gemma3": "gemma3", "olmo2": "olmo2-v4", "olmo3": "olmo3", "smollm3": "smollm3",
         "phi3": "phi3-longrope"}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_that_are_refused(name, tiny_model):
    family, changes, message = REFUSED[name]
    config = json.loads((tiny_model(MODELS[BASES[family]]) / "config.json").read_text())
    assert parse_config(config, {}, "here").model_type.startswith(family)
    with pytest.raises(ModelError, match=message) as caught:
        parse_config(config | changes, {}, "here")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here ")


def test_a_row_of_a_softcapped_head_is_no_reward(tiny_model):
    with pytest.raises(ModelError, match=r"keeps its logits within 5 \(final_logit_softcapping\), which a reward of "):
        load_model(tiny_model(MODELS["gemma2"]), head="reward", reward_head={"tensor": "lm_head", "rows": [0]})


def test_fused_tensors_of_other_shapes_are_named(tiny_model, copied):
    directory = copied(tiny_model(MODELS["phi3-partial-v4"]))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 51}))
    with pytest.raises(ModelError, match=r"gate_up_proj.weight .* \[104, 60\] where config.json asks for \[102, 60\] "
                                         r"\(2 \* intermediate_size, hidden_size\)"):
        load_model(directory)


def test_a_decoder_of_one_row_scores_in_slabs(tiny_model):
    """Rewards of a family with norms behind attention and MLP, from scratch and of the same text in two passes."""
    runner = Runner(tiny_model(REWARD_MODELS["gemma3"]), head="reward")
    whole = runner.prefill(runner.open(), TEXT, ints([30]), score=True)
    table = runner.open()
    runner.prefill(table, TEXT[:20])
    assert_close(runner.prefill(table, TEXT[20:], ints([10]), score=True), whole)
