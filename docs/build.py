"""Makes what of the documentation is not written by hand: `make docs`.

docs/api.md comes from the docstrings of all that `stars` exports, docs/figures/*.svg from benchmarks/results. Both are
kept in the repository, so that the pages read as they are; a test says when they are out of date.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import json
import operator
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import stars.adapters
from stars.bench.plot import Panel, Series, even_axis, log_axis, svg

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"

SECTIONS = {
    "Engines": ("Engine", "AsyncEngine", "serve.async_engine.RequestStream"),
    "Requests": ("SamplingParams", "StructuredOutputsParams", "RequestOutputKind", "Budget"),
    "Methods": ("STARS", "CARDS", "Sample", "BestOfN", "BlockwiseBestOfK", "RejectionSampling", "SpeculativeRejection",
                "SegmentBeam", "ParticleFilter", "ARGS", "RAD", "MARA", "PersonaJudge", "TokenGuidance",
                "RewardGuidedSpeculation"),
    "Rewards": ("Reward", "CausalReward", "LoraReward", "ProcessReward", "EncoderReward", "FunctionReward",
                "CachedReward", "RemoteReward", "ImplicitReward", "WeightedReward"),
    "Adapters": ("adapters.transformers", "adapters.hf_generate.AlignedGenerate",
                 "adapters.hf_generate.StarsGenerateOutput", "adapters.hf_stack.ForwardTokens", "adapters.llama_cpp",
                 "adapters.llama_engine.LlamaCpp", "adapters.openai", "adapters.openai_client.OpenAIProposer",
                 "adapters.openai_client.Traffic", "adapters.vllm_client"),
    "Outputs": ("RequestOutput", "CompletionOutput", "Segment", "Attempt", "Logprob", "Metrics", "outputs.Times",
                "Rewards",
                "Calibration"),
    "Metrics": ("metrics.EngineMetrics", "exposition.Histogram"),
    "Traces": ("write_trace", "read_trace"),
    "Errors": (),  # whatever is an exception
}
"""What is exported, by what it is for. A name that is in none of them ends up under "More"."""
BEYOND = {"serve.async_engine.RequestStream": ("request_id", "aclose"), "outputs.Times": ("phases",),
          "metrics.EngineMetrics": ("text", "snapshot"), "exposition.Histogram": ("total",),
          "adapters.transformers": (), "adapters.llama_cpp": (), "adapters.openai": (), "adapters.vllm_client": (),
          "adapters.hf_generate.AlignedGenerate": ("__call__",), "adapters.hf_generate.StarsGenerateOutput": (),
          "adapters.hf_stack.ForwardTokens": (), "adapters.openai_client.Traffic": ("forward_tokens",),
          "adapters.llama_engine.LlamaCpp": ("generate", "stream", "forward_tokens", "close"),
          "adapters.openai_client.OpenAIProposer": ("generate", "chat", "stream")}
"""What `stars` does not export, as nobody makes one, but it is handed out, or as it needs another stack; and what its
users call."""


# -- the reference ----------------------------------------------------------------------------------------------------


def api() -> str:
    """The text of docs/api.md."""
    exported = {name: getattr(stars, name) for name in stars.__all__}
    exported |= {name: operator.attrgetter(name)(stars) for name in BEYOND}
    errors = [name for name, value in exported.items() if isinstance(value, type) and issubclass(value, Exception)]
    sections = {title: [name for name in names if name in exported] for title, names in SECTIONS.items()}
    sections["Errors"] += errors
    listed = {name for names in sections.values() for name in names}
    sections["More"] = [name for name in stars.__all__ if name not in listed]
    parts = ["# API reference", "Made from the docstrings by `make docs`: change those, not this file.",
             "\n".join(f"- [{title}](#{title.lower()}): {', '.join(f'`{name}`' for name in names)}"
                       for title, names in sections.items() if names)]
    for title, names in sections.items():
        if names:
            parts.append(f"## {title}")
        for name in names:
            parts += _entry(name, exported[name])
    return "\n\n".join(parts) + "\n"


def _entry(name: str, value: Any) -> Iterator[str]:
    """A name with its docstring, and of a class its own public methods and properties."""
    yield f"### `stars.{name}`"
    if not isinstance(value, type):
        yield _code(f"{name}{_signature(value)}")
        yield _doc(value)
        return
    if issubclass(value, Exception):
        yield f"{_doc(value)} Derives from `{value.__mro__[1].__name__}`."
        return
    if issubclass(value, enum.Enum):
        yield _doc(value)
        yield "\n".join(f"- `{name}.{member.name}`" for member in value)
        return
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    if fields or hasattr(value, "_fields"):
        yield _code(_fields(value))
    elif name not in BEYOND and value.__init__ is not object.__init__:  # type: ignore[misc]
        yield _code(f"{name}{_signature(value.__init__, bound=True)}")  # type: ignore[misc]
    yield _doc(value)
    for method, member in vars(value).items():
        called = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not getattr(called, "__doc__", None) or method in {field.name for field in fields}:
            continue
        if method not in BEYOND[name] if name in BEYOND else method.startswith("_"):
            continue
        if isinstance(called, property):
            yield f"**`{name}.{method}`** (property)\n\n{_doc(called)}"
        elif inspect.isfunction(called):
            waits = "async " if inspect.iscoroutinefunction(called) else ""
            signature = _signature(called, bound=not isinstance(member, staticmethod))
            yield f"{_code(f'{waits}{name}.{method}{signature}')}\n\n{_doc(called)}"


def _fields(value: type) -> str:
    """The source of a class' fields, with their comments."""
    lines, kept = inspect.getsource(value).splitlines(), []
    first, *rest = ast.parse("\n".join(lines)).body[0].body  # type: ignore[attr-defined]
    docstring = first.end_lineno if ast.get_docstring(ast.Module([first, *rest], [])) is not None else 0
    for line in lines[docstring:]:  # whose lines on parameters look like fields
        if re.match(r"    \w+: [^#]*", line) or kept and line.startswith("    # "):
            kept.append(line)
        elif re.match(r"    (def |@)", line):
            break
        elif line.startswith("    # "):
            kept.append(line)
    return f"class {value.__name__}:\n" + "\n".join(kept)


