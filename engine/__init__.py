"""STARS engine: alignment at decoding time, one language model and one reward model in one engine."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from stars.version import __version__ as __version__

if TYPE_CHECKING:
    from stars.budget import Budget
    from stars.calibration import Calibration
    from stars.engine import Engine
    from stars.errors import (
        EngineDeadError,
        IntegrityError,
        ModelError,
        OutOfPages,
        QueueFullError,
        RequestError,
        RewardError,
        StarsError,
        TokenizerError,
        TraceError,
    )
    from stars.outputs import Attempt, CompletionOutput, Logprob, Metrics, RequestOutput, Rewards, Segment
    from stars.policies import (
        ARGS,
        CARDS,
        MARA,
        RAD,
        STARS,
        BestOfN,
        BlockwiseBestOfK,
        ParticleFilter,
        PersonaJudge,
        RejectionSampling,
        RewardGuidedSpeculation,
        Sample,
        SegmentBeam,
        SpeculativeRejection,
        TokenGuidance,
    )
    from stars.reward import (
        CachedReward,
        CausalReward,
        EncoderReward,
        FunctionReward,
        ImplicitReward,
        LoraReward,
        ProcessReward,
        RemoteReward,
        Reward,
        WeightedReward,
    )
    from stars.sampling import RequestOutputKind, SamplingParams
    from stars.serve.async_engine import AsyncEngine
    from stars.structured import StructuredOutputsParams
    from stars.trace import read_trace, write_trace

# Lines go to "stars" and its children, and nowhere unless the program around says so.
logging.getLogger("stars").addHandler(logging.NullHandler())

# Names are imported when they are first used: the command line answers --help without loading torch.
_HOMES = {
    "budget": ("Budget",),
    "calibration": ("Calibration",),
    "engine": ("Engine",),
    "errors": ("EngineDeadError", "IntegrityError", "ModelError", "OutOfPages", "QueueFullError", "RequestError",
               "RewardError", "StarsError", "TokenizerError", "TraceError"),
    "outputs": ("Attempt", "CompletionOutput", "Logprob", "Metrics", "RequestOutput", "Rewards", "Segment"),
    "policies": ("ARGS", "CARDS", "MARA", "RAD", "STARS", "BestOfN", "BlockwiseBestOfK", "ParticleFilter",
                 "PersonaJudge", "RejectionSampling", "RewardGuidedSpeculation", "Sample", "SegmentBeam",
                 "SpeculativeRejection", "TokenGuidance"),
    "reward": ("CachedReward", "CausalReward", "EncoderReward", "FunctionReward", "ImplicitReward", "LoraReward",
               "ProcessReward", "RemoteReward", "Reward", "WeightedReward"),
    "serve.async_engine": ("AsyncEngine",),
    "sampling": ("RequestOutputKind", "SamplingParams"),
    "structured": ("StructuredOutputsParams",),
    "trace": ("read_trace", "write_trace"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ARGS",
    "AsyncEngine",
    "Attempt",
    "BestOfN",
    "BlockwiseBestOfK",
    "Budget",
    "CARDS",
    "CachedReward",
    "Calibration",
    "CausalReward",
    "CompletionOutput",
    "EncoderReward",
    "Engine",
    "EngineDeadError",
    "FunctionReward",
    "ImplicitReward",
    "IntegrityError",
    "Logprob",
    "LoraReward",
    "MARA",
    "Metrics",
    "ModelError",
    "OutOfPages",
    "ParticleFilter",
    "PersonaJudge",
    "ProcessReward",
    "QueueFullError",
    "RAD",
    "RejectionSampling",
    "RemoteReward",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "Reward",
    "RewardError",
    "RewardGuidedSpeculation",
    "Rewards",
    "STARS",
    "Sample",
    "SamplingParams",
    "Segment",
    "SegmentBeam",
    "SpeculativeRejection",
    "StarsError",
    "StructuredOutputsParams",
    "TokenGuidance",
    "TokenizerError",
    "TraceError",
    "WeightedReward",
    "read_trace",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"stars.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"stars.{name}") is not None:
        return import_module(f"stars.{name}")
    raise AttributeError(f"module 'stars' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
