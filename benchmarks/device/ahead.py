"""Compiles what stages will launch before the card is asked for it, without a card: ahead.py [--only STAGES] [--cold]

An engine runs over fake CUDA tensors (`fake_cuda`), with two layers instead of 32, which launch the same kernels; other
stages run over CPU tensors of the real shapes. Nothing is launched: every specialisation asked for goes to workers,
which compile it into Triton's cache. A kernel is counted for the first stage that needs it. With --cold the cache is a
new one, and what is printed is how long a stage's kernels take to compile; on the card its cores share that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import importable

importable.install()

from compile_pool import Driver, Pool, describe, usual_workers  # noqa: E402
from stage import die_with_the_runner  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(STAGES), help=", ".join(STAGES))
    parser.add_argument("--cold", action="store_true", help="into a cache of its own, which is thrown away")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of the card: 90 is an H100 or H200")
    parser.add_argument("--workers", type=int, default=usual_workers())
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args()
    die_with_the_runner()
    import torch  # before anything is forked, so that it is imported once
    import triton

    import stars  # noqa: F401

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.cold:
            os.environ["TRITON_CACHE_DIR"] = folder
        for name in options.only:
            one = found[name] = _apart(name, options)
            print(f"{name:<24}{one['kernels']:>4} kernels {one['seconds']:>7.1f} s of compiling, the longest "
                  f"{one['longest']:.1f} s, {one['failed']} failed, {one['wall']:.1f} s by {options.workers} workers",
                  flush=True)
    if options.out:
        whole = {"arch": options.arch, "triton": triton.__version__, "torch": torch.__version__,
                 "python": platform.python_version(), "workers": options.workers,
                 "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stages": found}
        Path(options.out).write_text(json.dumps(whole, indent=1) + "\n")
    return 1 if any(one["failed"] for one in found.values()) else 0


def _apart(name: str, options: argparse.Namespace) -> dict:
    """In a process of its own: what records an engine's launches changes torch for good."""
    begin = time.perf_counter()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        die_with_the_runner()
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "w") as out:
                json.dump(_recorded(STAGES[name], options), out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as source:
        text = source.read()
    os.waitpid(pid, 0)
    found = json.loads(text) if text else {"kernels": 0, "seconds": 0.0, "longest": 0.0, "failed": 1}
    return found | {"wall": round(time.perf_counter() - begin, 1)}


def _recorded(record: Callable[[], None], options: argparse.Namespace) -> dict:
    from triton.runtime import driver

    pool = Pool(options.workers, options.arch)
    driver.set_active(Driver(options.arch))
    with open(os.devnull, "w") as nowhere, pool.recording():
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            record()
        finally:
            sys.stdout = stdout
    times = [seconds for one in pool.wait().values() for seconds in one]
    fresh = [seconds for seconds in times if seconds > 0.05]  # the others were in the cache
    pool.close()
    return {"kernels": len(fresh), "seconds": round(sum(fresh), 1), "longest": max(fresh, default=0.0),
            "failed": len(pool.tasks) - len(times)}


def rehearse(shape: str) -> None:
    """What the headline, the rivals' stage and serving ask of an engine, over fake tensors."""
    import fake_cuda
    from bench import SEGMENT, Bench, Plain
    from record import Record, Settings
    from timing import rehearsal

    with tempfile.TemporaryDirectory() as folder, fake_cuda.gpu(), rehearsal():
        bench = Bench(Record(Path(folder) / "ahead.json", "ahead"), Settings(), shape, layers=2, seed=None)
        for lanes in (1, 16, 8, 4):
            bench.step_seconds(lanes)
        for context in (1024, 4096, (1 << 14) - SEGMENT):
            for count in (4, 1):
                bench.reward_pass_seconds(context, count)
        for context in (bench.context, 128, 64):
            bench.context = context
            bench.complete(Plain())
            for rate in (0.3, 0.1):
                for width in (None, 8, 1):
                    bench.complete(bench.policy(width), rate)


def _on_cpu(module: str, function: str = "run") -> Callable[[], None]:
    """A stage of kernels, its parts one after the other in this process, its tensors on the CPU."""
    def record() -> None:
        import importlib

        import torch
        from record import Record, Settings
        from timing import rehearsal
        from triton.runtime.jit import JITFunction

        class OnCPU(Settings):
            @property
            def device(self) -> str:
                return "cpu"

        JITFunction.run = lambda self, *args, grid, warmup, **kwargs: describe(self, args, kwargs)
        stage = importlib.import_module(module)
        for name in ("kernel_rows", "kernel_products", "kernel_fused", "kernel_attention", "kernel_sampler",
                     "first_light"):
            importlib.import_module(name).run_apart = _inline
        for name in ("micro", "tune_products"):
            importlib.import_module(name).compile_first = lambda *given: None
        torch.cuda.get_device_name, torch.mm = lambda: "none", lambda *given, out, **named: out
        with tempfile.TemporaryDirectory() as folder, rehearsal(), torch.no_grad():
            getattr(stage, function)(Record(Path(folder) / "record.json", module), OnCPU())

    return record


def _inline(record, settings, parts, most) -> None:
    for name, part in parts.items():
        record.part(name, part, record, settings)


def _engine_of(record: Callable[[], None]) -> Callable[[], None]:
    """On fake CUDA tensors."""
    def faked() -> None:
        import fake_cuda

        from stars.kernels import prefill_attention

        fake_cuda.install()
        fake_cuda.on_variant = describe
        for library in prefill_attention.BACKENDS:  # they bring kernels of their own
            prefill_attention.BACKENDS[library] = lambda *given: None
        record()

    return faked


def _headline() -> None:
    rehearse("Llama-3.1-8B")


def _chain(schemes: tuple[str, ...] = ("",)) -> Callable[[], None]:
    """Every tile that is tried, in every product, over one layer."""
    def record() -> None:
        import fake_cuda
        import tune_chain
        from record import Settings
        from timing import rehearsal

        with fake_cuda.gpu(), rehearsal():
            for scheme in schemes:
                tune_chain.rehearse(Settings(), scheme)

    return record


def _small_engine() -> None:
    """The one of first light, in both of its types. Verdicts are made up, so it runs a few times."""
    import engine_checks
    import fake_cuda
    import torch

    with fake_cuda.gpu():
        for dtype in (torch.float32, torch.bfloat16):
            one = engine_checks.engine("cuda", "toy", dtype)
            for policy in engine_checks.METHODS.values():
                engine_checks.complete(one, engine_checks.PROMPTS, policy=policy)
            for _ in range(4):
                engine_checks.complete(one, engine_checks.PROMPTS)
                engine_checks.complete(one, engine_checks.PROMPTS[:3])


def _engines() -> None:
    """The small ones that are held against the CPU's, alone and together."""
    import engine_checks
    import fake_cuda
    import torch

    from stars import engine, reward

    for module in (engine, reward.causal):  # no bits to compare
        module.check_row_invariance = lambda *given: None
    with fake_cuda.gpu():
        for score_by in ("mlp", "labels"):
            engine_checks.complete(engine_checks.engine("cuda", "toy", torch.float32, score_by=score_by),
                                   engine_checks.PROMPTS)
        for scheme in engine_checks.SCHEMES:
            engine_checks.complete(engine_checks.engine("cuda", "toy", torch.float32, scheme=scheme),
                                   engine_checks.PROMPTS)
        one = engine_checks.engine("cuda", "toy", torch.float32, several=True)
        for policy in engine_checks.SEVERAL.values():
            engine_checks.complete(one, engine_checks.PROMPTS, policy=policy)
        engine_checks.complete(engine_checks.engine("cuda", "toy", torch.float32, implicit=True), engine_checks.PROMPTS,
                               policy=engine_checks.IMPLICIT)
        for shape in ("toy", "toy-qwen3"):
            for dtype in (torch.float32, torch.bfloat16):
                for deterministic in (False, True):
                    one = engine_checks.engine("cuda", shape, dtype, deterministic)
                    for width in (1, 3, 8):
                        for prompts in ([prompt] for prompt in engine_checks.PROMPTS):
                            engine_checks.complete(one, prompts, width)
                    engine_checks.complete(one, engine_checks.PROMPTS)


def _reader() -> None:
    import torch
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: describe(self, args, kwargs)
    import reader

    words = torch.zeros(1 << 16, dtype=torch.int32)
    for choice in reader.CHOICES:
        reader.read(words, words, choice)


STAGES: dict[str, Callable[[], None]] = {
    "headline-8b": _engine_of(_headline),
    "tune-chain": _engine_of(_chain()),
    "quantised-8b": _engine_of(_chain(("fp8", "int8"))),
    "first-kernels": _on_cpu("first_light", "kernels"),
    "first-engine": _engine_of(_small_engine),
    "products": _on_cpu("tune_products"),
    "micro": _on_cpu("micro"),
    "kernels-rows": _on_cpu("kernel_rows"),
    "kernels-fused": _on_cpu("kernel_fused"),
    "kernels-products": _on_cpu("kernel_products"),
    "kernels-attention": _on_cpu("kernel_attention"),
    "kernels-attention-more": _on_cpu("kernel_attention", "more"),
    "kernels-sampler": _on_cpu("kernel_sampler"),
    "engine": _engine_of(_engines),
    "machine": _reader,
}
"""What each launches. Those of correctness compile in processes of their own on the card as well; `beside-8b`,
`serving` and `ncu` launch the headline's, `kernels-prefill` none of ours."""

if __name__ == "__main__":
    sys.exit(main())
