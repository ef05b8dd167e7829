"""Model directories that are broken or made to harm: one sentence, of this package, soon, and nothing allocated."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import stars
from stars.errors import ModelError, StarsError, TokenizerError
from stars.model.config import load_config
from stars.model.loader import inspect_model, load_model
from stars.model.tokenizer import has_chat_template, load_tokenizer
from test_bad_input import one_sentence
from tiny_models import TinyModel

SECONDS = 10.0  # on a busy machine; each takes some milliseconds

BAD_VALUES = [
    "x", "", "\ud800", "a\nb", [], ["x"], [[]], {}, {"x": 1}, {"": None}, None, True, False, 0, -1, 1, 1.5, 2**31,
    2**63, 10**400, math.nan, math.inf, -math.inf, 1e308, "nested",
]

CONFIG_KEYS = [
    "model_type", "architectures", "hidden_act", "quantization_config", "hidden_size", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "rms_norm_eps",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "id2label", "num_labels", "dtype",
    "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
]
ROPE_KEYS = {
    "linear": ["rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
               "partial_rotary_factor"],
    "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
    "yarn": ["rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
             "mscale", "mscale_all_dim", "truncate"],
}
TOKENIZER_KEYS = [
    "bos_token", "eos_token", "unk_token", "pad_token", "added_tokens_decoder", "extra_special_tokens",
    "additional_special_tokens", "chat_template", "model_max_length", "tokenizer_class",
]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture()
def linked(tiny_model, tmp_path) -> Callable[..., Path]:
    """linked(tiny): a directory of links to that checkpoint, whose files can be replaced."""

    def make(tiny: TinyModel, name: str = "model") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in tiny_model(tiny).iterdir():
            (directory / file.name).symlink_to(file)
        return directory

    return make


def replace(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def bad_values() -> Iterator[object]:
    for value in BAD_VALUES:
        if value == "nested":
            for _ in range(300):
                value = [value]
        yield value


def good_or_refused(call: Callable, *args) -> object:
    """What `call` returns, or None where it raised one of this package's errors; anything else fails the test."""
    begin = time.monotonic()
    try:
        return call(*args)
    except StarsError as error:
        one_sentence(str(error))
        assert len(str(error)) < 1500 and str(error).isprintable()
        return None
    finally:
        assert time.monotonic() - begin < SECONDS


def read(directory: Path) -> None:
    """Everything that is made of a directory, as far as it is taken."""
    if good_or_refused(load_config, directory) is None:
        return
    good_or_refused(inspect_model, directory)
    good_or_refused(load_model, directory)


LLAMA, QWEN = TinyModel("llama"), TinyModel("qwen2", window=5)
REWARD = TinyModel("mistral", "reward", window=6)


@pytest.mark.parametrize("tiny", [LLAMA, QWEN, REWARD], ids=lambda tiny: f"{tiny.family}-{tiny.head}")
def test_every_key_of_config_with_every_bad_value(tiny, linked):
    directory = linked(tiny)
    config = json.loads((directory / "config.json").read_text())
    for key in CONFIG_KEYS:
        for value in bad_values():
            replace(directory / "config.json", json.dumps({**config, key: value}))
            read(directory)
    if tiny.head == "reward":
        for key in ("id2label", "num_labels"):
            for value in bad_values():
                replace(directory / "config.json", json.dumps({**config, "id2label": None, key: value}))
                good_or_refused(lambda: load_model(directory, head="reward"))


@pytest.mark.parametrize("kind", ROPE_KEYS)
def test_every_rope_parameter_with_every_bad_value(kind, linked):
    directory = linked(TinyModel("llama", rope=kind))
    config = json.loads((directory / "config.json").read_text())
    for key in ROPE_KEYS[kind]:
        for value in bad_values():
            rope = {**config["rope_parameters"], key: value}
            replace(directory / "config.json", json.dumps({**config, "rope_parameters": rope}))
            made = good_or_refused(load_model, directory)
            assert made is None or torch.isfinite(made.cos).all()


