"""A trace as one self-contained page: no network, no scripts but its own, every text escaped.

The page is complete without scripts; they only choose which request and which segment's attempts are in sight.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stars.cli.terminal import visible
from stars.trace.charts import attempts_histogram, rewards_chart
from stars.trace.records import TraceAttempt, TraceCompletion, TraceRequest, TraceSegment
from stars.trace.show import describe_policy, number, prompt_text

LOW, MIDDLE, HIGH = (196, 84, 26), (140, 140, 140), (0, 128, 128)
"""Colours of low and high rewards: orange and teal, which most colour-blind readers tell apart."""
WORDS = {"accepted": "accepted", "fallback": "kept after the last attempt", "rejected": "rejected",
         "skipped": "drawn but not needed", "kept": "kept", "lower": "lower reward"}
FIGURES = (
    ("segments", "segments"), ("attempts_counted", "attempts up to the winner"), ("attempts", "attempts drawn"),
    ("accepted", "accepted"), ("fallbacks", "fallbacks"), ("accept_rate", "accept rate"), ("width", "width"),
    ("lm_tokens_drawn", "LM tokens drawn"), ("lm_tokens_kept", "LM tokens kept"),
    ("rm_tokens_scored", "RM tokens scored"), ("rm_tokens_full_rescore", "RM tokens of a full re-score"),
    ("prompt_tokens_cached", "prompt tokens found in the cache"),
    ("rm_tokens_cached", "prompt tokens found in the RM's cache"),
)


def page(requests: Sequence[TraceRequest], title: str) -> str:
    """The page of these requests."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf8")
    body = "\n".join(_request(index, request) for index, request in enumerate(requests))
    parts = {"TITLE": escape(title), "PICKER": _picker(requests), "BODY": body or "<p>The trace holds no requests.</p>"}
    # One pass over the template alone: a text that happens to hold a mark is never looked at.
    return re.sub("@([A-Z]+)@", lambda mark: parts[mark[1]], template)


def escape(text: str) -> str:
    """Text for HTML, between tags or in quoted attributes; control characters become visible signs."""
    return html.escape(visible(text.replace("\r\n", "\n")).encode("utf8", "replace").decode("utf8"), quote=True)


def _picker(requests: Sequence[TraceRequest]) -> str:
    if len(requests) < 2:
        return ""
    choices = [f'<option value="r{index}">{escape(f"{request.request_id}: {_brief(request)}")}</option>'
               for index, request in enumerate(requests)]
    choices.append('<option value="all">all</option>')
    return f'<label>Request <select id="picker">{"".join(choices)}</select></label>'


def _brief(request: TraceRequest) -> str:
    text = " ".join(prompt_text(request).split())
    return text if len(text) <= 60 else text[:59] + "…"


