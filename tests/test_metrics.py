"""The engine's metrics: text that parses, counters that are the sums of outputs, gauges of the moment, and nothing lost
or counted twice, whatever stops a call."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import stars
from stars import metrics
from stars.exhaustions import BackUp
from stars.exposition import Family, Histogram, exposition
from stars.serve.http.app import build_app
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings
from test_conservation import Trouble
from toy import ToyModel, ids, table_reward, toy_engine

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.filterwarnings("ignore:reward_threshold")]

ROOT = Path(__file__).resolve().parents[1]
LM = ToyModel(vocab=5, seed=1, layers=1, positions=96)
RM = ToyModel(vocab=5, seed=3, layers=1, positions=96, head="reward", sharpness=1.5)
REWARD = table_reward(seed=3)
POLICIES = [
    stars.STARS(4, 6, 0.5, 0.3, 1.0), stars.STARS(3, 2, 1.0, 0.0, 3.0, width=1, exhaust=BackUp(2, "first")),
    stars.STARS(4, 2, 0.5, 0.0, 2.0, exhaust="relax:0.5"), stars.Sample(score=True), stars.Sample(), stars.BestOfN(3),
    stars.RejectionSampling(2.0, 0.3, 5, width=2), stars.RejectionSampling(9.0, 0.3, 3, exhaust="refuse"),
    stars.SpeculativeRejection(3, 0.4, 4), stars.SegmentBeam(2, 2, 4), stars.ParticleFilter(3, 0.5, 4),
    stars.ARGS(topk=3), stars.STARS(4, 3, 0.5, 0.3, 2.0, barrier=True, exhaust="softmax:0.5")]
WHOLE = [name for name in metrics.COUNTS if not name.endswith("_seconds")]


def rewards(prompt, responses):
    return [REWARD(response) for response in responses]


def engine(reward=None, **options) -> stars.Engine:
    reward = stars.FunctionReward(rewards, inputs="ids") if reward is None else reward
    return toy_engine(LM, reward, **(dict(cache_tokens=96, page_size=4, max_num_seqs=8, max_num_lanes=12) | options))


def prompt(seed: int = 0, length: int = 9) -> dict:
    return {"prompt_token_ids": ids(length, seed=seed)}


# -- the text ---------------------------------------------------------------------------------------------------------


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)')
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), text)


def parsed(text: str) -> dict[str, tuple[str, str, list[tuple[str, dict[str, str], float]]]]:
    """(kind, help, samples) by name, of a text in the format 0.0.4; AssertionError where it is not one."""
    assert text.endswith("\n") and "\r" not in text
    found: dict = {}
    name = None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name, help_ = line[len("# HELP "):].split(" ", 1)
            assert name not in found, "samples of a family stand together"
            assert not re.search(r"\\(?![\\n])", help_)
            found[name] = (None, unescaped(help_), [])
        elif line.startswith("# TYPE "):
            named, kind = line[len("# TYPE "):].split(" ")
            assert named == name and found[name][0] is None and not found[name][2] and kind in SUFFIXES
            found[name] = (kind, *found[name][1:])
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample is not None and name is not None, line
            kind, _, samples = found[name]
            assert sample[1].startswith(name) and sample[1][len(name):] in SUFFIXES[kind], line
            labels = [(one, unescaped(value)) for one, value in LABEL.findall(sample[2] or "")]
            assert len(dict(labels)) == len(labels)
            key = sample[1][len(name):], dict(labels)
            assert key not in [one[:2] for one in samples], "a sample comes once"
            assert re.fullmatch(r"[+-]Inf|NaN|[+-]?\d+(\.\d+)?(e[+-]?\d+)?", sample[3]), line
            samples.append((*key, float(sample[3])))
    return found


def test_the_text_parses_and_says_what_the_snapshot_says():
    made = engine(max_model_len=60)
    made.generate([prompt(seed) for seed in range(5)], stars.SamplingParams(max_tokens=20, seed=1, n=2), POLICIES[0],
                  use_tqdm=False)
    labels = {"model_name": 'a "b" \\c\nd', "engine": "0"}
    text, shown = parsed(made.metrics.text(**labels)), made.metrics.snapshot()
    assert text.keys() == shown.keys()
    for name, (kind, help_, samples) in text.items():
        assert name.startswith("stars:") and help_ and kind is not None
        assert all(labels.items() <= own.items() for _, own, _ in samples)
        assert name.endswith("_total") == (kind == "counter") or name == "stars:iteration_tokens_total"
        value = shown[name]
        if kind != "histogram":
            values = value if isinstance(value, dict) else {None: value}
            assert {own.get("finished_reason"): number for _, own, number in samples} == values
            continue
        buckets = [(own["le"], number) for suffix, own, number in samples if suffix == "_bucket"]
        bounds, counts = [float(bound) for bound, _ in buckets], [number for _, number in buckets]
        assert bounds == sorted(set(bounds)) and buckets[-1][0] == "+Inf" and counts == sorted(counts)
        assert (tuple(bounds[:-1]), value.total) == (value.bounds, counts[-1])
        assert [after - before for before, after in zip([0, *counts], counts, strict=False)] == list(value.counts)
        assert {suffix: number for suffix, _, number in samples if suffix != "_bucket"} == {
            "_sum": value.sum, "_count": value.total}
    assert parsed(made.metrics.text()).keys() == text.keys()


def test_numbers_helps_and_ranges():
    family = Family("a:b", "histogram", "one\\two\nthree", {"": Histogram((0.5, 1.0, 1e-7), (1, 0, 2, 3), math.nan)})
    assert exposition([family], {}) == (
        '# HELP a:b one\\\\two\\nthree\n# TYPE a:b histogram\na:b_bucket{le="0.5"} 1\na:b_bucket{le="1.0"} 1\n'
        'a:b_bucket{le="1e-07"} 3\na:b_bucket{le="+Inf"} 6\na:b_sum NaN\na:b_count 6\n')
    gauge = Family("g", "gauge", "h", {"x": -math.inf, "y": 2}, "kind")
    assert exposition([gauge], {"a": "b"}).endswith('g{a="b",kind="x"} -Inf\ng{a="b",kind="y"} 2\n')


@pytest.mark.parametrize("bounds, value, place", [((1.0, 2.0), 1.0, 0), ((1.0, 2.0), 1.5, 1), ((1.0, 2.0), 2.5, 2)])
def test_a_range_includes_its_bound(bounds, value, place):
    news = metrics._News({"h": ((0, 0, 0), 0.0)}, {"h": bounds})
    news.observe("h", value, 2)
    news.write()
    counts, total = news._state["h"]
    assert counts[place] == sum(counts) == 2 and total == 2 * value


@pytest.mark.parametrize("labels", [{"le": "1"}, {"finished_reason": "stop"}, {"a-b": "c"}, {"": "c"}, {"__a": "c"},
                                    {"a": 1}, {"a\n": "c"}, {"1a": "c"}])
def test_what_cannot_be_a_label_is_refused(labels):
    with pytest.raises(stars.RequestError, match="cannot be a label of metrics: give a text, and a name of"):
        engine().metrics.text(**labels)


def test_every_metric_has_its_line_in_the_docs():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf8")
    rows = Counter(re.findall(r"^\| `(stars:\w+)` ", page, re.MULTILINE))
    kinds = {name: kind for name, kind in re.findall(r"^\| `(stars:\w+)` \| (\w+) ", page, re.MULTILINE)}
    served = stars.AsyncEngine(engine())
    with TestClient(build_app(Service(served, ServerSettings("tiny")))) as client:
        client.get("/health")
        shown = parsed(client.get("/metrics").text)
    asyncio.run(served.shutdown())
    assert rows.keys() == shown.keys() and set(rows.values()) == {1}
    assert kinds == {name: kind for name, (kind, _, _) in shown.items()}


# -- counts -----------------------------------------------------------------------------------------------------------


def test_every_count_of_an_output_is_a_counter():
    assert metrics.COUNTS.keys() == {one.name for one in dataclasses.fields(stars.Metrics)} - {"width"}


def rising(shown: dict) -> dict[str, float]:
    """What may never go down, of a snapshot."""
    found = {}
    for name, value in shown.items():
        if isinstance(value, Histogram):
            assert sum(value.counts) == value.total and min(value.counts) >= 0 and value.sum >= 0
            found |= {f"{name} {index}": count for index, count in enumerate(value.counts)} | {name: value.sum}
        elif isinstance(value, dict):
            found |= {f"{name} {reason}": count for reason, count in value.items()}
        elif name.endswith("_total"):
            found[name] = value
    return found


def check_sums(made: stars.Engine, outputs: list[stars.RequestOutput]) -> None:
    """Counters and histograms are those of the outputs of all requests there were, which have ended."""
    shown = {name.removeprefix("stars:"): value for name, value in made.metrics.snapshot().items()}
    completions = [completion for output in outputs for completion in output.outputs]
    for name in WHOLE:
        assert shown[f"{name}_total"] == sum(getattr(output.metrics, name) for output in outputs), name
    for name in ("lm_seconds", "rm_seconds"):
        wanted = sum(getattr(one.metrics, name) for one in completions)
        assert shown[f"{name}_total"] == pytest.approx(wanted, abs=2e-9 * len(completions)), name
    assert shown["generation_tokens_total"] == sum(len(one.token_ids) for one in completions)
    assert +Counter(shown["request_success_total"]) == Counter(one.finish_reason for one in completions)
    lengths = [len(output.prompt_token_ids) for output in outputs]
    read = [length for output, length in zip(outputs, lengths, strict=True) if output.times.prefilled is not None]
    assert shown["prompt_tokens_total"] == sum(read)
    times = [output.times for output in outputs]
    rates = [one.metrics.accept_rate for one in completions if one.metrics.accept_rate is not None]
    for name, values in {
            "request_prompt_tokens": lengths, "request_params_n": [len(output.outputs) for output in outputs],
            "request_generation_tokens": [len(one.token_ids) for one in completions],
            "request_max_num_generation_tokens": [max(len(one.token_ids) for one in output.outputs)
                                                  for output in outputs],
            "request_width": [one.metrics.width or None for one in completions], "request_accept_rate": rates,
            "e2e_request_latency_seconds": [one.finished for one in times],
            "request_queue_time_seconds": [one.admitted for one in times],
            "time_to_first_token_seconds": [one.first_segment for one in times],
            "request_prefill_time_seconds": [one.phases().get("prefill") for one in times],
            "request_decode_time_seconds": [one.phases().get("decode") for one in times],
            "request_inference_time_seconds": [one.phases().get("inference") for one in times]}.items():
        values = [value for value in values if value is not None]
        assert (shown[name].total, shown[name].sum) == (len(values), pytest.approx(sum(values))), name
    later = shown["inter_token_latency_seconds"].total
    assert later <= shown["generation_tokens_total"] - sum(bool(one.token_ids) for one in completions)
    assert shown["iteration_tokens_total"].sum <= shown["generation_tokens_total"] + shown["prompt_tokens_total"]
    for one in times:
        reached = [moment for moment in one[:4] if moment is not None]
        assert [0.0, *reached, one.finished] == sorted([0.0, *reached, one.finished])


def nothing_stays(made: stars.Engine) -> None:
    """No request is remembered."""
    assert not [key for key in made.metrics._state if not isinstance(key, (str, tuple))]


@pytest.mark.parametrize("kind", ["causal", "function", "blocking"])
@pytest.mark.parametrize("seed", range(3))
def test_counters_are_the_sums_of_outputs_and_never_go_down(kind, seed):
    """Over aborts, errors, interrupts, segments that are taken back, populations, and pages that run out."""
    chance, trouble = random.Random(f"{kind} {seed}"), Trouble()
    reward = stars.CausalReward(RM.decoder()) if kind == "causal" else stars.FunctionReward(
        trouble, inputs="ids", blocking=kind == "blocking")
    made = engine(reward, max_num_batched_tokens=chance.choice([None, 5]))
    taken, take_back = [], made._round._committer.take_back
    made._round._committer.take_back = lambda hypothesis: (taken.append(hypothesis), take_back(hypothesis))
    done: dict[str, stars.RequestOutput] = {}
    before = rising(made.metrics.snapshot())
    added, refused, unfinished = 0, 0, set()
    while added < 120 or made.has_unfinished_requests():
        what = chance.random()
        try:
            if added < 120 and what < 0.3:
                added += 1
                params = stars.SamplingParams(max_tokens=chance.randint(1, 24), n=chance.choice([1, 1, 3]), seed=added,
                                              ignore_eos=chance.random() < 0.7)
                unfinished.add(made.add_request(prompt(added % 4, chance.randint(1, 20)), params,
                                                chance.choice(POLICIES)))
            elif what < 0.32 and unfinished:
                made.abort(chance.choice(sorted(unfinished)))
            elif what < 0.35:
                made._cache.commit = interrupt
                collect(made, done, unfinished)
            elif what < 0.43:
                trouble.next = chance.choice(["raise", "nan", "interrupt", "-inf"])
                collect(made, done, unfinished)
            else:
                collect(made, done, unfinished)
        except KeyboardInterrupt:
            pass
        except stars.RequestError as error:  # it has never been a request
            assert "which do not fit cache_tokens=96" in str(error)
            refused += 1
        finally:
            trouble.next = None
            vars(made._cache).pop("commit", None)
        after = rising(made.metrics.snapshot())
        fallen = {name: (value, after[name]) for name, value in before.items() if after[name] < value}
        assert not fallen
        before = after
    assert len(done) == 120 - refused > 100
    check_sums(made, list(done.values()))
    nothing_stays(made)
    assert taken and made.metrics.snapshot()["stars:num_preemptions_total"] > 0, "the run has not what it is to test"


def test_what_gave_way_goes_back_no_further_than_that():
    """One of several whole responses had its first piece counted and gave way, the other goes on: an interrupt of its
    round takes nothing back that was counted before."""
    made, params = engine(cache_tokens=512), stars.SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
    wanted = made.generate(prompt(), params, stars.BestOfN(2), use_tqdm=False)[0]
    made.add_request(prompt(), params, stars.BestOfN(2))
    [(first, second)] = [group.hypotheses for request in made._requests.values() for group in request.groups]
    while not second.drafts:
        made.step()
    made._scheduler._preempt(made._scheduler.running[-1])
    made.step()
    assert (first.drafts, second.drafts) == (2, 1)
    made._cache.commit = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.step()
    del made._cache.commit
    made.check_integrity()
    assert (first.drafts, second.drafts) == (2, 1)
    assert second.metrics.attempts == 1 and second.metrics.lm_tokens_drawn == len(second.token_ids) > 0
    done: dict[str, stars.RequestOutput] = {}
    while made.has_unfinished_requests():
        collect(made, done, set())
    [output] = done.values()
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    check_sums(made, [wanted, output])


def test_what_was_cached_is_counted_at_the_first_admission():
    """One of two whole responses gave way before it drew anything, and its group was counted: once it comes back to an
    emptied cache it still says what it found at first."""
    made, params = engine(cache_tokens=512), stars.SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
    made.generate(prompt(), params, stars.BestOfN(2), use_tqdm=False)
    made.add_request(prompt(), params, stars.BestOfN(2))
    made._schedule()
    made._scheduler._preempt(made._scheduler.running[0])
    made.step()
    before = rising(made.metrics.snapshot())
    made._cache.commit = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.step()
    del made._cache.commit
    while made.has_unfinished_requests():
        [output] = made.step() or [None]
        after = rising(made.metrics.snapshot())
        assert not {name: (value, after[name]) for name, value in before.items() if after[name] < value}
    assert output.metrics.prompt_tokens_cached == 2 * 8


def interrupt(*given):
    raise KeyboardInterrupt


def collect(made: stars.Engine, done: dict[str, stars.RequestOutput], unfinished: set[str]) -> None:
    """One step; the outputs of what ended."""
    for output in made.step():
        if output.finished:
            done[output.request_id] = output
            unfinished.discard(output.request_id)


def test_tokens_are_counted_as_they_become_history():
    """After each step of a long request: what is committed, and no segment that may be taken back yet."""
    made = engine()
    params = stars.SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
    for policy in POLICIES[:2]:
        made.add_request(prompt(), params, policy)
        base, seen = made.metrics.snapshot()["stars:generation_tokens_total"], []
        while made.has_unfinished_requests():
            for output in made.step():
                shown = made.metrics.snapshot()
                seen.append(shown["stars:generation_tokens_total"] - base)
                assert seen[-1] == len(output.outputs[0].token_ids)
        assert len(set(seen)) > 4 and seen[-1] == 24


def test_times_between_segments():
    """Every token after the first segment is one value of the latency between tokens."""
    made = engine()
    outputs = made.generate([prompt(seed) for seed in range(6)],
                            stars.SamplingParams(max_tokens=20, seed=2, n=2, ignore_eos=True), POLICIES[0],
                            use_tqdm=False)
    completions = [completion for output in outputs for completion in output.outputs]
    shown = made.metrics.snapshot()
    later = [sum(len(segment.token_ids) for segment in one.segments[1:]) for one in completions]
    between, each = (shown[f"stars:{name}"] for name in (
        "inter_token_latency_seconds", "request_time_per_output_token_seconds"))
    assert between.total == sum(later) > 0
    assert each.total == sum(map(bool, later))
    last = [output.times.last_segment - output.times.first_segment for output in outputs]
    assert between.sum <= 2 * sum(last) * (1 + 1e-9) and between.sum >= sum(last) * (1 - 1e-9)
    rounds = shown["stars:iteration_tokens_total"]
    assert rounds.sum == sum(len(one.token_ids) for one in completions) + sum(len(output.prompt_token_ids)
                                                                               for output in outputs)


def test_who_ends_before_it_is_admitted_has_no_times():
    made = engine()
    name = made.add_request(prompt(), stars.SamplingParams(max_tokens=9), POLICIES[0])
    assert made.abort(name)
    [output] = made.step()
    assert output.times[:4] == (None,) * 4 and output.times.finished > 0
    shown = made.metrics.snapshot()
    assert shown["stars:prompt_tokens_total"] == 0 and shown["stars:request_success_total"]["abort"] == 1
    check_sums(made, [output])


# -- interrupts -------------------------------------------------------------------------------------------------------


TRACED = ("metrics.py", "engine.py")
FUNCTIONS = {"committed", "ended", "forget", "reset", "observe", "write", "get", "__init__", "_grow", "_settle",
             "_run_round", "_recover"}


class InterruptAt:
    """Raises KeyboardInterrupt before the `count`-th bytecode of what counts and of who tells it; counts them all."""

    def __init__(self, count: int = 0):
        self.count, self.seen = count, 0

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def call(self, frame, event, argument):
        name = frame.f_code.co_filename
        if not name.endswith(TRACED) or frame.f_code.co_name not in FUNCTIONS:
            return None
        frame.f_trace_opcodes = True
        return self.instruction

    def instruction(self, frame, event, argument):
        if event == "opcode":
            self.seen += 1
            if self.seen == self.count:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.instruction


def interrupted_run(made: stars.Engine, count: int) -> tuple[list[stars.RequestOutput], int]:
    """The last outputs of three requests, one of them aborted, and the bytecodes there were."""
    done: dict[str, stars.RequestOutput] = {}
    requests = []
    for seed, policy in enumerate((POLICIES[0], POLICIES[1], POLICIES[9])):
        name = made.add_request(prompt(seed), stars.SamplingParams(max_tokens=9, seed=seed, n=1 + seed % 2), policy)
        requests.append(made._requests[name])
    with InterruptAt(count) as interrupts:
        aborted = False
        while made.has_unfinished_requests():
            try:
                collect(made, done, set())
                if not aborted:
                    made.abort(requests[0].request_id)
                    aborted = True
            except KeyboardInterrupt:
                before = rising(made.metrics.snapshot())
        if interrupts.seen >= count > 0:
            after = rising(made.metrics.snapshot())
            assert not [name for name, value in before.items() if after[name] < value]
    return [request.output() for request in requests], interrupts.seen


def every_request_counts_once(step: int) -> None:
    _, total = interrupted_run(engine(), 0)
    for count in range(1, total, step):
        made = engine()
        outputs, _ = interrupted_run(made, count)
        check_sums(made, outputs)
        nothing_stays(made)


def test_every_request_counts_once_wherever_an_interrupt_falls():
    every_request_counts_once(61)


@pytest.mark.slow
def test_every_request_counts_once_at_every_seventh_bytecode():
    every_request_counts_once(7)


# -- gauges -----------------------------------------------------------------------------------------------------------


def test_gauges_in_the_middle_of_a_round():
    """While a round stands still in its reward, another thread reads what is true then, and waits for nobody."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(given, responses):
        inside.set()
        assert go_on.wait(60)
        return rewards(given, responses)

    made = engine(stars.FunctionReward(slow, inputs="ids"), max_num_seqs=2)
    params = stars.SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    thread = threading.Thread(target=lambda: made.generate(
        [prompt(seed) for seed in range(5)], params, POLICIES[3], use_tqdm=False))
    thread.start()
    try:
        assert inside.wait(60)
        shown = made.metrics.snapshot()
        assert parsed(made.metrics.text())["stars:num_requests_running"][2] == [("", {}, 2.0)]
        free = made._cache.num_free_pages
        assert (shown["stars:num_requests_running"], shown["stars:num_requests_waiting"]) == (2, 3)
        assert shown["stars:kv_cache_usage_perc"] == 1 - free / made._cache.num_pages > 0
        assert shown["stars:prompt_tokens_total"] == shown["stars:generation_tokens_total"] == 0
    finally:
        go_on.set()
        thread.join()
    shown = made.metrics.snapshot()
    assert [shown[f"stars:{name}"] for name in metrics.GAUGES] == [0, 0, 0, 0]