def _signature(function: Callable[..., Any], bound: bool = False) -> str:
    """As it is written, without what nobody is meant to give."""
    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items()
                  if not (bound and name in ("self", "cls")) and name != "others"]  # which are refused by name
    kinds = [parameter.kind for parameter in parameters]
    if bound and kinds and kinds[0] is inspect.Parameter.POSITIONAL_ONLY:  # a slash after self alone
        parameters = [parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) if parameter.kind
                      is inspect.Parameter.POSITIONAL_ONLY else parameter for parameter in parameters]
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature.replace(parameters=parameters)))


def _code(text: str) -> str:
    """A block; a long signature with a line for each few parameters."""
    if "\n" not in text and len(text) > 100:
        text = "\n    ".join(textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False))
    return f"```\n{text}\n```"


def _doc(value: Any) -> str:
    """The docstring as paragraphs; a line that explains a parameter begins a new one."""
    text = inspect.cleandoc(value.__doc__ or "")
    return re.sub(r"\n+(?=\w+(?:, \w+)*: )", "\n\n", text)


# -- the figures ------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One setting."""

    label: str
    tokens: float  # that the language model drew for a text
    reward: float
    low: float
    high: float


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 52, 24, 34, 44


def figures() -> dict[str, str]:
    """The text of each file under docs/figures."""
    rows = json.loads((RESULTS / "cpu-choices.json").read_text())["rows"]
    plain = {"segment_size": 16, "quantile": 0.9, "beta": 0.1}
    chosen: dict[str, list[Point]] = {name: [] for name in plain}
    for row in rows:
        setting = row["setting"]
        values = {"segment_size": row["parameters"]["segment_size"], "quantile": _number(r"q=([\d.]+)", setting),
                  "beta": _number(r"beta=([\d.]+) spreads", setting)}
        changed = [name for name, value in plain.items() if values[name] != value]
        for name in changed or plain:  # the setting that all three share is in all of them
            chosen[name].append(Point(f"{values[name]:g}", row["lm_tokens"], row["mean_reward"],
                                      *row["mean_reward_95"]))
    titles = {"segment_size": "segment_size B", "quantile": "threshold, as a quantile of plain samples' rewards",
              "beta": "beta, in spreads of plain samples' rewards"}
    return {f"{name}.svg": _chart(titles[name], sorted(points, key=lambda point: float(point.label)))
            for name, points in chosen.items()}


