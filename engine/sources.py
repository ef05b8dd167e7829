"""What may stand for a model, a reward model or a tokenizer: a directory, a GGUF file or an object of ours; else what
to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from stars.errors import ModelError, RewardError, StarsError, TokenizerError
from stars.model.decoder import Decoder
from stars.model.files import GGUF, is_gguf, printed
from stars.model.loaded import LoadedModel, own_tokenizer, taken
from stars.model.location import located
from stars.model.tokenizer import Tokenizer, from_transformers, load_tokenizer
from stars.reward.causal import CausalReward
from stars.reward.encoder import EncoderReward
from stars.reward.implicit import ImplicitReward
from stars.reward.logprobs import LogprobReward

BARE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def checked_model(model: Any) -> Any:
    """The directory or GGUF file that `model` names, here or in the hub, or the Decoder that it is; of a model of
    transformers, what reads its weights.

    Raises ModelError for anything else, in one sentence for each thing that is often given.
    """
    model = taken(model)
    if isinstance(model, (Decoder, LoadedModel)):
        return model
    if not isinstance(model, (str, Path)):
        raise ModelError(_object("model", model, "a model directory, a GGUF file or a Decoder"))
    model = located(model)
    check_directory("model", model, ModelError)
    return model


def checked_reward(reward: Any) -> Any:
    """`reward`, or the directory or GGUF file that it names, here or in the hub.

    Raises ModelError for a path that is none, RewardError for what transformers has and is no model that can be read;
    the same for the model inside a CausalReward or EncoderReward, and for those of an ImplicitReward.
    """
    given = reward = taken(located(reward))
    if isinstance(reward, ImplicitReward):
        for part in reward.parts:
            assert isinstance(part, LogprobReward)
            checked_model(part.model)
    if isinstance(reward, CausalReward):
        reward = reward.model
    elif isinstance(reward, EncoderReward):
        reward = reward.model_path
    if isinstance(reward, (str, Path)):
        check_directory("reward model", reward, ModelError)
    elif hasattr(reward, "save_pretrained"):
        # A module can be called, and would be taken for a function of prompt and responses.
        raise RewardError(_object("reward", reward, "a model directory, a callable or a stars.Reward"))
    return given


def check_directory(name: str, path: str | Path, error: type[StarsError]) -> None:
    """Raises `error` for other files than GGUF files and for what is not here; what is in a directory or file is not
    looked at."""
    given, path = printed(str(path)), Path(path)
    try:
        if path.is_dir() or is_gguf(path):
            return
        if path.is_file():
            raise error(f"{given} is a file: give the directory that holds it together with its config.json")
    except (OSError, ValueError):  # a name that no file system takes
        pass
    suffix = path.suffix.lower()
    if suffix == GGUF:
        raise error(f"{given} is not there: give the path of a GGUF file")
    if suffix in WEIGHTS:
        raise error(f"{given} is no directory: give the one with config.json, tokenizer.json and all weights")
    if BARE_NAME.fullmatch(given):
        raise error(f"{given} is not a directory here, and only names such as org/{given} are downloaded from the "
                    f"Hugging Face hub: give that one, or run `hf download {given} --local-dir DIR` and give DIR")
    if name != "model" and given.startswith(("http://", "https://")):
        raise error(f"{given} is not a directory: a reward model on a server is stars.RemoteReward(url)")
    raise error(f"{given} is not a directory: give the path of a {name} in Hugging Face format")


def resolve_tokenizer(tokenizer: Any, model: Any) -> Tokenizer | None:
    """The tokenizer that is meant: an object of ours as it is, a fast one of transformers as one of ours, the one of a
    directory, None for that of `model`.

    Returns None where none is given and `model` is no directory, is from none, or that has no tokenizer.json. Raises
    TokenizerError.
    """
    if tokenizer is None:
        return own_tokenizer(model)
    if isinstance(tokenizer, (str, Path)):
        try:
            tokenizer = located(tokenizer, weights=False)
        except ModelError as error:
            raise TokenizerError(str(error)) from error
        if Path(tokenizer).name == "tokenizer.json":
            tokenizer = Path(tokenizer).parent
        check_directory("tokenizer", tokenizer, TokenizerError)
        loaded = load_tokenizer(tokenizer)
        if loaded is None:
            raise TokenizerError(f"{tokenizer} has no tokenizer.json: give the directory of a fast tokenizer")
        return loaded
    if isinstance(tokenizer, Backend):
        raise TokenizerError("tokenizer is a tokenizers.Tokenizer, and only directories are loaded: write it with "
                             "save(DIR + '/tokenizer.json') and give DIR")
    if hasattr(tokenizer, "save_pretrained") and hasattr(tokenizer, "is_fast"):
        return from_transformers(tokenizer)
    if hasattr(tokenizer, "save_pretrained") or not all(
            callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
        raise TokenizerError(_object("tokenizer", tokenizer, "a directory with a tokenizer.json"))
    like_ours: Tokenizer = tokenizer
    return like_ours


def _object(name: str, value: Any, wanted: str) -> str:
    """The sentence about an object that cannot be taken."""
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    if hasattr(value, "save_pretrained"):
        return (f"{name} is a {kind} of transformers, and only directories are loaded: write it with "
                f"save_pretrained(DIR), its tokenizer beside it, and give DIR")
    if hasattr(value, "state_dict"):
        return f"{name} is a {kind} of torch, and only directories are loaded: write it in Hugging Face format"
    return f"{name} is {kind}, it must be {wanted}"
