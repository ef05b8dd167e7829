"""Models that are one GGUF file: the same numbers, texts and refusals as of a directory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests: pip install gguf==0.19.0")

import stars  # noqa: E402
from gguf_files import K_TYPES, transformers_model, write_gguf  # noqa: E402
from lora import merge, write_adapter  # noqa: E402
from stars.model.config import load_config  # noqa: E402
from stars.model.loader import inspect_model, load_model  # noqa: E402
from stars.model.tokenizer import load_tokenizer  # noqa: E402
from test_loader import logits, reward  # noqa: E402
from tiny_models import TinyModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = TinyModel("llama", hidden=64, heads=4, kv_heads=2, intermediate=96, layers=1)
LARGE = TinyModel("llama", hidden=256, heads=4, kv_heads=2, intermediate=512, layers=1, tied=True)
IDS = (5, 9, 60, 33, 7)  # what test_loader reads logits behind
RELATIVE = 1e-3
"""Of the largest logit. Products of quantised weights may round activations; all else is float32."""


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.fixture(scope="session")
def gguf_model(tiny_model, tmp_path_factory):
    """gguf_model(tiny, kind, kinds): that file, with its twin directory beside it. Treat both as read-only."""
    written: dict[tuple, Path] = {}

    def get(tiny: TinyModel, kind: str = "F32", kinds: tuple[tuple[str, str], ...] = (), **metadata) -> Path:
        key = (tiny, kind, kinds, repr(metadata))
        if key not in written:
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            written[key] = write_gguf(path, tiny_model(tiny), kind, dict(kinds), **metadata)
        return written[key]

    return get


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_TYPES])
def test_every_type_gives_the_logits_of_its_numbers(gguf_model, kind):
    """All matrices of one type, the embedding that is the head among them."""
    path = gguf_model(LARGE if kind in K_TYPES else SMALL, kind)
    close(logits(path), logits(path.with_suffix("")))


@pytest.mark.parametrize(("tiny", "kind", "metadata"), [
    (TinyModel("qwen2", hidden=64, heads=4, kv_heads=1, intermediate=96), "Q8_0", {}),
    (TinyModel("qwen3", hidden=64, heads=4, kv_heads=2, head_dim=24, intermediate=96, tied=True), "Q5_1", {}),
    (TinyModel("qwen3", hidden=64, heads=4, attention_bias=True, intermediate=96, rope="theta"), "F16", {}),
    (TinyModel("llama", attention_bias=True, kv_heads=6, rope="linear"), "F32",
     {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.5}),
    (TinyModel("llama", rope="linear", tied=True), "BF16", {"llama__rope__scale_linear": 2.5}),
    (TinyModel("llama", rope="yarn"), "F32",
     {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0,
      "llama__rope__scaling__original_context_length": 32}),
], ids=["qwen2", "qwen3", "qwen3-bias", "linear", "older-linear", "yarn"])
def test_architectures_and_rotations(gguf_model, tiny, kind, metadata):
    path = gguf_model(tiny, kind, **metadata)
    close(logits(path), logits(path.with_suffix("")))


MIXED = (("q_proj", "Q5_0"), ("v_proj", "Q6_K"), ("k_proj", "F32"), ("up_proj", "Q8_0"), ("embed", "Q6_K"))


def test_types_may_be_mixed_within_a_product(gguf_model):
    """As Q4_K_M has it: q, k and v of three types, gate and up of two."""
    path = gguf_model(LARGE, "Q4_K", MIXED)
    close(logits(path), logits(path.with_suffix("")))
    summary = inspect_model(path)
    assert summary.types == {"Q4_K": 3, "F32": 4, "Q5_0": 1, "Q6_K": 2, "Q8_0": 1}
    shapes = {"Q4_K": 256 * 256 + 2 * 512 * 256, "F32": 128 * 256 + 3 * 256, "Q5_0": 256 * 256,
              "Q6_K": 128 * 256 + 97 * 256, "Q8_0": 512 * 256}
    bits = {"Q4_K": 4.5, "F32": 32, "Q5_0": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
    assert summary.bytes == sum(shapes[kind] * bits[kind] / 8 for kind in shapes)
    assert (summary.head, summary.tied, summary.missing, summary.unexpected) == ("lm", True, [], [])


def test_transformers_reads_the_same_file(gguf_model):
    """Whose own order of rows and names of tensors are, so that the file's writer here proves nothing by itself."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = gguf_model(SMALL, "Q8_0")
    theirs = transformers_model(path)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0, -1:]
    close(logits(path), expected)


