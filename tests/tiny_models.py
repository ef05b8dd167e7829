"""Small random checkpoints of every family, written with transformers, for comparison with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a little girl who lived near the forest.",
    "A reward model reads the whole text and gives it one number.",
    "Numbers such as 3, 14 and 1592 appear; so do naïve façades, Größe and 東京 🙂.",
    "def add(left, right):\n    return left + right\n",
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS = 0, 1, 2
MAX_POSITIONS = 128

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] | trim }}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "mscale": 0.8, "mscale_all_dim": 0.4, "beta_fast": 16.0, "beta_slow": 2.0,
    },
    # Of heads of 10, of which 6 dimensions are rotated.
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48,
        "partial_rotary_factor": 0.65, "short_factor": [1.0, 1.25, 1.5], "long_factor": [2.0, 3.5, 7.0],
    },
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.65},
}
BY_TYPE = ("gemma3_text", "olmo3")
"""Families whose layers have rotations of their own by their type."""


@dataclass(frozen=True)
class TinyModel:
    """What to write. The sizes are awkward on purpose: hardly a multiple of a vector's width among them."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2",
                    "olmo3"] = "llama"
    head: Literal["lm", "reward"] = "lm"
    layers: int = 2
    hidden: int = 36
    heads: int = 6
    kv_heads: int = 2
    head_dim: int | None = None  # None leaves hidden / heads = 6
    intermediate: int = 52
    vocab: int = 97  # of a model without a tokenizer
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: str = "default"
    window: int | None = None
    dtype: str = "float32"
    sharded: bool = False
    dialect: Literal["v4", "v5"] = "v5"
    tokenizer: bool = False
    chat_template: bool = False
    tokenizer_seed: int = 0  # another one splits text differently
    labels: int = 1
    seed: int = 0


def write_model(directory: Path, tiny: TinyModel) -> Path:
    """Writes the checkpoint into DIRECTORY, which is created, and returns it."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    vocab = tiny.vocab
    if tiny.tokenizer:
        vocab = write_tokenizer(directory, tiny.tokenizer_seed, CHAT_TEMPLATE if tiny.chat_template else None)
    config = _config(transformers, tiny, vocab)
    prefix = type(config).__name__.removesuffix("Config")
    classifier = {"Gemma3Text": "Gemma3TextForSequenceClassification"}.get(prefix, prefix + "ForSequenceClassification")
    name = prefix.removesuffix("Text") + "ForCausalLM" if tiny.head == "lm" else classifier
    model = getattr(transformers, name)(config)
    _randomise(model, tiny.seed)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(directory, max_shard_size="20KB" if tiny.sharded else "5GB")
    if tiny.dialect == "v4":
        to_v4(directory)
    return directory


def _config(transformers, tiny: TinyModel, vocab: int):
    options: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": tiny.hidden,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "intermediate_size": tiny.intermediate,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": dict(ROPES[tiny.rope]),
        "tie_word_embeddings": tiny.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD if tiny.head == "reward" else None,
        "rms_norm_eps": 1e-5,
    }
    if tiny.head_dim is not None:
        options["head_dim"] = tiny.head_dim
    if tiny.family == "llama":
        options.update(attention_bias=tiny.attention_bias, mlp_bias=tiny.mlp_bias)
    elif tiny.family == "mistral":
        options["sliding_window"] = tiny.window
    elif tiny.family not in ("qwen2", "qwen3"):
        _later_family(options, tiny)
    else:  # sliding layers after the first
        options.update(use_sliding_window=tiny.window is not None, sliding_window=tiny.window, max_window_layers=1)
    if tiny.family == "qwen3":
        options["attention_bias"] = tiny.attention_bias
        options.setdefault("head_dim", tiny.hidden // tiny.heads)
    if tiny.head == "reward":
        options["num_labels"] = tiny.labels
    names = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
             "phi3": "Phi3Config", "gemma": "GemmaConfig", "gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig",
             "smollm3": "SmolLM3Config", "olmo2": "Olmo2Config", "olmo3": "Olmo3Config"}
    return getattr(transformers, names[tiny.family])(**options)


def _later_family(options: dict[str, Any], tiny: TinyModel) -> None:
    """What configurations of these families say besides, with every bound so low that it counts."""
    if tiny.family == "phi3":
        options["sliding_window"] = tiny.window
        options["original_max_position_embeddings"] = 48
        return
    if tiny.family == "olmo2":
        return
    if tiny.family == "smollm3":  # of four layers the last one does not rotate
        options.update(sliding_window=tiny.window, use_sliding_window=tiny.window is not None)
        return
    options["sliding_window"] = tiny.window
    if tiny.family.startswith("gemma"):
        options.setdefault("head_dim", tiny.hidden // tiny.heads)
    else:
        options["attention_bias"] = tiny.attention_bias
    if tiny.family in ("gemma2", "gemma3_text"):
        options["query_pre_attn_scalar"] = 11
    if tiny.family == "gemma2":
        options.update(attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
    if tiny.family == "gemma3_text":
        options["layer_types"] = ["sliding_attention", "full_attention"] * (tiny.layers // 2)
    if tiny.family in BY_TYPE:
        options["rope_parameters"] = {"full_attention": dict(ROPES[tiny.rope]),
                                      "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}


def _randomise(model, seed: int) -> None:
    """Weights large enough that a mistake shows: transformers leaves biases at 0, norms at 1 and the rest near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                around = 0.0 if "Gemma" in type(model).__name__ else 1.0  # Gemma adds 1 itself
                parameter.copy_(around + 0.3 * noise if "norm" in name else 0.5 * noise)
            elif "embed_tokens" in name or "lm_head" in name or "score" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)


def to_v4(directory: Path) -> None:
    """Rewrites config.json to the older dialect: torch_dtype, rope_theta, rope_scaling, no layer_types."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    if config["model_type"] in BY_TYPE:
        sliding, rope = rope["sliding_attention"], rope["full_attention"]
        if config["model_type"] == "gemma3_text":
            config["rope_local_base_freq"] = sliding["rope_theta"]
            config["sliding_window_pattern"] = 2
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if config["model_type"] == "phi3":
        rope.pop("original_max_position_embeddings", None)
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config.pop("layer_types", None)
    config["transformers_version"] = "4.44.0"
    path.write_text(json.dumps(config, indent=2))


def write_tokenizer(directory: Path, seed: int = 0, chat_template: str | None = None) -> int:
    """A byte-level BPE tokenizer that puts <s> in front, and its configuration; returns its vocabulary's size.

    Other seeds train on other sentences, so that merges and ids differ.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + seed, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES[seed:] + SENTENCES[:1], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    return tokenizer.get_vocab_size()