def test_every_key_of_the_tokenizers_files_with_every_bad_value(linked):
    directory = linked(TinyModel(tokenizer=True, chat_template=False))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for file, keys in (("tokenizer_config.json", TOKENIZER_KEYS), ("special_tokens_map.json", TOKENIZER_KEYS[:7]),
                       ("added_tokens.json", ["<new>", ""]), ("generation_config.json", ["eos_token_id"])):
        start = config if file == "tokenizer_config.json" else {}
        for key in keys:
            for value in bad_values():
                for content in (value, {"content": value}, {"1": {"content": value}}, {"x": {"content": "<y>"}},
                                [{"name": value, "template": value}]):
                    replace(directory / file, json.dumps({**start, key: content}))
                    tokenizer = good_or_refused(load_tokenizer, directory)
                    if tokenizer is not None:
                        good_or_refused(tokenizer.encode, "The dog <new>")
                    good_or_refused(has_chat_template, directory)
        (directory / file).unlink()
        if file == "tokenizer_config.json":
            replace(directory / file, json.dumps(config))


WHOLE_FILES = {
    "empty": b"", "a bracket": b"[", "null": b"null", "a list": b"[]", "a number": b"1", "a text": b'"x"',
    "100,000 brackets": b"[" * 100_000, "100,000 objects": b'{"a":' * 100_000, "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"), "zeros": bytes(100),
    "5,000 digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "a surrogate": b'{"model_type": "\\ud800", "bos_token": "\\udfff"}', "cut short": b'{"a": 1, "b": [1,',
}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "model.safetensors.index.json", "chat_template.jinja")


@pytest.mark.parametrize("file", FILES)
def test_every_file_broken_as_a_whole(file, linked):
    directory = linked(TinyModel(tokenizer=True, chat_template=True, sharded=True))

    def everything() -> None:
        read(directory)
        tokenizer = good_or_refused(load_tokenizer, directory)
        if tokenizer is not None:
            good_or_refused(tokenizer.apply_chat_template, [{"role": "user", "content": "x"}])
        good_or_refused(lambda: stars.Engine(directory, cache_tokens=64))

    whole = directory / file
    good = whole.read_bytes() if whole.exists() else b"{}"
    for content in (*WHOLE_FILES.values(), b"\xef\xbb\xbf" + good):
        replace(whole, content)
        everything()
    whole.unlink()
    whole.mkdir()
    everything()
    whole.rmdir()
    whole.symlink_to(whole)
    everything()


def test_duplicate_keys_count_as_in_transformers(linked, tiny_model):
    """The last one."""
    directory = linked(LLAMA)
    text = (directory / "config.json").read_text()
    replace(directory / "config.json", text.replace("{", '{"hidden_size": "x", ', 1))
    assert load_config(directory) == load_config(tiny_model(LLAMA))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_names_that_the_system_refuses(name):
    with pytest.raises(ModelError, match="is not a directory"):
        load_config(name)


def test_a_loop_of_links_in_a_directorys_place(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ModelError, match="is not a directory"):
        stars.Engine(tmp_path / "loop")


def test_a_rewards_directory_is_read_as_carefully(linked, tiny_model):
    directory = linked(REWARD)
    config = json.loads((directory / "config.json").read_text())
    for key in ("model_type", "architectures", "id2label", "num_hidden_layers"):
        for value in (5, [], "\ud800", 10**7):
            replace(directory / "config.json", json.dumps({**config, key: value}))
            assert good_or_refused(lambda: stars.Engine(tiny_model(LLAMA), directory, cache_tokens=64)) is None or (
                key == "architectures")
    good_or_refused(lambda: stars.Engine(tiny_model(LLAMA), "x" * 300))  # too long for the system


