"""Where a model's shape, weights and tokenizer are: its own directory or file or, of an adapter, those of its base."""

from __future__ import annotations

from pathlib import Path

from stars.errors import ModelError
from stars.model.files import INDEX, SINGLE, is_directory, is_file, is_gguf, read_json, shown
from stars.model.location import cached, hub_id
from stars.model.sharing import own_directory

CONFIG = "adapter_config.json"
SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What copies of one base have in common in their config.json."""

MERGE = "merge it into its base model (peft: merge_and_unload, save_pretrained) and give that directory"


def is_adapter(directory: Path) -> bool:
    """Whether DIRECTORY holds an adapter and no model."""
    return is_file(directory / CONFIG) and not is_file(directory / SINGLE) and not is_file(directory / INDEX)


def model_directory(directory: str | Path) -> Path:
    """The directory, or GGUF file, of a model's shape and weights: of an adapter, its base's. ModelError where that is
    not to be had."""
    directory = Path(directory)
    return base_of(directory) if is_adapter(directory) else directory


def is_of_own_model(adapter: Path) -> bool:
    """Whether an adapter's base is the engine's own model: by its place, or as it names nothing that is here."""
    base, own = _named_base(adapter), own_directory()
    return base is None or (own is not None and base.resolve() == model_directory(own).resolve())


def base_of(adapter: Path) -> Path:
    """The base that an adapter names: a directory or GGUF file by itself or beside it, or what the hub's cache has by
    that name, unless the engine's own model is of its shape; else the engine's own model. Nothing is downloaded for a
    name in a file."""
    base = _named_base(adapter)
    if base is None:
        base = own_directory()
        if base is not None and is_adapter(base):
            base = base_of(base) if base.resolve() != adapter.resolve() else None
    if base is None:
        name = read_json(adapter / CONFIG).get("base_model_name_or_path")
        raise ModelError(f"{adapter} is an adapter of {shown(name)}, which is not a directory here, nor whole in the "
                         f"hub's cache: set base_model_name_or_path in its {CONFIG} to the directory of its base model")
    if is_adapter(base):
        raise ModelError(f"{adapter} is an adapter of {base}, which is an adapter itself: {MERGE}")
    return base


def _named_base(adapter: Path) -> Path | None:
    """The base that an adapter names, where it is here."""
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    here = next((place for place in (adapter / name, Path(name)) if is_directory(place) or is_gguf(place)), None)
    identifier = None if here is not None else hub_id(name)
    found = None if identifier is None else cached(identifier)
    return here if found is None or _stands_in(own_directory(), found, adapter) else found


def _stands_in(own: Path | None, base: Path, adapter: Path) -> bool:
    """Whether the engine's own model is taken for a base in the hub's cache: as a copy of it, in whatever format."""
    if own is None or own.resolve() == adapter.resolve():
        return False
    if is_adapter(own) or is_gguf(own):
        return is_gguf(own)
    own_config, config = (read_json(place / "config.json") if is_file(place / "config.json") else {}
                          for place in (own, base))
    return all(own_config.get(name) == config.get(name) for name in SHAPE)