def serving() -> dict[str, str]:
    """The chart of benchmarks/serving_load.py, once there is a result of it."""
    if not (RESULTS / "serving.json").is_file():
        return {}
    result = json.loads((RESULTS / "serving.json").read_text())
    titles = {"aligned": "STARS, with the reward", "plain": "plain samples"}
    panels = [_load_panel(title, result[name]) for name, title in titles.items() if name in result]
    points = [point for name in titles if name in result for point in result[name]["points"]]
    lengths, shares = [[point[key] for point in points] for key in ("input_tokens", "client_cpu_share")]
    settings = result["settings"]
    shortest, longest = min(one["min"] for one in lengths), max(one["max"] for one in lengths)
    words = (f"prompts of {shortest} to {longest} tokens (median {lengths[-1]['median']}), answers of at most "
             f"{settings['max_tokens']}; the client took {min(shares):.2f} to {max(shares):.2f} of a core")
    notes = [f"{settings['model']} on {result['machine']['cores']} cores; {words}",
             *(f"{titles[name]}: capacity {result[name]['capacity']:.3g} requests/s, "
               f"{result[name]['closed_loop']['output_throughput']:.0f} tokens/s, idle median "
               f"{result[name]['idle']['median_ttft_ms']:.0f} ms" for name in titles if name in result)]
    rivals = {name: one for name, one in result.get("rivals", {}).items() if isinstance(one, dict)}
    if rivals:
        panels.append(_rivals_panel(rivals))
        notes.append(f"The third panel: the same {settings['max_tokens']} tokens in bfloat16, each server alone; "
                     "answered within a minute of those that came at the higher rate: " + ", ".join(
                         f"{name} {one['points'][-1]['completed']} of {one['points'][-1]['requests']}"
                         for name, one in rivals.items()))
    title = "stars serve, from idle to more than it can do: time to the first segment"
    return {"serving.svg": svg(title, panels, notes)}


def _load_panel(title: str, found: dict[str, Any]) -> Panel:
    """Percentiles of the time to the first segment over the load."""
    points = found["points"]
    series = [Series(words, [(point["load_percent"], point[key]) for point in points if point[key] is not None], color)
              for color, (words, key) in enumerate((("median", "median_ttft_ms"), ("90 %", "p90_ttft_ms"),
                                                    ("99 %", "p99_ttft_ms")))]
    bound = 3 * found["idle"]["median_ttft_ms"]
    last = points[-1]["load_percent"]
    series.append(Series("3 x idle median", [(0.0, bound), (last, bound)], 4, "dashed"))
    height = log_axis("milliseconds", [value for one in series for _, value in one.points])
    return Panel(title, even_axis("load, % of capacity", 0.0, last), height, series)


def _rivals_panel(rivals: dict[str, dict[str, Any]]) -> Panel:
    """The 99th percentile of the time to the first tokens of several servers over the requests that came."""
    def short(name: str) -> str:
        return name.replace(" serve", "").replace(", continuous batching", ", batched").replace(", CPU build", "")

    series = [Series(short(name), [(point["offered_rate"], point["p99_ttft_ms"]) for point in one["points"]
                                   if point["p99_ttft_ms"] is not None], color)
              for color, (name, one) in enumerate(rivals.items())]
    last = max(point["offered_rate"] for one in rivals.values() for point in one["points"])
    height = log_axis("milliseconds", [value for one in series for _, value in one.points])
    return Panel("plain samples in bfloat16, 99 %", even_axis("requests/s that came", 0.0, last), height, series)


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"{text!r} has no {pattern}"
    return float(found[1])


def _chart(title: str, points: Sequence[Point]) -> str:
    """Mean reward over tokens drawn, a point a setting, with 95 % intervals."""
    right = 100 * (1 + int(max(point.tokens for point in points) // 100))
    low = int(10 * min(point.low for point in points)) / 10 - 0.1
    high = int(10 * max(point.high for point in points)) / 10 + 0.2

    def x(tokens: float) -> float:
        return LEFT + tokens / right * (WIDTH - LEFT - RIGHT)

    def y(reward: float) -> float:
        return TOP + (high - reward) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             'font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="18" font-weight="bold">{title}</text>',
             f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#555"/>',
             f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
             'tokens drawn for a text of at most 128</text>',
             f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
             'mean reward</text>']
    for tick in range(0, right + 1, 100):
        lines.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    step = 0.2 if high - low < 1.5 else 0.5
    for index in range(int(low / step), int(high / step) + 1):
        if low <= index * step <= high:
            lines.append(f'<text x="{LEFT - 6}" y="{y(index * step) + 4:.1f}" text-anchor="end">{index * step:.1f}'
                         '</text>')
    path = " ".join(f"{x(point.tokens):.1f},{y(point.reward):.1f}" for point in points)
    lines.append(f'<polyline points="{path}" fill="none" stroke="#9bb8d3"/>')
    for index, point in enumerate(points):
        where, below = x(point.tokens), 16 if index % 2 else -8
        lines.append(f'<path d="M{where:.1f} {y(point.low):.1f}V{y(point.high):.1f}" stroke="#1f5f99"/>'
                     f'<circle cx="{where:.1f}" cy="{y(point.reward):.1f}" r="4" fill="#1f5f99"/>'
                     f'<text x="{where + 4:.1f}" y="{y(point.reward) + below:.1f}">{point.label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def pages() -> dict[Path, str]:
    """All that is made, by where it belongs."""
    drawn = figures() | serving()
    return {DOCS / "api.md": api(), **{DOCS / "figures" / name: text for name, text in drawn.items()}}


def main() -> None:
    """Writes what is made."""
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf8")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
