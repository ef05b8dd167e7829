"""Where a model's shape, weights and tokenizer are: its own directory or file or, of an adapter, those of its base."""

from __future__ import annotations

from pathlib import Path

from stars.errors import ModelError
from stars.model.files import INDEX, SINGLE, is_directory, is_file, is_gguf, read_json, shown
from stars.model.sharing import own_directory

CONFIG = "adapter_config.json"
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
    """The base that an adapter names, a directory or GGUF file by itself or beside it; else the engine's own model."""
    base = _named_base(adapter)
    if base is None:
        base = own_directory()
        if base is not None and is_adapter(base):
            base = base_of(base) if base.resolve() != adapter.resolve() else None
    if base is None:
        name = read_json(adapter / CONFIG).get("base_model_name_or_path")
        raise ModelError(f"{adapter} is an adapter of {shown(name)}, which is not a directory here: set "
                         f"base_model_name_or_path in its {CONFIG} to the directory of its base model")
    if is_adapter(base):
        raise ModelError(f"{adapter} is an adapter of {base}, which is an adapter itself: {MERGE}")
    return base


def _named_base(adapter: Path) -> Path | None:
    """The base that an adapter names, where it is here."""
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    return next((place for place in (adapter / name, Path(name)) if is_directory(place) or is_gguf(place)), None)
