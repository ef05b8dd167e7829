"""The benchmarks that need another stack are read where that is, so that none falls behind what it measures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NEEDS = {"embed_llama_cpp": "llama_cpp", "embed_clients": "transformers", "vllm_scheduler": "vllm"}


@pytest.mark.embed
@pytest.mark.parametrize("name", NEEDS)
def test_a_benchmark_can_be_read(name):
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed here: `make embed` makes environments that have it")
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True, cwd=BENCHMARKS)
