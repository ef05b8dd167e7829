"""From a directory in Hugging Face format to a Decoder: everything is checked before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from stars import kernels
from stars.errors import ModelError
from stars.kernels.linear import Weight
from stars.model.adapters import PRODUCTS, AdaptedCheckpoint
from stars.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from stars.model.bases import is_adapter
from stars.model.checkpoint import ITEM_BYTES, Checkpoint
from stars.model.config import ModelConfig, load_config
from stars.model.decoder import Decoder, LayerWeights
from stars.model.families import FAMILIES
from stars.model.files import is_file, printed
from stars.model.head_files import (
    LM_HEAD,
    PLACES,
    SCORE_HEAD,
    VALUE_HEAD_FILE,
    HeadChoice,
    HeadForm,
    find_head,
    has_head,
    head_choice,
    read_head,
)
from stars.model.heads import RewardHead
from stars.model.low_rank import LayerAdapters, LowRank
from stars.model.normalisation import STATISTICS
from stars.model.rope import rope_tables
from stars.model.sharing import once
from stars.model.tokenizer import has_chat_template, tokenizer_directory
from stars.target import target_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MAX_ROWS = 256
DEFAULT_POSITIONS = 1 << 15
NAMED = 3  # tensors an error names before it only counts
KEYS = {
    "embed_tokens": "vocab_size, hidden_size", "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads * head_dim, hidden_size", "k_proj": "num_key_value_heads * head_dim, hidden_size",
    "v_proj": "num_key_value_heads * head_dim, hidden_size", "o_proj": "hidden_size, num_attention_heads * head_dim",
    "gate_proj": "intermediate_size, hidden_size", "up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size", "q_norm": "head_dim", "k_norm": "head_dim",
}
"""What of config.json gives the shape of a layer's weight; that of the others is hidden_size."""

Head = Literal["lm", "reward", "none"]
T = TypeVar("T")


class ModelSummary(NamedTuple):
    """What a model directory holds, from its headers alone."""

    config: ModelConfig
    parameters: int  # a tied head is not counted twice
    bytes: int  # of those parameters, as stored
    shards: tuple[str, ...]
    head: Head
    tied: bool
    missing: list[str]
    unexpected: list[str]
    reward_head: HeadForm | None  # of a reward model; None where it has none that can be read
    tokenizer: bool
    chat_template: bool
    elements: dict[tuple[Path, str], int]  # of its parameters, by file and tensor: what several read is held once
    adapter: AdapterSummary | None = None  # where the directory holds one


class AdapterSummary(NamedTuple):
    """What an adapter puts beside the weights of its base."""

    base: Path
    modules: tuple[str, ...]  # such as "q_proj"
    ranks: tuple[int, ...]  # that there are, rising
    products: int  # of all layers, that have one beside them
    widest: tuple[int, int]  # the largest rank of a product, and the most features
    elements: int  # of its matrices as they are held


