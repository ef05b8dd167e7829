"""`stars serve` under load, as its clients see it; writes benchmarks/results/serving.json.

    python benchmarks/serving_load.py --gguf FILE --prompts FILE [--quick] [--rivals [--vllm-python PYTHON]]

FILE is SmolLM2-135M-Instruct's GGUF file and a JSONL of prompts (plain or .gz, field "prompt"; turns of "Human:" and
"Assistant:" become messages). The server is a process of its own, this one is the client, which says what it takes of
the cores. Twice, with the reward that ships for the model ("aligned": STARS) and without ("plain"):

- idle: one request after the other; the median time to the first segment.
- capacity: a closed loop of clients, each of which asks again once it was answered; requests a second while all of
  them are under way.
- Poisson arrivals at 10 to 120 % of it. At 70 % the 99th percentile of the time to the first segment should be at most
  3 times the idle median; at 120 % every request should be answered, by a completion or by 429, and none should wait
  for ever.

--rivals sends the same requests, of one model in bfloat16, to `stars serve`, `transformers serve` and vLLM's CPU build,
each alone: answers of equally many tokens, at the same times. What is not installed is said to be so.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gzip
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import RESULTS, ROOT, describe_machine
from serving_process import ServerProcess, end_on_sigterm, free_port, stars_serve

from stars.bench.answers import COMPLETED
from stars.bench.arrivals import arrival_times
from stars.bench.figures import figures
from stars.bench.load import Run, Target, send_load
from stars.bench.workload import CHAT, Entry
from stars.demo_chat import REWARD

LOADS = (10, 30, 50, 70, 90, 100, 120)  # percent of capacity
LENGTHS = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}  # of prompts, in tokens
TEMPERATURE = 0.8
AIM_LOAD, AIM_RATIO, OVERLOAD = 70, 3.0, 120
RIVAL_LOADS = (30, 70)  # percent of what `stars serve` can do
PATIENCE = 60.0  # seconds that a rival may take for an answer, which bounds the run
TURN = re.compile(r"\s*(Human|Assistant):\s*")
SHOWN = ("completed", "refused", "failed", "request_throughput", "output_throughput", "median_ttft_ms", "p90_ttft_ms",
         "p99_ttft_ms", "p99_itl_ms", "median_e2el_ms", "p99_e2el_ms", "client_cpu_share")


def chats(path: Path, count: int, longest: int | None = None) -> list[list[dict[str, str]]]:
    """The first `count` prompts of a file as messages; one without turns is one message. longest: in characters; others
    are left out."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    return [_messages(prompt) for prompt in prompts if longest is None or len(prompt) <= longest][:count]


def _messages(prompt: str) -> list[dict[str, str]]:
    parts = TURN.split(prompt)
    if len(parts) == 1:
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)]
    while turns and turns[-1]["role"] == "assistant":  # the turn that is to be written
        turns.pop()
    return turns


class Load:
    """Requests to one server."""

    def __init__(self, server: ServerProcess, prompts: Sequence[Any], max_tokens: int, target: Target):
        self.server, self.prompts, self.max_tokens, self.target = server, prompts, max_tokens, target
        self.used = 0  # of the prompts: none is asked twice as long as there are others
        self.prompt_tokens: list[int] = []  # as the server counted them

    def entries(self, times: Sequence[float]) -> list[Entry]:
        """A request at each of the times, each of a user of its own."""
        found = [Entry(time, self.prompts[(self.used + index) % len(self.prompts)], self.max_tokens,
                       {"user": f"user {self.used + index}", "seed": self.used + index})
                 for index, time in enumerate(times)]
        self.used += len(times)
        return found

    def send(self, times: Sequence[float], clients: int | None = None) -> tuple[Run, dict[str, Any]]:
        """A run and its figures, with the server's share of a core and its memory."""
        cpu = self.server.cpu_seconds()
        run = asyncio.run(send_load(dataclasses.replace(self.target, max_concurrency=clients), self.entries(times)))
        found = figures(run, {})
        self.prompt_tokens += [answer.input_tokens for answer in run.answers if answer.input_tokens is not None]
        return run, found | {"server_cpu_share": (self.server.cpu_seconds() - cpu) / run.duration,
                             "server_resident_mb": self.server.resident_bytes() / 1e6,
                             "max_ttft_ms": 1e3 * max((answer.ttft for answer in run.answers
                                                       if answer.outcome == COMPLETED), default=0.0)}


