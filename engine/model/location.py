"""Where a model is that a user named: a directory or file here, or a repository of the Hugging Face hub.

What is here comes first, then the hub's cache on this machine, then a download. Only weights in safetensors, JSON,
templates and vocabularies are fetched: no code, and nothing that is unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from stars.errors import ModelError, text_of
from stars.model.files import GGUF, INDEX, SINGLE, is_directory, is_file, is_gguf, read_json

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "vocab.txt", "merges.txt")
NO_PATTERNS = ("*/*", "consolidated*")
"""Left out of those: folders with other forms of a model, and a second copy of its weights."""

ADAPTER = "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
TIMEOUT = 10.0
"""Seconds that a request to the hub may take before it counts as out of reach; downloads take their time."""

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME}|{_NAME})(@(?P<revision>[\w.][\w./-]*))?(:(?P<file>[\w./-]+))?")
_FILES = (GGUF, ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jinja")


class HubId(NamedTuple):
    """org/name[@revision][:FILE.gguf], as it is typed. An older name without org is looked for in the cache only."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def command(self) -> str:
        """What fetches it by hand, and what to do then."""
        file = "" if self.file is None else f" {self.file}"
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return (f"run `hf download {self.repo}{file}{revision} --local-dir DIR` and give "
                f"DIR{'' if self.file is None else f'/{self.file}'}")


def hub_id(given: str) -> HubId | None:
    """What may be a repository of the hub; None for what can be a path only."""
    found = _HUB_ID.fullmatch(given)
    if found is None or found["repo"].lower().endswith(_FILES) or len(given) > 300:
        return None
    file = found["file"]
    if file is not None and (not file.lower().endswith(GGUF) or ".." in file or file.startswith("/")
                             or "/" not in found["repo"]):
        return None
    return HubId(found["repo"], found["revision"], file)


def located(given: Any, weights: bool = True) -> Any:
    """The directory or GGUF file that is meant, where `given` names one in the hub; else `given`.

    A path that is here is meant by its name. Else `org/name`, `org/name@revision` and `org/name:FILE.gguf` are found in
    the hub's cache or downloaded to it, where huggingface_hub is installed and HF_HUB_OFFLINE is not set. weights:
    whether they are wanted; without, a tokenizer is enough. Whatever names no repository is returned as it is.

    Raises ModelError, in one sentence, where a repository is not to be had.
    """
    if not isinstance(given, (str, Path)) or is_directory(Path(given)) or is_file(Path(given)):
        return given
    identifier = hub_id(str(given))
    if identifier is None:
        return given
    found = cached(identifier, weights)
    if found is not None:
        return found
    return _download(str(given), identifier, weights) if "/" in identifier.repo else given


def cached(identifier: HubId, weights: bool = True) -> Path | None:
    """Where the hub's cache on this machine has the whole of a repository's model; no request is made."""
    try:
        import huggingface_hub
    except ImportError:
        return None
    try:
        return _whole(_ask(huggingface_hub, identifier, local_files_only=True), identifier, weights)
    except (OSError, ValueError):  # it has none, or a name that is not the hub's
        return None


def _ask(huggingface_hub: Any, identifier: HubId, **options: Any) -> Path:
    """The hub's own function, for a file or for a snapshot of what may be fetched."""
    if identifier.file is not None:
        return Path(huggingface_hub.hf_hub_download(identifier.repo, identifier.file, revision=identifier.revision,
                                                    etag_timeout=TIMEOUT, **options))
    return Path(huggingface_hub.snapshot_download(
        identifier.repo, revision=identifier.revision, etag_timeout=TIMEOUT, allow_patterns=list(PATTERNS),
        ignore_patterns=list(NO_PATTERNS), **options))


def _whole(place: Path, identifier: HubId, weights: bool) -> Path | None:
    """`place` if all that is wanted is in it: who read a tokenizer alone has left a snapshot without weights."""
    if identifier.file is not None:
        return place if is_gguf(place) else None
    if not weights:
        return place if is_file(place / TOKENIZER) else None
    names = {SINGLE}
    if is_file(place / ADAPTER):
        names = {ADAPTER}
    elif is_file(place / INDEX):
        shards = read_json(place / INDEX).get("weight_map")
        names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    return place if all(is_file(place / name) for name in names) else None


def _download(given: str, identifier: HubId, weights: bool) -> Path:
    """Fetches a repository's model into the cache; ModelError where it is not to be had."""
    start = f"{given} is not a directory here, nor is all of it in the cache of the Hugging Face hub"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ModelError(f"{given} is not a directory here, and without huggingface_hub nothing is downloaded: install "
                         f"it (pip install huggingface_hub), or {identifier.command}") from error
    repo = identifier.repo
    try:
        # The library waits without end for this answer, unless it is asked for by itself.
        info = huggingface_hub.HfApi().model_info(repo, revision=identifier.revision, timeout=TIMEOUT)
        files = [one.rfilename for one in info.siblings or ()]
        _check_files(start, identifier, files, weights)
        return _ask(huggingface_hub, identifier)
    except ModelError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise ModelError(f"{start}, and HF_HUB_OFFLINE is set, so nothing is downloaded: where there is a network, "
                         f"{identifier.command}") from error
    except errors.GatedRepoError as error:
        raise ModelError(f"{start}, and {repo} is gated: accept its terms at https://huggingface.co/{repo} and run "
                         "`hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{start}, and {repo} has no revision {identifier.revision or 'main'}: name a branch, a tag "
                         "or a commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{start}, and the hub has no repository {repo} that is open to you: check the name or, if it "
                         "is private, run `hf auth login`") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{given} is not a directory here, nor a name that the Hugging Face hub takes: give the path "
                         "of a model in Hugging Face format") from error
    except Exception as error:  # of whichever library speaks to the network, and of the disk
        reason = text_of(error).partition("\n")[0].strip()[:200]
        raise ModelError(f"{start}, and it cannot be downloaded ({reason or type(error).__name__}): "
                         f"{identifier.command}") from error


def _check_files(start: str, identifier: HubId, files: list[str], weights: bool) -> None:
    """Raises ModelError, before anything is fetched, where a repository's names show that it is of no use."""
    repo = identifier.repo
    gguf = sorted(name for name in files if name.lower().endswith(GGUF))
    listed = ", ".join(gguf[:4]) + (f" and {len(gguf) - 4} more" if len(gguf) > 4 else "")
    if identifier.file is not None:
        if identifier.file not in files:
            raise ModelError(f"{start}, and {repo} has no file {identifier.file}: "
                             + (f"it has {listed}" if gguf else "it has no GGUF file"))
    elif weights and not any("/" not in name and name.endswith(".safetensors") for name in files):
        raise ModelError(f"{start}, and {repo} has no weights in safetensors: "
                         + (f"give {repo}:FILE with one of its GGUF files ({listed})" if gguf else
                            "its other files are not read, so take a repository that has them"))
    elif not weights and TOKENIZER not in files:
        raise ModelError(f"{start}, and {repo} has no {TOKENIZER}: give the directory of a fast tokenizer")