# -- sizes are compared with the files --------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 10**7}, "config.json has num_hidden_layers = 10000000 and the tensors beside it are of 2"),
    ({"num_hidden_layers": 1001}, "config.json has num_hidden_layers = 1001 and the tensors beside it are of 2 layers"),
    ({"num_hidden_layers": 3}, "lacks 9 tensors .*num_hidden_layers is 3 in config.json, and there are tensors of 2"),
    ({"num_hidden_layers": 1}, "has 9 tensors .*num_hidden_layers is 1 in config.json, and there are tensors of 2"),
    ({"vocab_size": 10**9}, r"embed_tokens.weight .* \[97, 36\] .* \[1000000000, 36\] \(vocab_size, hidden_size\)"),
    ({"hidden_size": 2**31 - 2}, r"embed_tokens.weight .* \[97, 36\] .* \(vocab_size, hidden_size\)"),
    ({"intermediate_size": 10**9}, r"gate_proj.weight .* \[52, 36\] .* \(intermediate_size, hidden_size\)"),
    ({"head_dim": 10**8}, r"q_proj.weight .* \[36, 36\] .* \(num_attention_heads \* head_dim, hidden_size\)"),
    ({"num_key_value_heads": 6}, r"k_proj.weight .* \[12, 36\] .* \(num_key_value_heads \* head_dim, hidden_size\)"),
    ({"num_hidden_layers": 2**31}, "num_hidden_layers = 2147483648, beyond the 2147483647 that fit in 32 bits"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings = 2147483648, beyond"),
])
def test_sizes_that_the_tensors_do_not_have(changes, message, linked):
    """Refused before anything is made: rotary tables, windows of layers, lists of names."""
    directory = linked(LLAMA)
    config = json.loads((directory / "config.json").read_text())
    replace(directory / "config.json", json.dumps({**config, **changes}))
    begin = time.monotonic()
    with pytest.raises(ModelError, match=message) as caught:
        stars.Engine(directory)
    assert time.monotonic() - begin < SECONDS
    one_sentence(str(caught.value))


def test_weights_without_layers_are_counted_as_none(linked):
    directory = linked(LLAMA)
    config = json.loads((directory / "config.json").read_text())
    shutil.copy(directory / "config.json", directory / "real.json")
    replace(directory / "config.json", json.dumps({**config, "num_hidden_layers": 5000}))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has neither model.safetensors nor"):
        load_config(directory)


# -- rotary tables ----------------------------------------------------------------------------------------------------


def test_tables_reach_max_model_len_and_no_further(linked):
    """With a context of 100 million positions, too: on both sides, and however the limit is given."""
    lm = linked(LLAMA, "lm")
    rm = linked(TinyModel("llama", "reward"), "rm")
    for directory in (lm, rm):
        config = json.loads((directory / "config.json").read_text())
        replace(directory / "config.json", json.dumps({**config, "max_position_embeddings": 10**8}))
    engine = stars.Engine(lm, rm, cache_tokens=100, max_model_len=70, max_segment_size=9)
    assert engine.config.max_model_len == 70
    assert engine._round.drafter.decoder.cos.shape == (70, 3)
    # 112 tokens of the cache's pages, and a slab behind them: the token before a segment, and a segment
    assert engine.reward.decoder.cos.shape == engine.reward.decoder.sin.shape == (112 + 1 + 9, 3)
    assert engine.reward.max_model_len == 10**8
    engine = stars.Engine(lm, cache_tokens=100)
    assert engine.config.max_model_len == 112 and engine._round.drafter.decoder.cos.shape[0] == 112
    assert load_model(lm).cos.shape[0] == 32768
    with pytest.raises(ModelError, match="200000000 positions exceed the model's context of 100000000"):
        load_model(lm).reserve_positions(2 * 10**8)


def test_tables_grow_with_the_engine_that_needs_them(tiny_model):
    """A decoder that was loaded for few positions serves an engine with many, with the same texts."""
    directory = tiny_model(LLAMA)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    params = stars.SamplingParams(max_tokens=90, ignore_eos=True, temperature=0)

    def text(decoder):
        engine = stars.Engine(decoder, cache_tokens=128)
        return engine.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids

    short = load_model(directory, max_model_len=10)
    assert short.cos.shape[0] == 10
    assert text(short) == text(load_model(directory)) and len(text(short)) == 90
    assert short.cos.shape[0] == 128