def load_model(
    directory: str | Path, *, dtype: str = "auto", device: torch.device | str = "cpu",
    head: Literal["lm", "reward"] = "lm", max_rows: int = DEFAULT_MAX_ROWS, deterministic: bool = False,
    max_model_len: int | None = None, reward_head: Any = "auto",
) -> Decoder:
    """The model in DIRECTORY with the head asked for, its matrices packed one at a time. Of a LoRA adapter it is that
    of its base, whose weights are packed as they are, with the low-rank products beside them.

    "auto" and "float32" keep the checkpoint's values exactly, and on the CPU all arithmetic is float32. "bfloat16"
    rounds the matrices to bfloat16 and, on a CPU that multiplies bfloat16 pairs, the activations of every product with
    them too. Sums, norms, biases, attention, the cache and the reward
    head stay float32. On a GPU matrices, activations, keys and values have the dtype ("auto": the checkpoint's), and
    with `deterministic` products have one order. A reward head whose config.json says `normalize_reward` gives
    (raw - mean) / std; reward_head: which it is, as `stars.CausalReward`'s head. max_model_len: positions that there is
    room for, as many as the model's context has and at most 32768 if left out; `Decoder.reserve_positions` makes more.
    Raises ModelError for whatever does not fit: missing,
    unexpected or misshapen tensors, an absent or ambiguous head, labels of unknown meaning, broken files.
    """
    device = _check_device(device)
    if dtype not in _dtypes(device):
        raise ModelError(f"dtype {dtype!r} is not supported: use one of {', '.join(_dtypes(device))}")
    if head not in ("lm", "reward"):
        raise ModelError(f"head {head!r} is not supported: use 'lm' or 'reward'")
    choice = head_choice(reward_head)
    config = load_config(directory)
    if dtype == "auto":
        dtype = target_of(device.type).dtype or config.dtype
        if dtype not in DTYPES:
            raise ModelError(f"{directory} is stored as {dtype}, which is not supported: choose a dtype")
    checkpoint = open_checkpoint(directory, VALUE_HEAD_FILE if head == "reward" else None)
    config = adapted_config(config, checkpoint)
    names, form = check(checkpoint, config, head, choice)
    reader = _Reader(checkpoint, names, dtype, device, deterministic)
    tied = head == "lm" and config.tie_word_embeddings
    if tied:
        reader.check_tied()
    embedding = reader.matrix("model.embed_tokens")
    layers = [_layer(reader, config, f"model.layers.{index}.") for index in range(config.num_layers)]
    lm_head: Weight | None = None
    score_head: Weight | RewardHead | None = None
    if form is not None:
        score_head = read_head(checkpoint, form, device, deterministic)
    else:
        lm_head = embedding if tied else reader.matrix("lm_head")
    positions = min(config.context_length, max_model_len or DEFAULT_POSITIONS)
    cos, sin = rope_tables(config.rope, config.head_dim, positions, device)
    return Decoder(
        config, embedding, layers, reader.vector("model.norm.weight"), lm_head, score_head, cos, sin, max_rows,
        reader.activations,
    )


def open_checkpoint(directory: str | Path, beside: str | None = None) -> Checkpoint:
    """The tensors of a model directory, or of an adapter and its base; ModelError."""
    directory = Path(directory)
    return AdaptedCheckpoint(directory, beside) if is_adapter(directory) else Checkpoint(directory, beside)


