"""Encoder reward models from a directory, through transformers: loaded without running or unpickling anything of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from stars.errors import ModelError, RewardError, TokenizerError, text_of
from stars.model.checkpoint import Checkpoint
from stars.model.config import refuse_pairwise
from stars.model.files import is_file, read_json, shown
from stars.model.tokenizer_limits import check_encoder, check_file, is_failure

MAX_SHARED_LAYERS = 256
"""Layers a model may have although its files hold fewer tensors: some models use one layer's weights for all."""
MAX_LISTED = 1 << 20
"""The largest number in a list of a configuration, or the longest side of a tensor: transformers repeats things by such
numbers."""
VOCABULARIES = ("tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*bpe.codes", "dict.txt",
                "tekken.json")
"""Files that a tokenizer is read from; without any, transformers makes one up that knows no word."""
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
"""What transformers' models call a table with a row for each position."""
SAFE = {"local_files_only": True, "trust_remote_code": False}


def load_encoder(directory: Path, device: str) -> tuple[Any, Any, Checkpoint]:
    """(model on `device` in float32, tokenizer, the checkpoint's headers).

    RewardError without transformers; TokenizerError for a tokenizer that is missing, or that could take a text without
    bound. ModelError of one sentence for whatever else cannot be loaded, for code of the directory's own, for pickles,
    adapters, missing heads and sizes that its files do not bear out.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json: give the path of a model in Hugging Face format")
    if (directory / "adapter_config.json").is_file():
        raise ModelError(f"{directory} holds an adapter, not a model: merge it into its base model and save that")
    try:
        import transformers
    except ImportError:
        raise RewardError("encoder reward models need transformers: pip install 'stars-engine[hf]'") from None
    checkpoint = Checkpoint(directory)
    settings = read_json(directory / "config.json")
    refuse_pairwise(settings, str(directory / "config.json"))
    _check_sizes(settings, checkpoint)
    _check_tokenizer_files(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **SAFE)
        _check_layers(config, checkpoint)
        # Implementations that a configuration names can be programs, downloaded and run.
        config._attn_implementation = config._experts_implementation = None
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **SAFE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **SAFE)
    except ModelError:
        raise
    except BaseException as error:  # transformers and what it calls raise what they like for a file they do not expect
        if not is_failure(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(f"{directory} needs code of its own, which is never run: use a model of a type that "
                             "transformers has itself") from error
        raise ModelError(f"{directory} cannot be loaded by transformers ({one_line(error)}): use a sequence "
                         "classification model of a type that transformers has itself, saved by save_pretrained with "
                         "its tokenizer") from error
    _check_tokenizer(tokenizer, directory)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{directory} lacks the tensors {', '.join(missing[:4])}: use a checkpoint with a trained "
                         "reward head")
    try:
        return model.eval().to(device), tokenizer, checkpoint
    except RuntimeError as error:
        raise ModelError(f"{directory} cannot be moved to {device} ({one_line(error)}): use a smaller reward model, "
                         "or another device") from error


def context_length(model: Any, tokenizer: Any) -> int:
    """The most tokens of one text: what configuration and tokenizer say, and no more than its positions have rows."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in model.named_modules():
        rows = getattr(module, "num_embeddings", None)
        if rows is None or name.rpartition(".")[2] not in POSITION_TABLES:
            continue
        # RoBERTa and its kin count from the row after that of padding, BART and its kin from row `offset`.
        padding = getattr(module, "padding_idx", None)
        limits.append(rows - getattr(module, "offset", 0) - (0 if padding is None else padding + 1))
    numbers = [limit for limit in limits if isinstance(limit, (int, float)) and limit > 0]
    return int(min([*numbers, 1 << 30]))


def num_embeddings(model: Any) -> float:
    """Rows of the token embeddings: ids from there on cannot be looked up; infinite where a model has no table."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    except NotImplementedError:
        return math.inf


def choose_padding(model: Any, tokenizer: Any) -> int | None:
    """The token that fills up short texts, told to the model; None where there is none, and texts go one by one.

    Models that read their reward at the last token find it by this id.
    """
    config = model.config.get_text_config()
    for token in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None)):
        if isinstance(token, int) and 0 <= token < num_embeddings(model):
            model.config.pad_token_id = config.pad_token_id = token
            return token
    return None


def one_line(error: BaseException) -> str:
    """What an exception says, short enough for a sentence."""
    text = text_of(error)
    return f"{type(error).__name__}: {text[:200].rstrip(' .:')}" if text else type(error).__name__


def _check_layers(config: Any, checkpoint: Checkpoint) -> None:
    """transformers builds every layer that a configuration asks for before it reads a weight."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(len(checkpoint.tensors), MAX_SHARED_LAYERS):
        raise ModelError(f"config.json of {checkpoint.directory} asks for {layers} layers and its files hold "
                         f"{len(checkpoint.tensors)} tensors: use config.json of the same checkpoint")


def _check_sizes(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """transformers makes lists as long as a configuration says while it reads it: of labels, of layers, of patterns."""
    longest = max((side for info in checkpoint.tensors.values() for side in info.shape), default=1)
    layers = max(len(checkpoint.tensors), MAX_SHARED_LAYERS)
    stack: list[tuple[str, Any, bool]] = [("", config, False)]
    while stack:
        name, value, listed = stack.pop()
        if isinstance(value, dict):
            stack.extend((str(key), part, False) for key, part in value.items())
        elif isinstance(value, list):
            stack.extend((name, part, True) for part in value)
        elif isinstance(value, int):
            most = max(longest, MAX_LISTED) if listed else longest if name == "num_labels" else (
                layers if name.endswith(("layers", "layer", "blocks")) else None)
            if most is not None and value > most:
                raise ModelError(f"config.json of {checkpoint.directory} has {shown(value)} in {shown(name)} and its "
                                 f"files' tensors allow {most}: use config.json of the same checkpoint")


def _check_tokenizer_files(directory: Path) -> None:
    """Before transformers reads them: whatever it may take for a tokenizer.json."""
    if not any(is_file(path) for name in VOCABULARIES for path in directory.glob(name)):
        raise TokenizerError(f"{directory} has no file of a tokenizer, so the reward model cannot be given text: add "
                             "tokenizer.json")
    path = directory / "tokenizer_config.json"
    config = read_json(path) if is_file(path) else {}
    files = config.get("fast_tokenizer_files")
    names = ["tokenizer.json", config.get("tokenizer_file"), *(files if isinstance(files, list) else ())]
    for name in names:
        for path in (directory / name, Path(name)) if isinstance(name, str) else ():
            if is_file(path):
                check_file(path, encoder=True)


def _check_tokenizer(tokenizer: Any, directory: Path) -> None:
    """The tokenizer that transformers made of the files, which need not be tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        check_encoder(backend, f"the tokenizer of {directory}")
    # Of a vocabulary made up, the sign of a space may be a part.
    if len(set(tokenizer.get_vocab()) - {token.content for token in tokenizer.added_tokens_decoder.values()}) < 2:
        raise TokenizerError(f"the tokenizer of {directory} knows no word besides its special tokens, so every text "
                             "would be the same to the reward model: add tokenizer.json")
