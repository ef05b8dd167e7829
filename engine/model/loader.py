"""From a directory in Hugging Face format or a GGUF file to a Decoder: all is checked before any weight is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from stars.errors import ModelError
from stars.kernels.linear import Weight
from stars.kernels.quant import Rounded
from stars.model.adapters import PRODUCTS, AdaptedCheckpoint
from stars.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from stars.model.auto_dtype import auto_dtype
from stars.model.bases import base_of, is_adapter
from stars.model.checkpoint import Checkpoint
from stars.model.config import ModelConfig, load_config
from stars.model.decoder import Decoder
from stars.model.families import FAMILIES
from stars.model.files import is_file, is_gguf, printed, read_json
from stars.model.gguf_file import GGUFFile
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
from stars.model.loaded import READABLE, LoadedModel, place_of, taken
from stars.model.normalisation import STATISTICS
from stars.model.quantised_config import storage_of
from stars.model.quantised_files import QuantisedCheckpoint
from stars.model.quantization import checked_quantization, rounding
from stars.model.reader import DTYPES, Reader, read_layer
from stars.model.rope import rope_tables
from stars.model.source import TensorInfo, TensorSource
from stars.model.tensors import Head, expected_tensors, keys_of
from stars.model.tokenizer import has_chat_template, has_tokenizer
from stars.target import target_of

logger = logging.getLogger(__name__)
DEFAULT_MAX_ROWS = 256
DEFAULT_POSITIONS = 1 << 15
NAMED = 3  # tensors an error names before it only counts


class ModelSummary(NamedTuple):
    """What a model directory holds, from its headers alone."""

    config: ModelConfig
    parameters: int  # a tied head is not counted twice
    bytes: int  # of those parameters, as stored
    types: dict[str, int]  # how many tensors are stored in each
    shards: tuple[str, ...]
    head: Head
    tied: bool
    missing: list[str]
    unexpected: list[str]
    reward_head: HeadForm | None  # of a reward model; None where it has none that can be read
    tokenizer: bool
    chat_template: bool
    tensors: dict[tuple[Hashable, str], TensorInfo]  # its parameters, by place and name: what several read is held once
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
    directory: str | Path | LoadedModel, *, dtype: str = "auto", device: torch.device | str = "cpu",
    head: Literal["lm", "reward"] = "lm", max_rows: int = DEFAULT_MAX_ROWS, deterministic: bool = False,
    max_model_len: int | None = None, reward_head: Any = "auto", quantization: str | None = None,
) -> Decoder:
    """The model in DIRECTORY, or in a GGUF file, with the head asked for, its matrices packed one at a time. Of a LoRA
    adapter it is that of its base, whose weights are packed as they are, with the low-rank products beside them. In
    place of DIRECTORY a PreTrainedModel of transformers is read from memory, see `Engine.from_transformers`.

    "auto" and "float32" keep the checkpoint's values exactly, and on the CPU all arithmetic is float32. "bfloat16"
    rounds the matrices to bfloat16 and, on a CPU that multiplies bfloat16 pairs, the activations of every product with
    them too; "auto" is that for a checkpoint in bfloat16 where it is measured ahead (`auto_dtype`). Sums, norms,
    biases, attention, the cache and the reward head stay float32. On a GPU matrices, activations, keys and values have
    the dtype ("auto": the checkpoint's), and with `deterministic` products have one order. A reward head whose
    config.json says `normalize_reward` gives (raw - mean) / std; reward_head: which it is, as `stars.CausalReward`'s
    head. max_model_len: positions that there is room for, as many as the model's context has and at most 32768 if left
    out; `Decoder.reserve_positions` makes more. Beyond a longrope
    model's original_max_position_embeddings its long factors are taken, for texts of any length.

    quantization: what matrices are rounded to as they are read, one at a time: "int8", a scale a row; "int4", a scale
    for 32 columns; "fp8", on a GPU, as int8. They are the layers' products and the language model's head; a head that
    is the embedding, too, has int8 in any case. Adapters, norms, biases and reward heads stay as they are. A checkpoint
    that is quantised already is read as it is, and `quantization` left out, or what it is stored as.
    Raises ModelError for whatever does not fit: missing, unexpected or misshapen tensors, an absent or ambiguous head,
    labels of unknown meaning, broken files.
    """
    directory = taken(directory)
    device = _check_device(device)
    if dtype not in _dtypes(device):
        raise ModelError(f"dtype {dtype!r} is not supported: use one of {', '.join(_dtypes(device))}")
    if head not in ("lm", "reward"):
        raise ModelError(f"head {head!r} is not supported: use 'lm' or 'reward'")
    choice = head_choice(reward_head)
    config = load_config(directory).reaching(max_model_len)
    if config.rope.long:
        logger.info("%s takes longrope's long factors, as max_model_len is %d: texts of up to %d tokens, for which "
                    "transformers takes the short ones, get other logits", directory, max_model_len,
                    config.rope.original_max_position_embeddings)
    if dtype == "auto" and not target_of(device.type).float32:
        dtype = config.dtype
        if dtype not in DTYPES:
            raise ModelError(f"{directory} is stored as {dtype}, which is not supported: choose a dtype")
    checkpoint = open_checkpoint(directory, VALUE_HEAD_FILE if head == "reward" else None)
    config = adapted_config(config, checkpoint)
    names, form = check(checkpoint, config, head, choice)
    rounded = _rounding(checkpoint, config, names, quantization, device.type)
    if dtype == "auto":
        quantised = rounded is not None or any(info.quantised for info in checkpoint.tensors.values())
        dtype = auto_dtype(config, deterministic, quantised).dtype
    reader = Reader(checkpoint, names, dtype, device, deterministic, rounded)
    tied = head == "lm" and config.tie_word_embeddings
    if tied:
        reader.check_tied()
    embedding = reader.embedding(config.tie_word_embeddings)
    layers = [read_layer(reader, config, f"model.layers.{index}.") for index in range(config.num_layers)]
    lm_head: Weight | None = None
    score_head: Weight | RewardHead | None = None
    if form is not None:
        score_head = read_head(checkpoint, form, device, deterministic)
    else:
        lm_head = embedding if tied else reader.matrix("lm_head")
    positions = min(config.context_length, max_model_len or DEFAULT_POSITIONS)
    cos, sin = rope_tables(config.rope, config.head_dim, positions, device)
    return Decoder(
        config, embedding, layers, reader.vector("model.norm.weight", config.norm_offset), lm_head, score_head, cos,
        sin, max_rows, reader.activations,
    )


def open_checkpoint(directory: str | Path | LoadedModel, beside: str | None = None) -> TensorSource:
    """The tensors of a model directory, GGUF file or LoadedModel, or of an adapter and its base; ModelError."""
    if isinstance(directory, LoadedModel):
        return directory
    directory = Path(directory)
    if is_adapter(directory):
        return AdaptedCheckpoint(directory, open_checkpoint(base_of(directory), beside))
    if is_gguf(directory):
        return GGUFFile(directory)
    checkpoint, path = Checkpoint(directory, beside), directory / "config.json"
    storage = storage_of(read_json(path), str(path)) if is_file(path) else None
    return checkpoint if storage is None else QuantisedCheckpoint(checkpoint, storage)


def check_rounding(directory: str | Path | LoadedModel, head: Literal["lm", "reward"], reward_head: Any,
                   quantization: str | None, device: str) -> Rounded | None:
    """What `load_model` would round to, without reading weights; ModelError where it would refuse."""
    if quantization is None:
        return None
    checkpoint = open_checkpoint(directory, VALUE_HEAD_FILE if head == "reward" else None)
    config = adapted_config(load_config(directory), checkpoint)
    names, _ = check(checkpoint, config, head, head_choice(reward_head))
    return _rounding(checkpoint, config, names, quantization, device)


def followed(model: Any, quantization: Rounded | None) -> Rounded | None:
    """What a model is rounded to that follows the engine's quantization; a Decoder and a directory whose weights are
    quantised already are left so."""
    if quantization is None or not isinstance(model, READABLE):
        return None
    stored = any(info.quantised for info in open_checkpoint(model).tensors.values())
    return None if stored else quantization


def _rounding(checkpoint: TensorSource, config: ModelConfig, names: dict[str, str], quantization: str | None,
              device: str) -> Rounded | None:
    """What the model's matrices are rounded to; ModelError."""
    value = checked_quantization(quantization, target_of(device), stored=config.quantization)
    matrices = [names[name] for name, shape in expected_tensors(config, "lm").items()
                if len(shape) == 2 and name in names]
    return rounding(checkpoint, matrices, value, config.quantization, config.tie_word_embeddings)


def adapted_config(config: ModelConfig, checkpoint: TensorSource) -> ModelConfig:
    """The configuration of a base, with the labels of a reward head that its adapter brings."""
    score = checkpoint.tensors.get(SCORE_HEAD)
    brought = isinstance(checkpoint, AdaptedCheckpoint) and score is not None and (
        checkpoint.file_of(SCORE_HEAD).parent == checkpoint.adapter)
    return replace(config, num_labels=score.shape[0]) if brought and score is not None and score.shape else config


def inspect_model(directory: str | Path | LoadedModel, head: Head | None = None, reward_head: Any = "auto",
                  ) -> ModelSummary:
    """What DIRECTORY holds, without reading weights; raises ModelError where config or headers cannot be read.

    head: which it is looked at for; None: whichever it has. reward_head: as `load_model`'s.
    """
    place = directory.origin if isinstance(directory, LoadedModel) else Path(directory)
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
    tensors: dict[tuple[Hashable, str], TensorInfo] = {
        (place_of(checkpoint, name), name): info for name, info in held.items()}
    adapter = _adapter_summary(checkpoint, config) if isinstance(checkpoint, AdaptedCheckpoint) else None
    if isinstance(checkpoint, AdaptedCheckpoint) and adapter is not None:
        tensors[(checkpoint.adapter / ADAPTER_WEIGHTS).resolve(), "low-rank"] = TensorInfo((adapter.elements,), "F32",
                                                                                  ADAPTER_WEIGHTS)
    return ModelSummary(
        config=config,
        parameters=sum(info.size for info in tensors.values()),
        bytes=sum(info.nbytes or 0 for info in held.values()),
        types=dict(Counter(info.dtype for info in held.values()).most_common()),
        shards=tuple(checkpoint.shards),
        head=head,
        tied=config.tie_word_embeddings,
        missing=missing,
        unexpected=unexpected,
        reward_head=form,
        tokenizer=place is not None and has_tokenizer(place),
        chat_template=place is not None and has_chat_template(place),
        tensors=tensors,
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


def check(checkpoint: TensorSource, config: ModelConfig, head: Head, choice: HeadChoice,
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
    said, repair = ("its metadata", "use another file") if is_gguf(where) else (
        "config.json", "use config.json of the same checkpoint")
    layers = "" if held == config.num_layers else (f" (num_hidden_layers is {config.num_layers} in {said}, and "
                                                   f"there are tensors of {held} layers)")
    if missing:
        raise ModelError(
            f"{where} lacks {_list(missing)}{layers}: copy the model again, or repair {said} if it is of another "
            "model"
        )
    adapter = checkpoint.adapter if isinstance(checkpoint, AdaptedCheckpoint) else None
    own = [name for name in unexpected if checkpoint.tensors[name].shard == ADAPTER_WEIGHTS]
    if adapter is not None and own:
        raise ModelError(
            f"{adapter} has {_list(own)} that a {config.model_type} model does not have"
            + (": give it as a reward, or use an adapter without them" if head == "lm" else
               ": use an adapter without them"))
    if unexpected:
        raise ModelError(
            f"{where} has {_list(unexpected)} that a {config.model_type} model with this {said.removeprefix('its ')} "
            f"does not have{layers}: {repair}, or a model without them"
        )
    if isinstance(checkpoint, AdaptedCheckpoint):
        _check_pairs(checkpoint, config)
    wanted = {name: (shape, keys_of(name, shape)) for name, shape in expected_tensors(config, head).items()}
    for name, (shape, keys) in (wanted | (form.tensors if form is not None else {})).items():
        info = checkpoint.tensors[names[name]]
        if info.shape != shape and adapter is not None and info.shard == ADAPTER_WEIGHTS:
            raise ModelError(
                f"{names[name]} of {adapter} has shape {list(info.shape)} and its base {where} asks for {list(shape)} "
                f"({keys}): use the adapter with the base model that it was trained on"
            )
        if info.shape != shape:
            raise ModelError(
                f"{names[name]} of {where} has shape {list(info.shape)} where {said} asks for {list(shape)} "
                f"({keys}): {repair}"
            )
        if info.nbytes is None:
            raise ModelError(
                f"{names[name]} of {where} is stored as {info.dtype}, which is not supported: "
                f"use the float32, bfloat16 or float16 model{', or a file in Q4_0 to Q6_K' if is_gguf(where) else ''}"
            )
    return names, form


def _check_pairs(checkpoint: AdaptedCheckpoint, config: ModelConfig) -> None:
    """Raises ModelError unless an adapter's matrices fit the base's."""
    shapes = expected_tensors(config, "none")
    for module, pair in checkpoint.pairs.items():
        shape = shapes.get(module + ".weight")
        if shape != (pair.out_features, pair.in_features):
            found = "no such layer" if shape is None else f"{list(shape)}"
            raise ModelError(
                f"{checkpoint.adapter} has an adapter of {printed(module)} for a matrix of "
                f"{[pair.out_features, pair.in_features]} and its base {checkpoint.directory} has {found}: use the "
                "adapter with the base model that it was trained on")


def _match(
    checkpoint: TensorSource, config: ModelConfig, head: Head, form: HeadForm | None,
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
    family = FAMILIES[config.model_type]
    return f"{family.classifier_prefix or family.class_prefix}ForSequenceClassification"


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