def steady_rate(run: Run, clients: int) -> float:
    """Completions a second while all clients were busy: from the first `clients` answers to the last request sent."""
    ends = sorted(answer.ended for answer in run.answers)
    begin, end = ends[clients - 1], max(answer.sent for answer in run.answers)
    counted = sum(begin < one <= end for one in ends)
    return counted / (end - begin) if counted else len(ends) / run.duration


def sweep(load: Load, seconds: float, clients: int, loads: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Idle, capacity and the loads; each takes about `seconds`."""
    load.send([0.0] * 3, 1)  # caches, widths, first products
    run, _ = load.send([0.0] * 2, 1)
    count = min(40, max(5, int(seconds / 2 * len(run.answers) / run.duration)))
    _, idle = load.send([0.0] * count, 1)
    say(_line("idle", idle))
    run, _ = load.send([0.0] * (2 * clients), clients)
    count = max(3 * clients, int(seconds * len(run.answers) / run.duration))
    run, closed = load.send([0.0] * count, clients)
    capacity = steady_rate(run, clients)
    say(_line(f"{clients} clients", closed) + f"; capacity {capacity:.3g} requests/s")
    points = []
    for percent in loads:
        rate = capacity * percent / 100
        count = max(8, round(rate * seconds))
        _, found = load.send(arrival_times(count, rate, 1.0, percent))
        points.append({"load_percent": percent, "offered_rate": rate, "requests": count, **found})
        say(_line(f"{percent} %", points[-1]))
    lengths = sorted(load.prompt_tokens)
    prompts = {name: lengths[min(len(lengths) - 1, int(share * len(lengths)))] for name, share in LENGTHS.items()}
    return {"prompt_tokens": prompts, "idle": idle, "closed_loop": closed, "capacity": capacity, "clients": clients,
            "points": points}


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """The aims, as far as their loads were sent."""
    points = {point["load_percent"]: point for point in found["points"]}
    idle = found["idle"]["median_ttft_ms"]
    aims: dict[str, Any] = {"idle_median_ttfs_ms": idle}
    if AIM_LOAD in points:
        ratio = points[AIM_LOAD]["p99_ttft_ms"] / idle
        aims |= {"p99_ttfs_over_idle_median_at_70": ratio, "aim": f"<= {AIM_RATIO:g}", "reached": ratio <= AIM_RATIO}
    if OVERLOAD in points:
        point = points[OVERLOAD]
        lost = point["requests"] - point["completed"] - point["statuses"].get("429", 0)
        aims |= {"lost_at_120": lost, "longest_ttfs_ms_at_120": point["max_ttft_ms"], "none_lost_at_120": lost == 0}
    return aims


def rivals(options: argparse.Namespace, prompts: Sequence[Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The same requests to each server, alone: what it can do, and at loads that are equal for all of them."""
    model = model_directory(options)
    tokens, clients, seconds = options.max_tokens, options.clients, options.seconds / 2
    options.timeout = PATIENCE
    servers: dict[str, Callable[[], tuple[ServerProcess, Target] | str]] = {
        "stars serve": lambda: _stars(options, model),
        "transformers serve": lambda: _transformers(options, model, continuous=False),
        "transformers serve, continuous batching": lambda: _transformers(options, model, continuous=True),
        "vLLM, CPU build": lambda: _vllm(options, model),
    }
    servers = {name: start for name, start in servers.items() if any(part in name for part in options.rival)}
    found: dict[str, Any] = {"model": f"{options.gguf.name} as a directory in bfloat16", "max_tokens": tokens,
                             "vllm_eager": options.vllm_eager}
    capacity = None
    for name, start in servers.items():
        try:
            started = start()
        except RuntimeError as error:
            started = f"did not start: {error}"
        if isinstance(started, str):
            found[name] = started
            say(f"{name}: {started}")
            continue
        server, target = started
        with server:
            load = Load(server, prompts, tokens, target)
            load.send([0.0], 1)
            run, warm = load.send([0.0], 1)
            if not warm["completed"]:
                found[name] = f"no answer: {run.answers[0].error}"
                say(f"{name}: {found[name]}")
                continue
            _, idle = load.send([0.0] * min(10, max(2, int(seconds / 2 / run.duration))), 1)
            say(f"{name}: " + _line("idle", idle))
            load.used = 100
            run, closed = load.send([0.0] * (2 * clients), clients)
            rate = len(run.answers) / run.duration
            say(f"{name}: " + _line(f"{clients} clients", closed) + f"; {rate:.3g} requests/s")
            capacity = capacity or rate
            points = []
            for percent in RIVAL_LOADS[:1] if options.quick else RIVAL_LOADS:
                load.used = 1000 * percent
                times = arrival_times(max(6, round(capacity * percent / 100 * seconds)), capacity * percent / 100, 1.0,
                                      percent)
                _, point = load.send(times)
                points.append({"offered_rate": capacity * percent / 100, "requests": len(times), **point})
                say(f"{name}: " + _line(f"{capacity * percent / 100:.2g} requests/s", point))
            found[name] = {"idle": idle, "closed_loop": closed, "rate": rate, "points": points}
    return found


def _stars(options: argparse.Namespace, model: Path) -> tuple[ServerProcess, Target]:
    server = stars_serve(["--model", str(model), "--served-model-name", "m"], options.scratch / "stars.log",
                         environment=_threads(options))
    return server, Target(server.url, CHAT, "m", timeout=options.timeout,
                          common={"temperature": TEMPERATURE, "ignore_eos": True})


def _transformers(options: argparse.Namespace, model: Path, continuous: bool) -> tuple[ServerProcess, Target] | str:
    missing = [name for name in ("transformers", "accelerate", "fastapi", "uvicorn", "openai")
               if not _importable(options.transformers_python, name)]
    if missing:
        return f"not installed ({', '.join(missing)})"
    port = free_port()
    server = ServerProcess(
        [options.transformers_python, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port),
         "--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16",
         *(["--continuous-batching"] if continuous else [])], options.scratch / f"transformers-{continuous}.log",
        port=port, environment=_threads(options) | {"HF_HUB_OFFLINE": "1"})
    asked = json.dumps({"min_new_tokens": options.max_tokens, "max_new_tokens": options.max_tokens, "do_sample": True,
                        "temperature": TEMPERATURE})
    return server, Target(server.url, CHAT, str(model), timeout=options.timeout, common={"generation_config": asked})


