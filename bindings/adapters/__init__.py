"""The loop inside other stacks: they draft with their own runtimes, libstars' controller decides.

Nothing here decides by itself, and nothing is imported before it is asked for: each adapter needs its own stack.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME: dict[str, str] = {"llama_cpp": "llama_engine", "openai": "openai_client", "transformers": "hf_generate",
                         "vllm_client": "vllm_serving"}
"""The module of each name."""
_MODULES = ("vllm_scheduler",)  # named to vLLM by its path

__all__ = sorted((*_HOME, *_MODULES))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"stars.adapters.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"stars.adapters.{name}")
    raise AttributeError(f"module 'stars.adapters' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