def _request(index: int, request: TraceRequest) -> str:
    # Colours spread over what was committed and aimed at, where there is an aim: the rejected attempts would squeeze
    # the committed ones to one end.
    segments = [segment for completion in request.completions for segment in completion.segments]
    aimed = [attempt for attempt in (segment.committed for segment in segments) if attempt.threshold is not None]
    values = [value for attempt in aimed or [a for segment in segments for a in segment.attempts]
              for value in (attempt.reward, attempt.threshold) if value is not None and math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    parts = [f'<section class="request" id="r{index}" aria-label="{escape(f"request {request.request_id}")}">',
             f"<h2>Request {escape(request.request_id)}</h2>",
             f'<p class="policy">{escape(describe_policy(request.policy))}</p>']
    parts += [_completion(request, completion, low, high) for completion in request.completions]
    parts.append("</section>")
    return "\n".join(parts)


def _completion(request: TraceRequest, completion: TraceCompletion, low: float, high: float) -> str:
    segments = completion.segments
    name = f"Completion {completion.index}" if len(request.completions) > 1 else "Text"
    text = "".join(_segment(segment, low, high) for segment in segments)
    error = f'<p class="error">{escape(completion.error)}</p>' if completion.error is not None else ""
    details = "".join(_details(segment) for segment in segments)
    scored = any(a.reward is not None for segment in segments for a in segment.attempts)
    charts = ""
    if scored and segments:
        title = "Reward and threshold" if segments[0].committed.threshold is not None else "Reward"
        charts = (f'<div class="card"><h3>{title} over segments</h3><div class="scroll">{rewards_chart(segments)}</div>'
                  f"{_chart_legend(segments)}</div>")
    figures = [_card("Figures", _table(_figures(completion))), _card("Time", _times(completion.metrics))]
    if any(a.threshold is not None for segment in segments for a in segment.attempts):
        figures.insert(1, _card("Attempts a segment needed", attempts_histogram(segments)))
    if completion is request.completions[-1]:
        figures.append(_parameters(request))
    return f"""<div class="completion">
<div class="columns"><div>
<div class="card"><h3>{name}</h3>
<div class="text"><span class="prompt">{escape(prompt_text(request))}{_gap(request)}</span>{text}</div>
{_legend(segments, low, high) if scored else ""}{error}</div>
{charts}
<div class="figures">{"".join(figures)}</div></div>
<aside class="card details" aria-live="polite" aria-label="attempts of the chosen segment">{details}</aside>
</div></div>"""


def _gap(request: TraceRequest) -> str:
    """A prompt that is not text the response continues stands in lines of its own."""
    return "" if isinstance(request.prompt, str) else "\n\n"


def _segment(segment: TraceSegment, low: float, high: float) -> str:
    attempt = segment.committed
    status = segment.status(attempt)
    words = f"segment {attempt.segment + 1}, {WORDS[status]}, reward {number(attempt.reward)}"
    if attempt.threshold is not None:
        words += f", threshold {number(attempt.threshold)}, attempt {attempt.attempt}"
    style = ""
    if attempt.reward is not None:
        red, green, blue = _color(attempt.reward, low, high)
        style = f' style="background:rgba({red},{green},{blue},.22);border-color:rgb({red},{green},{blue})"'
    rejected = segment.counted - 1 if attempt.accepted else len(segment.attempts) - 1
    note = f'<sup aria-hidden="true">{rejected}✗</sup>' if rejected and attempt.threshold is not None else ""
    return (f'<span class="segment {status}" role="button" tabindex="0" data-segment="{attempt.segment}" '
            f'aria-label="{escape(words)}: {escape(_text(attempt))}" title="{escape(words)}"{style}>'
            f"{escape(_text(attempt))}{note}</span>")


def _details(segment: TraceSegment) -> str:
    items = []
    for attempt in segment.attempts:
        status = segment.status(attempt)
        facts = [f"<b>{attempt.attempt}</b> {WORDS[status]}"]
        if attempt.reward is not None:
            facts.append(f"reward <b>{number(attempt.reward)}</b>")
        elif status != "skipped":
            facts.append("not scored")
        if attempt.threshold is not None:
            facts.append(f"threshold {number(attempt.threshold)}")
        if attempt.accept_probability is not None:
            facts.append(f"p {attempt.accept_probability:.2f}")
        facts.append(f"logprob {attempt.logprob:.1f}")
        items.append(f'<li class="{status}"><div class="facts">{_spans(facts)}</div>'
                     f'<div class="draft">{escape(_text(attempt))}</div></li>')
    index = segment.committed.segment
    count = len(segment.attempts)
    return (f'<div data-of="{index}"><h3>Segment {index + 1}: {count} attempt{"s" if count != 1 else ""}</h3>'
            f"<ol>{''.join(items)}</ol></div>")


def _spans(parts: Sequence[str]) -> str:
    return " ".join(f"<span>{part}</span>" for part in parts)


def _legend(segments: Sequence[TraceSegment], low: float, high: float) -> str:
    stops = ",".join(f"rgb{_color(low + share * (high - low), low, high)}" for share in (0.0, 0.5, 1.0))
    parts = [f'<span>reward {number(low)}<span class="ramp" style="background:linear-gradient(90deg,{stops})"></span>'
             f"{number(high)}</span>"]
    if any(segment.committed.threshold is not None for segment in segments):
        parts += ["<span>3✗ attempts rejected before it</span>"]
    if any(segment.status(segment.committed) == "fallback" for segment in segments):
        parts.append('<span><span class="swatch dashed"></span>no attempt was accepted, the best one was kept</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def _chart_legend(segments: Sequence[TraceSegment]) -> str:
    parts = ['<span><span class="dot" style="background:var(--accent)"></span>committed</span>']
    if any(len(segment.attempts) > 1 for segment in segments):
        parts.append('<span><span class="dot" style="background:var(--bad);opacity:.55"></span>other attempts</span>')
    if any(segment.committed.threshold is not None for segment in segments):
        parts.append('<span><span class="swatch dashed" style="border-color:var(--warn)"></span>threshold</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def _figures(completion: TraceCompletion) -> list[tuple[str, Any]]:
    metrics = completion.metrics
    rows: list[tuple[str, Any]] = [("ended by", completion.finish_reason or "nothing yet")]
    if completion.stop_reason is not None:
        rows.append(("stop reason", completion.stop_reason))
    rows += [("tokens", len(completion.token_ids)), ("log-probability", f"{completion.cumulative_logprob:.1f}")]
    if completion.reward is not None:
        rows.insert(1, ("reward", number(completion.reward)))
    rows += [(label, f"{metrics[name]:.2f}" if name == "accept_rate" else f"{metrics[name]:,}")
             for name, label in FIGURES if metrics.get(name) is not None]
    return rows


def _times(metrics: dict[str, Any]) -> str:
    language, reward = float(metrics.get("lm_seconds") or 0.0), float(metrics.get("rm_seconds") or 0.0)
    total = language + reward
    share = language / total if total > 0 else 1.0
    kept = metrics.get("lm_tokens_kept") or 0
    rows = [("language model", f"{language:.3f} s"), ("reward model", f"{reward:.3f} s")]
    if kept and total > 0:
        rows.append(("kept tokens a second", f"{kept / total:,.0f}"))
    return (f'<div class="split" role="img" aria-label="language model {share:.0%}, reward model {1 - share:.0%}">'
            f'<i style="width:{100 * share:.1f}%"></i><i style="width:{100 - 100 * share:.1f}%"></i></div>'
            f'<div class="legend"><span><span class="dot" style="background:var(--lm)"></span>LM {share:.0%}</span>'
            f'<span><span class="dot" style="background:var(--rm)"></span>RM {1 - share:.0%}</span></div>'
            + _table(rows))


def _parameters(request: TraceRequest) -> str:
    rows: list[tuple[str, Any]] = [("policy", request.policy["name"])]
    for name, value in request.policy.items():
        if name != "name":
            shown = f"{value:g}" if isinstance(value, float) else value
            rows.append((name, "chosen by the engine" if shown is None else shown))
    sampling: list[tuple[str, Any]] = [("seed", request.seed), ("prompt tokens", f"{len(request.prompt_token_ids):,}")]
    if request.prompt_reward is not None:
        sampling.append(("r(prompt)", number(request.prompt_reward)))
    sampling += [(name, value) for name, value in (request.params or {}).items() if name != "seed"]
    return _card("Policy", _table(rows)) + _card("Sampling", _table(sampling))


def _card(title: str, inside: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{inside}</div>'


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "<table>" + "".join(f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
                               for name, value in rows) + "</table>"


def _color(reward: float, low: float, high: float) -> tuple[int, int, int]:
    share = 0.5 if high <= low else min(1.0, max(0.0, (reward - low) / (high - low)))
    first, second, part = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _text(attempt: TraceAttempt) -> str:
    return attempt.text if attempt.text is not None else " ".join(map(str, attempt.token_ids)) + " "