def test_no_position_lies_beyond_the_tables(tiny_model, monkeypatch):
    """Requests that fill max_model_len to the last token, run one operation at a time."""
    from stars import kernels
    from stars.kernels.dispatch import references_only

    seen = []
    original = kernels.rope_write

    def watched(qkv, batch, cos, *rest):
        seen.append((int(batch.positions.max()), cos.shape[0]))
        return original(qkv, batch, cos, *rest)

    monkeypatch.setattr(kernels, "rope_write", watched)
    engine = stars.Engine(tiny_model(LLAMA), tiny_model(TinyModel("llama", "reward")), cache_tokens=256,
                          max_model_len=61, max_segment_size=7)
    policy = stars.STARS(segment_size=7, max_attempts=2, reward_threshold=0.0)
    with references_only():
        [output] = engine.generate({"prompt_token_ids": list(range(5, 25))},
                                   stars.SamplingParams(max_tokens=41, ignore_eos=True, seed=1), policy, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 41
    assert seen and all(position < length for position, length in seen)
    # The last token's keys are written too where its candidates share a pass.
    assert max(position for position, length in seen if length == 61) in (59, 60)


# -- stretched rotations ----------------------------------------------------------------------------------------------

STRETCHED = {
    # (rope parameters, max_position_embeddings in the file, context)
    "yarn-unscaled": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 32, 128),
    "yarn-scaled": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 128),
    "yarn-between": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 40, 128),
    "yarn-no-original": ({"rope_type": "yarn", "factor": 4.0}, 32, 128),
    "yarn-no-factor": ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}, 96, 96),
    "yarn-truncate": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
                      32, 128),
    "yarn-attention": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                        "attention_factor": 0.7}, 32, 128),
    "linear": ({"rope_type": "linear", "factor": 2.5}, 32, 80),
    "llama3-unscaled": ({"rope_type": "llama3", "factor": 3.0, "original_max_position_embeddings": 32,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 32, 96),
    "llama3-scaled": ({"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 32,
                       "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 96, 96),
    "default": ({"rope_type": "default"}, 96, 96),
}
WIDE = 24  # head_dim: with a few pairs of dimensions yarn's ramp is as steep with `truncate` as without


@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("dialect", ["v4", "v5"])
def test_stretched_rotations_equal_transformers_up_to_their_context(name, dialect, linked):
    """Greedy texts of the engine, beyond max_position_embeddings where the rotation is made for more, and logits."""
    import transformers

    rope, positions, context = STRETCHED[name]
    directory = linked(TinyModel("llama", head_dim=WIDE))
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = positions
    if dialect == "v5":
        config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    else:
        del config["rope_parameters"]
        config["rope_theta"] = 10000.0
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    replace(directory / "config.json", json.dumps(config))
    assert load_config(directory).context_length == context

    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                                  attn_implementation="eager").eval()
    ids = torch.randint(5, 97, (context - 1,), generator=torch.Generator().manual_seed(3)).tolist()
    engine = stars.Engine(directory, cache_tokens=160)
    assert engine.config.max_model_len == context
    # Prompts of several lengths, each drawn one token further: its log-probability is a row of the logits.
    for length in (positions // 2, positions - 1, context - 1):
        [output] = engine.generate({"prompt_token_ids": ids[:length]},
                                   stars.SamplingParams(max_tokens=1, temperature=0, logprobs=None, ignore_eos=True),
                                   use_tqdm=False)
        with torch.no_grad():
            row = reference(torch.tensor([ids[:length]])).logits[0, -1].log_softmax(-1)
        [token] = output.outputs[0].token_ids
        assert token == int(row.argmax())
        assert output.outputs[0].cumulative_logprob == pytest.approx(float(row[token]), abs=1e-4)
    with pytest.raises(stars.RequestError):
        engine.generate({"prompt_token_ids": ids + [5]}, stars.SamplingParams(max_tokens=1), use_tqdm=False)


def test_truncate_and_attention_factor_change_the_rotation():
    """Each of them differs from plain yarn, so that the test above sees them."""
    from stars.model.rope import parse_rope, rope_tables

    plain = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    tables = {name: rope_tables(parse_rope({"rope_parameters": {**plain, **extra}}, 32, "here"), WIDE, 20)[0]
              for name, extra in (("plain", {}), ("truncate", {"truncate": False}),
                                  ("attention", {"attention_factor": 0.7}))}
    assert (tables["plain"] - tables["truncate"]).abs().max() > 1e-3
    scale = 0.1 * math.log(4) + 1
    assert torch.allclose(tables["attention"] * (scale / 0.7), tables["plain"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention_factor": 0.0}, "rope attention_factor = 0.0 where a positive number"),
    ({"attention_factor": 1e300}, r"rope attention_factor = 1e\+300, too far from 1 to give a rotation"),
    ({"rope_theta": 1.0}, "rope_theta = 1, which yarn cannot stretch"),
    ({"beta_fast": 1e308}, r"rope beta_fast = 1e\+308, too far from 1"),
    ({"factor": 1e-13}, "rope factor = 1e-13, too far from 1"),
    ({"mscale": 1.0, "mscale_all_dim": -10 / math.log(4)}, "rope mscale and mscale_all_dim that cancel out"),
    ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings = 0.5 where a positive integer"),
    ({"factor": 10**400}, "rope factor = 1000.* where a positive number"),
])
def test_yarn_that_gives_no_rotation(changes, message):
    from stars.model.rope import parse_rope

    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(ModelError, match=message):
        parse_rope({"rope_parameters": rope | changes}, 32, "here")


def test_gpu_memory_counts_tables_of_the_lengths_in_use(linked):
    """A context of 100 million positions does not take 2.4 GB of the estimate, as its tables are not made."""
    import dataclasses

    from stars import sizes
    from stars.config import EngineConfig
    from stars.target import CUDA

    summary = inspect_model(linked(LLAMA))
    wide = dataclasses.replace(summary.config, max_position_embeddings=10**8)
    settings = dataclasses.replace(EngineConfig.resolve(summary.config, max_model_len=64), device="cuda",
                                   target=CUDA)
    needed = [sizes.needed_bytes(settings, {"the language model": sizes.Occupant(shape, torch.float32, 1, True)})
              for shape in (summary.config, wide)]
    assert needed[0] == needed[1]
    longer = dataclasses.replace(settings, max_model_len=100)
    grown = sizes.needed_bytes(longer, {"the language model": sizes.Occupant(wide, torch.float32, 1, True)})
    name = "the language model's activations"
    assert grown[name] - needed[0][name] == 36 * 6 * 4  # cosines and sines of 3 pairs, float32
    rewards = [sizes.needed_bytes(settings, {"the reward model": sizes.Occupant(shape, torch.float32, 1, False, 300)})
               for shape in (dataclasses.replace(summary.config, max_position_embeddings=positions)
                             for positions in (1000, 10**6, 10**8))]
    most = settings.cache_tokens + 300
    name = "the reward model's activations"
    assert rewards[1][name] - rewards[0][name] == (most - 1000) * 6 * 4 and rewards[1] == rewards[2]


# -- tokenizer.json ---------------------------------------------------------------------------------------------------


def test_every_part_of_tokenizer_json_with_every_bad_value(linked):
    """The library's own errors, and its panics, come out as TokenizerError: at the load or at the first text."""
    directory = linked(TinyModel(tokenizer=True))
    state = json.loads((directory / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}, {"type": "Prepend", "prepend": "_"}]}
    paths = [path for path in _paths(state) if path[:2] not in (("model", "vocab"), ("model", "merges"))]
    assert len(paths) > 60
    for path in [*paths, ("model", "vocab"), ("model", "merges"), ("model", "merges", 0)]:
        for value in bad_values():
            damaged = json.loads(json.dumps(state))
            place = damaged
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            replace(directory / "tokenizer.json", json.dumps(damaged))
            tokenizer = good_or_refused(load_tokenizer, directory)
            if tokenizer is not None:
                ids = good_or_refused(tokenizer.encode, "The dog, naïve 東京")
                good_or_refused(tokenizer.decode, ids or [5])


def _paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        if path[:1] != ("model",):
            yield from _paths(item, (*path, key))


def test_panics_of_the_library_are_errors():
    """They are BaseExceptions; those of a person or of the system pass through."""
    from stars.model.tokenizer_limits import refusing

    class PanicException(BaseException):
        pass

    with pytest.raises(TokenizerError, match=r"^it fails \(of its own\)$"), refusing("it fails"):
        raise PanicException("of\nits own")
    for passing in (KeyboardInterrupt, SystemExit):
        with pytest.raises(passing), refusing("it fails"):
            raise passing


def test_unreadable_files(linked):
    directory = linked(LLAMA)
    replace(directory / "config.json", "{}")
    os.truncate(directory / "config.json", (1 << 28) + 1)
    with pytest.raises(ModelError, match="has 268435457 bytes where 268435456 are the most"):
        load_config(directory)