def test_a_file_with_a_head_is_a_reward_model(gguf_model):
    """llama.cpp's for ranking; of one row a reward, found without being told."""
    path = gguf_model(TinyModel("qwen3", "reward", hidden=64, heads=4, head_dim=16, intermediate=96), "Q8_0",
                      (("score", "F16"),))
    ours, expected = reward(path), reward(path.with_suffix(""))
    assert (ours - expected).abs() <= RELATIVE * expected.abs().clamp_min(1)
    assert inspect_model(path).head == "reward"
    with pytest.raises(stars.ModelError, match="is a reward model .Qwen3ForSequenceClassification. and has no language"):
        load_model(path)


def test_an_adapter_over_a_file(gguf_model, tmp_path):
    """The low-rank products lie beside quantised weights, which are held once."""
    path = gguf_model(SMALL, "Q4_1")
    adapter = write_adapter(tmp_path / "adapter", path.with_suffix(""), named=str(path))
    merged = merge(adapter, path.with_suffix(""), tmp_path / "merged")
    close(logits(adapter), logits(merged))
    assert inspect_model(adapter).adapter.base == path
    other = gguf_model(LARGE, "Q4_K")
    wrong = write_adapter(tmp_path / "wrong", path.with_suffix(""), named=str(other))
    with pytest.raises(stars.ModelError, match=r"has an adapter of .*down_proj for a matrix of \[64, 96\] and its "
                                               r"base .*model.gguf has \[256, 512\]: use the adapter with the base"):
        load_model(wrong)


WORDS = TinyModel("llama", hidden=64, heads=4, kv_heads=2, intermediate=96, layers=1, tokenizer=True,
                  chat_template=True)


def test_an_engine_of_one_file(gguf_model, tmp_path):
    """Weights, tokenizer and template: texts are those of the directory, greedy and guided; any name will do."""
    path = gguf_model(WORDS)
    file = tmp_path / "sha256-0123"
    file.write_bytes(path.read_bytes())
    params = stars.SamplingParams(temperature=0, max_tokens=9)
    texts = []
    for model in (path, file, path.with_suffix("")):
        engine = stars.Engine(model, reward=lambda prompt, responses: [float(len(one)) for one in responses])
        plain = engine.generate("The dog", params)[0].outputs[0].token_ids
        chat = engine.generate({"messages": [{"role": "user", "content": "Once"}]}, params)[0].outputs[0].token_ids
        aligned = engine.generate("A", stars.SamplingParams(max_tokens=8, seed=3), policy=stars.CARDS(reward_threshold=9.0))[0].outputs[0]
        texts.append((plain, chat, aligned.token_ids, aligned.reward))
    assert texts[0] == texts[1] == texts[2]


def test_inspect_says_what_a_file_holds(gguf_model, run):
    code, out, _ = run("inspect", str(gguf_model(WORDS, "Q4_0")))
    assert code == 0
    assert "as 8 Q4_0, 3 F32)" in out.replace("9 Q4_0", "8 Q4_0")
    assert "chat template   yes" in out and "tokenizer       yes" in out and "loads           yes" in out


def test_tokens_that_end_a_turn_end_a_text(gguf_model):
    """eos, eot, and control tokens that are known to do so."""
    path = gguf_model(WORDS, tokenizer__ggml__eot_token_id=3)
    assert load_config(path).eos_token_ids == (2, 3)
    tokens = load_tokenizer(path)._backend.get_vocab()
    names = ["<|im_end|>" if index == 4 else token for token, index in sorted(tokens.items(), key=lambda one: one[1])]
    assert load_config(gguf_model(WORDS, tokenizer__ggml__tokens=names)).eos_token_ids == (2, 4)
