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
    "sample_step finish filters bf16 128256", "sample_step scan cuts bf16 128256",
    "sample_step scan filters cuts bf16 128256", "sample_step finish filters cuts bf16 128256",
    "score bf16 weight fp32 4096 add",
    "score bf16 weight fp32 4096 bias", "append_draft 32", "blend_logits 2 models",
    "edit_logits 49153",
    "attention one lane 128 bf16", "attention 16 lanes 128 bf16", "skinny qkv bf16 6144 4096, 1 rows",
    "skinny residual bf16 4096 4096, 1 rows",
    "skinny normed bf16 128256 4096, 1 rows", "skinny qkv bf16 heads of 80, 128 rows", "embedding_scaled bf16",
    "skinny residual bf16 fp8 4096 4096, 1 rows", "skinny swiglu bf16 int4-32 28672 4096, 64 rows",
    "token_logprobs"]

# Every scheme, few rows and many.
QUANTISED = ["skinny swiglu bf16 fp8 28672 4096, 1 rows", "skinny swiglu bf16 int8 28672 4096, 64 rows",
             "skinny swiglu bf16 int4-32 28672 4096, large tile", "skinny plain bf16 int4-128 1000 1152 zeros, 1 rows"]


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


def test_quantised_weights_are_asked_for_ahead():
    """In a loop over the inner dimension nothing is waited for: all loads are copies into shared memory, those of
    weights and activations of sixteen bytes, those of scales and zeros of four at least."""
    code = f"""
import re, triton
from triton.backends.compiler import GPUTarget
from stars.kernels.triton import skinny
from stars.kernels.triton.variant import attributes
for variant in skinny.variants():
    if variant.name in {QUANTISED!r}:
        source = triton.compiler.ASTSource(variant.kernel, variant.signature, variant.constexprs, attributes(variant))
        options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        loops = re.findall(r"^(\\S*L__BB\\S+):(.*?)bra\\S* \\s*\\1;", ptx, re.DOTALL | re.MULTILINE)
        [loop] = [body for _, body in loops if "mma" in body]
        print(variant.name, "|", loop.count("ld.global"), *re.findall(r"cp.async.c..shared.global .*?, 0x(\\w+)", loop))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert set(found) == set(QUANTISED)
    for name, counts in found.items():
        waited, *sizes = counts.split()
        groups = [size for size in sizes if size in ("4", "8")]
        assert waited == "0" and set(sizes) - {"4", "8"} == {"10"}, name
        assert len(groups) == (0 if "int4" not in name else 2 if "zeros" in name else 1), name


PTX_OF = """
import re, triton
from triton.backends.compiler import GPUTarget
from stars.kernels.triton import attention, skinny
from stars.kernels.triton.variant import attributes
for variant in skinny.variants() + attention.variants():
    if variant.name in NAMES:
        source = triton.compiler.ASTSource(variant.kernel, variant.signature, variant.constexprs, attributes(variant))
        options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, maxnreg=variant.max_registers,
                       launch_pdl=bool(variant.constexprs.get("PDL")))
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        memory = r"^(?:@!?%p\\d+ )?((?:ld|st|atom|cp|bar|griddepcontrol)\\.\\S+)"
        order = [found[1].rstrip(";") for line in ptx.splitlines() if (found := re.match(memory, line.strip()))]
        print(variant.name, "|", *order)
"""


def memory_operations(*names: str) -> dict[str, list[str]]:
    """What touches memory in kernels compiled for sm_90, and the barriers between, in the order of their PTX."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = PTX_OF.replace("NAMES", repr(names))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert set(found) == set(names)
    return {name: [one for one in order.split() if not one.startswith("ld.param")] for name, order in found.items()}


def test_the_last_to_arrive_sees_what_the_others_left():
    """Where programs meet: all threads have stored before the one that counts does, which releases their numbers and
    acquires those of the others; it tells all threads, and they read past the first-level cache. The interpreter runs
    programs one after another and would miss none of this."""
    arriving = ("skinny qkv bf16 6144 4096, 1 rows", "skinny residual bf16 4096 4096, dependent",
                "attention one lane 128 bf16")
    for name, order in memory_operations(*arriving).items():
        [at] = [index for index, one in enumerate(order) if one.startswith("atom")]
        assert order[at] == "atom.global.gpu.acq_rel.add.u32", name
        barrier = max(index for index, one in enumerate(order[:at]) if one == "bar.sync")
        assert any(one.startswith("st.global") for one in order[:barrier]), name
        assert not any(one.startswith(("st.global", "st.shared")) for one in order[barrier:at]), name
        assert order[at + 1 : at + 4] == ["st.shared.b32", "bar.sync", "ld.shared.b32"], name
        past = [one for one in order[at:] if one.startswith("ld.global.cg")]
        assert past and not any(one.startswith("ld.global.cg") for one in order[:at]), name
        assert order[-1] == "st.global.b32" or "attention" in name, name  # the counter goes back to zero


def test_a_dependent_launch_asks_for_weights_and_waits():
    """Before the wait there is nothing but the prefetch; that others may start is said behind it, so that whoever waits
    for this kernel has waited for the ones before it."""
    dependent = [f"skinny {end}, dependent" for end in (
        "qkv bf16 6144 4096", "residual bf16 4096 4096", "swiglu bf16 28672 4096", "residual bf16 4096 14336",
        "normed bf16 128256 4096")]
    for name, order in memory_operations(*dependent).items():
        assert order[:3] == ["cp.async.bulk.prefetch.L2.global", "griddepcontrol.wait",
                             "griddepcontrol.launch_dependents"], name
        assert not any("griddepcontrol" in one for one in order[3:]), name


def test_a_name_that_no_kernel_has_is_a_failure():
    assert compile_check("--only", "nothing").returncode == 1


@pytest.mark.slow
def test_all_kernels_fit_every_architecture():
    done = compile_check()
    assert done.returncode == 0, "\n".join(
        f"{usage['name']} sm_{usage['arch']}: {usage['problem']}" for usage in json.loads(done.stdout or "[]")
        if usage["problem"]) + done.stderr[-4000:]