def test_the_reward_models_cache_has_a_gauge():
    made = engine(stars.CausalReward(RM.decoder()))
    made.add_request(prompt(), stars.SamplingParams(max_tokens=12, seed=1, ignore_eos=True), POLICIES[0])
    made.step()
    cache = made.reward.cache
    assert made.metrics.snapshot()["stars:reward_kv_cache_usage_perc"] == 1 - cache.num_free_pages / cache.num_pages > 0


def test_what_caches_found_is_counted_for_both_models():
    made = engine(stars.CausalReward(RM.decoder()))
    for _ in range(2):
        made.generate(prompt(length=14), stars.SamplingParams(max_tokens=4, seed=1), POLICIES[0], use_tqdm=False)
    shown = made.metrics.snapshot()
    for prefix, cache in (("", made._cache), ("reward_", made.reward.cache)):
        found = [shown[f"stars:{prefix}prefix_cache_{what}_total"] for what in ("queries", "hits")]
        assert found == [cache.prefix_queries, cache.prefix_hits] and found[0] > found[1] >= 12


def test_reading_while_others_work():
    """Counters that a thread reads again and again while requests run never go down, and end where they should."""
    made, stop, faults, reads = engine(cache_tokens=400), threading.Event(), [], []

    def read():
        before = rising(made.metrics.snapshot())
        while not stop.is_set():
            after = rising(made.metrics.snapshot())
            faults.extend(name for name, value in before.items() if after[name] < value)
            before = after
            reads.append(len(parsed(made.metrics.text())))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        outputs = made.generate([prompt(seed) for seed in range(60)], stars.SamplingParams(max_tokens=20, seed=1, n=2),
                                [POLICIES[seed % len(POLICIES)] for seed in range(60)], use_tqdm=False)
    finally:
        stop.set()
        thread.join()
    assert not faults and len(reads) > 3
    check_sums(made, outputs)


def test_engines_count_apart():
    one, other = engine(), engine()
    one.generate(prompt(), stars.SamplingParams(max_tokens=5), use_tqdm=False)
    assert one.metrics.snapshot()["stars:attempts_total"] == 1
    assert not any(rising(other.metrics.snapshot()).values())