def _vllm(options: argparse.Namespace, model: Path) -> tuple[ServerProcess, Target] | str:
    if options.vllm_python is None or not _importable(options.vllm_python, "vllm"):
        return "not installed"
    port = free_port()
    environment = _threads(options) | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
                                       "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = ServerProcess(
        [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
         "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "2048", "--served-model-name", "m",
         *(["--enforce-eager"] if options.vllm_eager else [])], options.scratch / "vllm.log", port=port,
        environment=environment, seconds=420)
    return server, Target(server.url, CHAT, "m", timeout=options.timeout,
                          common={"temperature": TEMPERATURE, "ignore_eos": True})


def _importable(python: str, name: str) -> bool:
    found = subprocess.run([python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"],
                           capture_output=True, cwd="/")
    return found.returncode == 0


def _threads(options: argparse.Namespace) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(options.threads), "STARS_NUM_THREADS": str(options.threads)}


def model_directory(options: argparse.Namespace) -> Path:
    """The model in bfloat16, as all three servers read it."""
    from real import bfloat16_directory

    return bfloat16_directory(options.gguf, options.scratch / "model")


def calibrated(options: argparse.Namespace) -> Path:
    """What `stars calibrate` measures of the reward on a few of the prompts."""
    path = options.scratch / "calibration.json"
    rows = options.scratch / "calibration.jsonl"
    few = chats(options.prompts, 2 if options.quick else 8, options.longest_prompt)
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in few))
    program = "import sys; from stars.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", program, "calibrate", "--model", str(options.gguf), "--reward", str(REWARD),
                    "--input", str(rows), "--num-samples", "2" if options.quick else "8", "--quantile", "0.8",
                    "--max-tokens", str(options.max_tokens), "--segment-size", str(options.segment_size),
                    "--temperature", str(TEMPERATURE), "--seed", "1", "--save", str(path)],
                   check=True, capture_output=True)
    return path