def adapted_config(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The configuration of a base, with the labels of a reward head that its adapter brings."""
    score = checkpoint.tensors.get(SCORE_HEAD)
    brought = isinstance(checkpoint, AdaptedCheckpoint) and score is not None and (
        checkpoint.file_of(SCORE_HEAD).parent == checkpoint.adapter)
    return replace(config, num_labels=score.shape[0]) if brought and score is not None and score.shape else config


def inspect_model(directory: str | Path, head: Head | None = None, reward_head: Any = "auto") -> ModelSummary:
    """What DIRECTORY holds, without reading weights; raises ModelError where config or headers cannot be read.

    head: which it is looked at for; None: whichever it has. reward_head: as `load_model`'s.
    """
    directory = Path(directory)
    config, choice = load_config(directory), head_choice(reward_head)
    checkpoint = open_checkpoint(directory, None if head == "lm" else VALUE_HEAD_FILE)
    config = adapted_config(config, checkpoint)
    if head is None:
        head = "none"
        if choice != HeadChoice() or config.is_reward or has_head(checkpoint):
            head = "reward"
        elif LM_HEAD in checkpoint.tensors or config.tie_word_embeddings or _is_causal(config):
            head = "lm"
    form = None
    if head == "reward":
        try:
            form = find_head(checkpoint, config, choice, _classifier(config))
        except ModelError:  # `check` says it
            pass
    names, missing, unexpected = _match(checkpoint, config, head, form)
    held = {name: checkpoint.tensors[name] for name in names.values() if name in checkpoint.tensors}
    elements = {(checkpoint.file_of(name).resolve(), name): info.size for name, info in held.items()}
    adapter = _adapter_summary(checkpoint, config) if isinstance(checkpoint, AdaptedCheckpoint) else None
    if adapter is not None:
        elements[(directory / ADAPTER_WEIGHTS).resolve(), "low-rank"] = adapter.elements
    return ModelSummary(
        config=config,
        parameters=sum(elements.values()),
        bytes=sum(info.size * ITEM_BYTES.get(info.dtype, 0) for info in held.values()),
        shards=tuple(checkpoint.shards),
        head=head,
        tied=config.tie_word_embeddings,
        missing=missing,
        unexpected=unexpected,
        reward_head=form,
        tokenizer=is_file(tokenizer_directory(directory) / "tokenizer.json"),
        chat_template=has_chat_template(directory),
        elements=elements,
        adapter=adapter,
    )


def _adapter_summary(checkpoint: AdaptedCheckpoint, config: ModelConfig) -> AdapterSummary:
    shapes, pairs = expected_tensors(config, "none"), checkpoint.pairs
    products = []  # ranks and features of each that has an adapter
    elements = 0
    for index in range(config.num_layers):
        for modules in PRODUCTS:
            names = [f"model.layers.{index}.{module}" for module in modules]
            rank = sum(pairs[name].rank for name in names if name in pairs)
            if rank:
                features = sum(shapes[name + ".weight"][0] for name in names)
                products.append((rank, features))
                elements += rank * (features + shapes[names[0] + ".weight"][1])
    named = dict.fromkeys(name.split(".")[-1] for name in pairs)
    return AdapterSummary(checkpoint.directory, tuple(named), tuple(sorted({pair.rank for pair in pairs.values()})),
                          len(products), (max((rank for rank, _ in products), default=0),
                                          max((features for _, features in products), default=0)), elements)


def expected_tensors(config: ModelConfig, head: Head) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this configuration must have, by its full name."""
    hidden, middle = config.hidden_size, config.intermediate_size
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = (
        ("self_attn.q_proj", heads_width, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, heads_width, config.o_bias),
        ("mlp.gate_proj", middle, hidden, config.mlp_bias),
        ("mlp.up_proj", middle, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, middle, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (config.head_dim,)
        for name, rows, columns, bias in matrices:
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}{name}.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if head == "lm" and not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


class _Reader:
    """Takes tensors out of a checkpoint in the form the decoder keeps them in."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], dtype: str, device: torch.device,
                 deterministic: bool):
        self.checkpoint = checkpoint
        self.names = names
        self.device = device
        self.deterministic = deterministic
        float32 = target_of(device.type).float32
        self.rounded = float32 and dtype == "bfloat16"
        self.activations = torch.float32 if float32 else DTYPES[dtype]  # of keys and values, too
        self.kind = None if float32 else self.activations  # of matrices; None: the narrowest that is exact

    def matrix(self, *layers: str) -> Weight:
        """The weights of `layers`, one below the other, packed, with their biases where they have some."""
        names = [layer + ".weight" for layer in layers] + [layer + ".bias" for layer in layers]
        return self._once(names, lambda: self._matrix(*layers))

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias, float32."""
        return self._once([name], lambda: self._read(name).to(self.device, torch.float32, copy=True))

    def low_rank(self, *modules: str) -> LowRank | None:
        """What an adapter adds to the product of `modules`, in the activations' type; None where it adds nothing."""
        if not isinstance(self.checkpoint, AdaptedCheckpoint) or not any(
                module in self.checkpoint.pairs for module in modules):
            return None
        features = [self.checkpoint.tensors[self.names[module + ".weight"]].shape[0] for module in modules]
        pairs = [self.checkpoint.pairs.get(module) for module in modules]
        downs = []
        ups = torch.zeros(sum(features), sum(pair.rank for pair in pairs if pair is not None))
        row = column = 0
        for pair, count in zip(pairs, features, strict=True):
            if pair is not None:
                down, up = self.checkpoint.low_rank(pair)
                downs.append(down)
                ups[row : row + count, column : column + pair.rank] = up
                column += pair.rank
            row += count
        return LowRank(*(kernels.pack(matrix.to(self.device, self.kind), None, self.deterministic)
                         for matrix in (torch.cat(downs), ups)))

    def _once(self, names: Iterable[str], make: Callable[[], T]) -> T:
        """What is made of these tensors of these files, once in a scope of shared weights."""
        held = [name for name in names if name in self.names]
        read = tuple((self.checkpoint.file_of(self.names[name]).resolve(), name) for name in held)
        key: Hashable = (read, self.device, self.kind, self.rounded, self.deterministic)
        return once(key, make)

    def _matrix(self, *layers: str) -> Weight:
        parts = [self._read(layer + ".weight") for layer in layers]
        biases = [self.vector(layer + ".bias") for layer in layers if layer + ".bias" in self.names]
        # bfloat16 is kept as such: it is exact and half the bytes; all else becomes float32, which is exact too
        keep = self.rounded or {part.dtype for part in parts} == {torch.bfloat16}
        kind = self.kind or (torch.bfloat16 if keep else torch.float32)
        rows = sum(part.shape[0] for part in parts)
        joined = torch.empty(rows, parts[0].shape[1], dtype=kind, device=self.device)
        torch.cat([part.to(self.device, kind) for part in parts], out=joined)
        bias = torch.cat(biases) if biases else None
        return kernels.pack(joined, bias, self.deterministic, "bfloat16" if self.rounded else "float32")

    def check_tied(self) -> None:
        """Raises ModelError where the checkpoint has a head of its own although it should be the embedding."""
        if LM_HEAD not in self.checkpoint.tensors:
            return
        if not torch.equal(self.checkpoint.read(LM_HEAD), self._read("model.embed_tokens.weight")):
            raise ModelError(
                f"{self.checkpoint.directory} has tie_word_embeddings but a {LM_HEAD} that differs from the "
                "embeddings: set tie_word_embeddings to false in config.json if that head is wanted, else remove it"
            )

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(self.names[name])


def _layer(reader: _Reader, config: ModelConfig, prefix: str) -> LayerWeights:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return LayerWeights(
        input_norm=reader.vector(prefix + "input_layernorm.weight"),
        qkv=reader.matrix(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        q_norm=reader.vector(attention + "q_norm.weight") if config.qk_norm else None,
        k_norm=reader.vector(attention + "k_norm.weight") if config.qk_norm else None,
        o=reader.matrix(attention + "o_proj"),
        mlp_norm=reader.vector(prefix + "post_attention_layernorm.weight"),
        gate_up=reader.matrix(mlp + "gate_proj", mlp + "up_proj"),
        down=reader.matrix(mlp + "down_proj"),
        adapters=LayerAdapters(*(reader.low_rank(*(prefix + module for module in modules)) for modules in PRODUCTS)),
    )


def check(checkpoint: Checkpoint, config: ModelConfig, head: Head, choice: HeadChoice,
          ) -> tuple[dict[str, str], HeadForm | None]:
    """The checkpoint's name of every expected tensor, and a reward model's head, once all tensors are there with the
    right shape and type; ModelError."""
    where = checkpoint.directory
    prefix = FAMILIES[config.model_type].class_prefix
    if head == "lm" and config.is_reward:
        raise ModelError(
            f"{where} is a reward model ({config.architectures[0]}) and has no language model head: use a checkpoint "
            f"with architectures {prefix}ForCausalLM, or give this one as the reward model"
        )
    form = find_head(checkpoint, config, choice, _classifier(config)) if head == "reward" else None
    names, missing, unexpected = _match(checkpoint, config, head, form)
    held = checkpoint.num_layers
    layers = "" if held == config.num_layers else (f" (num_hidden_layers is {config.num_layers} in config.json, and "
                                                   f"there are tensors of {held} layers)")
    if missing:
        raise ModelError(
            f"{where} lacks {_list(missing)}{layers}: copy the model again, or repair config.json if it is of another "
            "model"
        )
    if unexpected:
        raise ModelError(
            f"{where} has {_list(unexpected)} that a {config.model_type} model with this config.json does not have"
            f"{layers}: "
            "use config.json of the same checkpoint, or a model without them"
        )
    wanted = {name: (shape, _keys(name, shape)) for name, shape in expected_tensors(config, head).items()}
    for name, (shape, keys) in (wanted | (form.tensors if form is not None else {})).items():
        info = checkpoint.tensors[names[name]]
        if info.shape != shape:
            raise ModelError(
                f"{names[name]} of {where} has shape {list(info.shape)} where config.json asks for {list(shape)} "
                f"({keys}): use config.json of the same checkpoint"
            )
        if info.dtype not in ITEM_BYTES:
            raise ModelError(
                f"{names[name]} of {where} is stored as {info.dtype}, which is not supported: "
                "use the float32, bfloat16 or float16 model"
            )
    if isinstance(checkpoint, AdaptedCheckpoint):
        _check_pairs(checkpoint, config)
    return names, form


def _check_pairs(checkpoint: AdaptedCheckpoint, config: ModelConfig) -> None:
    """Raises ModelError unless an adapter's matrices fit the base's."""
    shapes = expected_tensors(config, "none")
    for module, pair in checkpoint.pairs.items():
        shape = shapes.get(module + ".weight")
        if shape != (pair.out_features, pair.in_features):
            found = "no such layer" if shape is None else f"{list(shape)}"
            raise ModelError(
                f"{checkpoint.adapter} has an adapter of {module} for a matrix of "
                f"{[pair.out_features, pair.in_features]} and its base {checkpoint.directory} has {found}: use the "
                "adapter with the base model that it was trained on")


def _keys(name: str, shape: tuple[int, ...]) -> str:
    """What of config.json gives the shape of a tensor."""
    keys = KEYS.get(name.split(".")[-2], "hidden_size")
    return keys.split(",")[0] if len(shape) == 1 else keys


def _match(
    checkpoint: Checkpoint, config: ModelConfig, head: Head, form: HeadForm | None,
) -> tuple[dict[str, str], list[str], list[str]]:
    """(the checkpoint's name by full name, missing tensors, unexpected tensors).

    Checkpoints of the bare model class leave the leading "model." out. Of a reward model, what else there is of heads
    is not unexpected: a language model's, left over from the model it was trained from, another one than was chosen,
    and what was counted in its training.
    """
    held = checkpoint.tensors
    bare = not any(name.startswith("model.") for name in held)
    names = {name: name.removeprefix("model.") if bare else name for name in expected_tensors(config, head)}
    if head == "reward":
        names |= {name: name for name in (form.tensors if form is not None else [SCORE_HEAD])}
    wanted = set(names.values())
    beside = ("lm_head.", "normalizer.", *(f"{place}." for place in PLACES if form is None or not any(
        product.startswith(place) for product in form.products)))
    missing = [name for name in names.values() if name not in held]
    unexpected = [
        name for name in held
        if name not in wanted
        and not name.endswith("rotary_emb.inv_freq")  # a table that old checkpoints carry along
        and not (head == "reward" and (name in STATISTICS or name.startswith(beside)
                                       or name.endswith("num_batches_tracked")))
        and not (name == LM_HEAD and config.tie_word_embeddings)  # compared with the embedding when read
    ]
    return names, missing, unexpected


def _classifier(config: ModelConfig) -> str:
    """The class of transformers' reward models of this family."""
    return f"{FAMILIES[config.model_type].class_prefix}ForSequenceClassification"


def _is_causal(config: ModelConfig) -> bool:
    return any(name.endswith("ForCausalLM") for name in config.architectures)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(map(printed, names[:NAMED]))}{more})"


def _dtypes(device: torch.device) -> tuple[str, ...]:
    return ("auto", *target_of(device.type).dtypes)


def _check_device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {str(device)!r} cannot be used ({reason}): use 'cpu'") from error
