"""Kernels compiled ahead of time for sm_80, sm_90 and sm_100, no GPU needed: nothing spills, shared memory suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from triton_process import needs_triton

pytestmark = needs_triton

# One of each kernel, in the types that a model is most likely to run in.
REPRESENTATIVE = [
    "rms_norm bf16 4096 weight bf16 add", "swiglu bf16 14336", "take_rows bf16 bf16", "copy_rows bf16 1024",
    "linear bf16 bf16 bf16 4096 bias", "linear fp32 fp32 fp32 4096 bias", "sample_step scan bf16 128256",
    "sample_step scan filters bf16 128256", "sample_step bracket bf16 128256", "sample_step collect bf16 128256",
    "sample_step select bf16 128256", "sample_step draw bf16 128256", "sample_step finish bf16 128256",
    "sample_step finish filters bf16 128256", "score bf16 weight fp32 4096",
    "score bf16 weight fp32 4096 bias", "append_draft 32",
    "attention one lane 128 bf16", "attention 16 lanes 128 bf16"]


def compile_check(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "stars.kernels.triton.compile_check", "--json", *arguments],
                          env=environment, capture_output=True, text=True)


def test_representative_kernels_fit_every_architecture():
    done = compile_check("--only", *REPRESENTATIVE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    usages = json.loads(done.stdout)
    names = {usage["name"] for usage in usages}
    assert names >= set(REPRESENTATIVE) and {usage["arch"] for usage in usages} == {80, 90, 100}
    assert all(0 < usage["registers"] <= 255 and usage["spill_bytes"] == 0 for usage in usages)


def test_a_name_that_no_kernel_has_is_a_failure():
    assert compile_check("--only", "nothing").returncode == 1


@pytest.mark.slow
def test_all_kernels_fit_every_architecture():
    done = compile_check()
    assert done.returncode == 0, "\n".join(
        f"{usage['name']} sm_{usage['arch']}: {usage['problem']}" for usage in json.loads(done.stdout or "[]")
        if usage["problem"]) + done.stderr[-4000:]