def _line(name: str, found: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return "-" if found[key] is None else f"{found[key]:.0f}"

    return (f"{name}: {found['completed']} completed, {found['refused']} refused, {found['failed']} failed in "
            f"{found['duration']:.0f} s; first segment {number('median_ttft_ms')} / {number('p90_ttft_ms')} / "
            f"{number('p99_ttft_ms')} ms (p50, p90, p99), whole answer {number('median_e2el_ms')} / "
            f"{number('p99_e2el_ms')} ms; {found['output_throughput'] or 0:.0f} tokens/s; cores: server "
            f"{found['server_cpu_share']:.2f}, client {found['client_cpu_share']:.2f}")


def main() -> None:
    options = _parse()
    end_on_sigterm()
    machine = describe_machine()
    result: dict[str, Any] = {"machine": machine, "settings": {name: getattr(options, name) for name in (
        "max_tokens", "segment_size", "max_attempts", "seconds", "clients", "max_waiting", "threads", "longest_prompt",
        "quick")} | {
        "model": options.gguf.name, "prompts": options.prompts.name, "temperature": TEMPERATURE}}
    prompts = chats(options.prompts, 2000, options.longest_prompt)

    def say(text: str) -> None:
        print(text, flush=True)

    def save() -> None:
        machine["load_average_at_end"] = describe_machine()["load_average"]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    served = ["--model", str(options.gguf), "--reward", str(REWARD), "--max-waiting", str(options.max_waiting),
              "--segment-size", str(options.segment_size), "--max-attempts", str(options.max_attempts), "--beta",
              "auto", "--served-model-name", "m", *options.serve]
    if {"aligned", "plain"} & set(options.only):
        served += ["--calibration", str(calibrated(options))]
        result["settings"]["calibration"] = json.loads((options.scratch / "calibration.json").read_text())
        with stars_serve(served, options.scratch / "serve.log", environment=_threads(options)) as server:
            for name, policy in (("plain", {"stars": {"policy": "plain"}}), ("aligned", {})):
                if name in options.only:
                    say(f"-- {name}")
                    target = Target(server.url, CHAT, "m", timeout=options.timeout,
                                    common={"temperature": TEMPERATURE, **policy})
                    load = Load(server, prompts, options.max_tokens, target)
                    found = sweep(load, options.seconds, options.clients, options.loads, say)
                    result[name] = found | {"aims": judged(found)}
                    say(f"{name}: {json.dumps(result[name]['aims'])}")
                    save()
    if options.rivals:
        result["rivals"] = rivals(options, prompts, say)
        save()
    say(f"written to {options.output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL with "prompt", plain or .gz')
    parser.add_argument("--longest-prompt", type=int, default=320,
                        help="in characters; longer ones, whose reading alone takes long, are left out (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short runs: whether it works, not how fast")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["aligned", "plain"],
                        help="aligned, plain, or none of both with --rivals: --only ''")
    parser.add_argument("--loads", type=lambda text: [int(load) for load in text.split(",")],
                        help="percent of capacity, with commas (10 to 120)")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--rival", type=lambda text: text.split(","), default=["serve", "vLLM"],
                        help="some of them, by parts of their names")
    parser.add_argument("--transformers-python", default=sys.executable)
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-eager", action="store_true", help="without its compilation, which takes minutes")
    parser.add_argument("--seconds", type=float, help="of a load (30)")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (%(default)s)")
    parser.add_argument("--segment-size", type=int, default=8)
    parser.add_argument("--max-attempts", type=int, default=8)
    parser.add_argument("--max-waiting", type=int, default=32, help="of the server; beyond, 429 (%(default)s)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further arguments of stars serve, last")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stars-serving")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.seconds = options.seconds or (4.0 if options.quick else 30.0)
    options.loads = options.loads or ((30, 70, 120) if options.quick else LOADS)
    options.clients = min(options.clients, 4) if options.quick else options.clients
    options.timeout = 60.0 + 3 * options.seconds
    options.output = options.output or (ROOT / ".benchmarks" if options.quick else RESULTS) / "serving.json"
    options.scratch = options.scratch.resolve()
    options.gguf, options.prompts = options.gguf.resolve(), options.prompts.resolve()
    options.scratch.mkdir(parents=True, exist_ok=True)
    if options.vllm_python is not None:
        options.vllm_python = str(Path(options.vllm_python).absolute())  # not resolved: an environment's is a link
    return options


if __name__ == "__main__":
    importlib.util.find_spec("aiohttp") or sys.exit("this needs aiohttp: pip install 'stars-engine[bench]'")
    main()
