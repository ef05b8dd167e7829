"""The host's side of the GPU path, without a GPU: see `fake_cuda`. What kernels compute is not looked at here."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import stars
from apart import is_apart
from editing import edit_tensors
from lora import write_adapter
from process_models import write_process_model
from stars import fit, sizes
from stars.kernels import graph, prefill_attention
from stars.kernels.linear import pack
from stars.kernels.triton import tuned
from stars.model import loaded
from stars.model.decoder import Decoder
from stars.model.heads import Gate
from stars.model.tokenizer import load_tokenizer
from stars.passes import Passes
from stars.target import CUDA
from tiny_models import TinyModel
from triton_process import needs_triton

FAKED = os.environ.get("STARS_TEST_FAKE_CUDA") == "1"
MODELS = Path(stars.__file__).parent / "demo_models"
PROMPTS = ["This film was" + " very good and" * count for count in (0, 5, 40, 120)]
LONG = "I saw it" + " again and again and" * 80  # more rows than are captured

if FAKED:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "device"))
    import importable

    importable.install()
    import fake_cuda

    fake_cuda.install()

    class Products(TorchDispatchMode):
        """Counts a library's products."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return function(*args, **(kwargs or {}))

    @pytest.fixture(autouse=True)
    def no_fault():
        fake_cuda.faults.clear()
        fake_cuda._compiled.clear()  # what one test compiles, another would not be seen to compile
        yield
        assert not fake_cuda.faults, fake_cuda.faults[:10]

    def decode(engine, top_k: int, presence: float) -> None:
        params = [stars.SamplingParams(max_tokens=64, seed=3, top_k=top_k, presence_penalty=presence)] * len(PROMPTS)
        policy = stars.STARS(segment_size=16, max_attempts=8, reward_threshold=0.3, width=4)
        outputs = engine.generate(PROMPTS, params, policy, use_tqdm=False)
        assert [output.outputs[0].error for output in outputs] == [None] * len(PROMPTS)

    @pytest.mark.parametrize(("dtype", "backend", "deterministic"), [
        ("bfloat16", "triton", False), ("float16", "triton", False), ("bfloat16", "sdpa", False),
        ("float32", "triton", True),
    ])
    def test_requests_of_every_kind(monkeypatch, dtype, backend, deterministic):
        """Drafts with filters and penalties and without, scores behind them, commits, prompts short and long."""
        gathered = []  # what a library would be called with; torch's own call does not take fake tensors
        monkeypatch.setitem(prefill_attention.BACKENDS, "sdpa", lambda *given: gathered.append(given))
        seen = []  # whether products keep their order
        for module in ("engine", "reward.causal"):
            monkeypatch.setattr(f"stars.{module}.check_row_invariance", lambda decoder, target: seen.append(
                all(weight is None or weight.deterministic for weight in (decoder.head, decoder.score_head))))
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype=dtype, prefill_backend=backend,
                                  deterministic=deterministic, cache_tokens=8192, max_num_seqs=8, max_num_lanes=16,
                                  max_segment_size=32)
            assert seen == [True, True] * deterministic and engine._models.own.passes.prefill_backend == backend
            # A library that compiles does so at start-up: a call for each layer of both models.
            assert len(gathered) == (backend == "sdpa") * (6 + 3)
            for top_k, presence in ((0, 0.0), (40, 0.2), (0, 0.0), (40, 0.2)):
                decode(engine, top_k, presence)
            captured = fake_cuda.events["capture"]
            engine.generate(PROMPTS, stars.SamplingParams(max_tokens=24, min_tokens=3, logit_bias={5: 1.0}, bad_words=[
                "very good", "film"], presence_penalty=0.2), use_tqdm=False)
            assert fake_cuda.events["capture"] == captured  # what edits is captured at start-up too
            engine.generate(LONG, stars.SamplingParams(max_tokens=4), use_tqdm=False)
            told = engine.generate(PROMPTS, stars.SamplingParams(max_tokens=9, logprobs=3, prompt_logprobs=2),
                                   stars.STARS(segment_size=4, max_attempts=3, reward_threshold=0.3), use_tqdm=False)
            for output in told:
                assert output.outputs[0].error is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
                assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids)
            engine.check_integrity()
        assert fake_cuda.events["capture"] > 10 and bool(gathered) == (backend == "sdpa")
        for q, keys, values, prefill, _, out, *_ in gathered:
            assert {tensor.device.type for tensor in (q, keys, values, out, *prefill[1:4])} == {"cuda"}
            assert len(keys) == len(values) == sum(prefill.k_lengths) and len(q) == len(out) == prefill.rows

    def test_methods_of_several_models():
        """They decode in captured passes, or are refused by name where they are asked for."""
        with fake_cuda.gpu():
            engine = stars.Engine(
                MODELS / "lm", MODELS / "rm", device="cuda", dtype="bfloat16", prefill_backend="triton",
                cache_tokens=8192, models={"guide": MODELS / "guide", "small": MODELS / "small"},
                max_num_seqs=4, max_num_lanes=8, max_segment_size=32)
            params = stars.SamplingParams(max_tokens=24, seed=3)
            for refused in (stars.MARA(), stars.PersonaJudge()):
                with pytest.raises(stars.RequestError, match=f"{type(refused).__name__} is not available on a GPU yet: "
                                   'device="cpu" runs it'):
                    engine.generate(PROMPTS[:2], params, refused, use_tqdm=False)
            for method in (stars.TokenGuidance(), stars.RewardGuidedSpeculation(reward_threshold=0.3),
                           stars.RewardGuidedSpeculation(variant="gsi", reward_threshold=0.3, beta=1.0)):
                outputs = engine.generate(PROMPTS[:2], params, method, use_tqdm=False)
                assert [output.outputs[0].error for output in outputs] == [None, None], method
                engine.check_integrity()

    def test_a_round_launches_nothing_by_itself():
        """Its draft and scores are replays, a commit is one launch a model, and nothing but events is waited for."""
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=4, max_num_lanes=8, max_segment_size=32, prefill_backend="triton")
            params = stars.SamplingParams(max_tokens=160, seed=3)
            policy = stars.STARS(segment_size=16, max_attempts=8, reward_threshold=0.3, width=4)
            engine.add_request(PROMPTS[0], params, policy)
            rounds = []
            while engine.has_unfinished_requests():
                before, launched = fake_cuda.events.copy(), fake_cuda.launched.copy()
                engine.step()
                rounds.append((fake_cuda.events - before, fake_cuda.launched - launched))
        assert len(rounds) > 4
        for found, launched in rounds:
            assert not found["capture"] and not found["compile"] and set(launched) <= {"copy_rows_kernel"}, launched
            assert found["replay"] and not found["synchronize"] and not found["blocking transfer"], found
            assert found["launch"] <= 2

    def test_a_round_with_several_readings_a_candidate_replays_known_shapes(tiny_model, tmp_path):
        """A process reward, whose passes read as many rewards as their shapes have room for: none is new. Steps end at
        the sign of the broken characters that a fake GPU draws."""
        source = tiny_model(family="qwen2", head="reward", vocab=400, hidden=128, heads=2, kv_heads=1)
        directory = write_process_model(tmp_path / "model", source, "mlp")
        with fake_cuda.gpu():
            reward = stars.ProcessReward(directory, step_separator="\ufffd", template="raw")
            engine = stars.Engine(MODELS / "lm", reward, device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=2, max_num_lanes=4, max_segment_size=8, prefill_backend="triton",
                                  max_model_len=96)
            passes, read = engine.reward._passes, []
            assert passes.max_readings == 4 * 4
            fill = passes._fill
            passes._fill = lambda spans, into_slab: read.append(max(len(span.reads) for span in spans)) or fill(
                spans, into_slab)
            start = fake_cuda.events.copy()
            policy = stars.STARS(segment_size=8, max_attempts=4, reward_threshold=2.0, beta=0.0, width=2)
            for prompt in ("A film", "One more"):
                engine.add_request(prompt, stars.SamplingParams(max_tokens=24, seed=3), policy)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    assert output.outputs[0].error is None
            engine.check_integrity()
        seen = fake_cuda.events - start
        assert not seen["capture"] and not seen["compile"] and seen["replay"] > 20 and max(read) > 1, (seen, read)

    def test_a_round_under_load_replays_known_shapes_alone(monkeypatch):
        """Random arrivals after start-up: nothing is captured or compiled, and what is launched by itself is a prompt's
        pass that is too long to capture, or a scoring pass that is, or a copy of rows."""
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype="bfloat16", cache_tokens=1 << 14,
                                  max_num_seqs=12, max_num_lanes=24, max_segment_size=32, prefill_backend="triton")
            eager = []  # (rows, whether into slabs) of passes
            replay = graph.Graphs._replay

            def noted(graphs, part, rare) -> None:
                def call() -> None:
                    if not fake_cuda.capturing():
                        eager.append(part.key)
                    part.call()

                replay(graphs, part._replace(call=call), rare)

            monkeypatch.setattr(graph.Graphs, "_replay", noted)
            draw = random.Random(7)
            start = fake_cuda.events.copy()
            waiting = [arrival(draw, index) for index in range(30)]
            rounds = 0
            while waiting or engine.has_unfinished_requests():
                for _ in range(min(len(waiting), draw.choice((0, 1, 1, 3)))):
                    engine.add_request(*waiting.pop())
                for output in engine.step() if engine.has_unfinished_requests() else ():
                    assert output.outputs[0].error is None
                rounds += 1
            engine.check_integrity()
        seen = fake_cuda.events - start
        assert not seen["capture"] and not seen["compile"] and seen["replay"] > 1000 and rounds > 20
        passes = [(key[1], key[3]) for key in eager if isinstance(key, tuple) and key[0] == "forward"]
        assert min(rows for rows, into_slab in passes if not into_slab) > CUDA.captured_prefill
        assert all(rows > CUDA.captured_score for rows, into_slab in passes if into_slab)
        assert all(isinstance(key, int) for key in eager if not isinstance(key, tuple))  # copies of rows

    @pytest.mark.parametrize(("dtype", "backend", "deterministic"), [
        ("bfloat16", "triton", False), ("float16", "triton", True),
        pytest.param("bfloat16", "sdpa", False, marks=pytest.mark.slow),
        pytest.param("float32", "triton", False, marks=pytest.mark.slow),
    ])
    def test_passes_too_long_to_capture_compile_nothing(monkeypatch, dtype, backend, deterministic):
        """Of every number of rows, in every width of tile, after start-up; a library has run once before, and so have
        redrafts, which a deterministic engine runs for responses that gave way."""
        calls = []  # rows, keys and window of a library's
        monkeypatch.setitem(prefill_attention.BACKENDS, "sdpa", lambda q, k, v, prefill, scale, out, window, softcap: (
            calls.append((len(q), len(k), window))))
        for module in ("engine", "reward.causal"):
            monkeypatch.setattr(f"stars.{module}.check_row_invariance", lambda decoder, target: None)
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype=dtype, prefill_backend=backend,
                                  deterministic=deterministic, cache_tokens=8192, max_num_seqs=8, max_num_lanes=600,
                                  max_segment_size=32)
            # A library served one prompt of each model, as long as its context: six layers, and the reward's three.
            assert calls == [(1024, 1024, None)] * 9 * (backend == "sdpa"), calls
            seen = fake_cuda.events.copy()
            passed = set()
            own = engine._models.own.passes
            for passes, kinds in ((own, ("prefill",)), (engine.reward._passes, ("prefill", "score"))):
                for kind in kinds:
                    for rows in range(CUDA.captured(kind) + 128, passes._most[kind] + 1, 128):
                        for tiles in passes._tiling.shapes(rows, kind):
                            run_idle(passes, rows, kind, tiles, kind == "score")
                            passed.add((kind, rows))
                        if kind == "score":
                            passes._append(engine._round.drafter.device_draft, rows, passes._sequences(rows)).call()
            if deterministic:
                for rows in (16, 48, 512, 640, 2048):
                    [tiles] = engine._models.own.passes._tiling.shapes(rows, "score")
                    run_idle(engine._models.own.passes, rows, "score", tiles, False)
            assert fake_cuda.events["launch"] > seen["launch"] and fake_cuda.events["compile"] == seen["compile"]
        assert len(passed) == 14 + 12 and max(rows for _, rows in passed) == 2048

    @pytest.mark.parametrize("gated", [False, True])
    def test_a_head_that_is_more_than_a_row_is_captured_behind_its_pass(monkeypatch, tmp_path, gated):
        """Nothing of it is captured or compiled once requests come; a gate is read by itself, of each prompt once."""
        directory = Path(shutil.copytree(MODELS / "rm", tmp_path / "rm"))
        hidden, tensors = load_file(directory / "model.safetensors")["score.weight"].shape[1], {}
        if gated:
            tensors = {"regression_layer__weight": torch.randn(5, hidden), "reward_transform_matrix": torch.eye(5),
                       "gating__layers__0__weight": torch.randn(7, hidden), "gating__layers__1__weight": torch.randn(
                           5, 7), "gating__logit_scale": torch.ones(1)}
        else:
            tensors = {"score__0__weight": torch.randn(hidden, hidden), "score__2__weight": torch.randn(1, hidden)}
        edit_tensors(directory, score__weight=..., **tensors)
        # Its numbers would come from the card.
        monkeypatch.setattr("stars.model.head_files._read_gate", lambda checkpoint, form, device, deterministic: Gate(
            (pack(torch.zeros(5, 7, device=device)),), form.temperature, 1.0, form.pattern))
        monkeypatch.setattr(Gate, "weights", lambda gate, hidden: np.full((len(hidden), 5), 0.2))
        pattern = load_tokenizer(directory).encode(PROMPTS[0])[1:2]
        with fake_cuda.gpu():
            reward = stars.CausalReward(directory, head={"prompt_pattern": pattern} if gated else "auto")
            engine = stars.Engine(MODELS / "lm", reward, device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=8, max_num_lanes=16, max_segment_size=32, prefill_backend="triton")
            captured = {key[1] for key in reward._passes._graphs._at_start if key[0] == "read"}
            assert captured == {reward._passes._reads(rows) for rows in CUDA.shapes("score", 512)}
            start = fake_cuda.events.copy()
            decode(engine, 0, 0.0)
            decode(engine, 0, 0.0)
        seen = fake_cuda.events - start
        assert seen["replay"] and not seen["capture"] and not seen["compile"]
        assert not gated or len(reward.gating._kept) == 1, "the prompts begin alike"

    def test_log_probabilities_are_captured_behind_their_pass():
        """Those of both models of an implicit reward: nothing is captured or compiled once requests come, and what no
        slab holds is read in pages."""
        with fake_cuda.gpu():
            reward = stars.ImplicitReward(MODELS / "lm", MODELS / "lm")
            engine = stars.Engine(MODELS / "lm", reward, device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=8, max_num_lanes=16, max_segment_size=32, prefill_backend="triton")
            for part in reward.parts:
                captured = {key[1] for key in part._passes._graphs._at_start if key[0] == "logprobs"}
                assert captured == set(CUDA.shapes("score", 512))
            start = fake_cuda.events.copy()
            decode(engine, 0, 0.0)
            decode(engine, 0, 0.0)
            seen = fake_cuda.events - start
            assert seen["replay"] and not seen["capture"] and not seen["compile"], seen
            [output] = engine.generate(PROMPTS[1], stars.SamplingParams(max_tokens=90, seed=3), stars.BestOfN(n=2),
                                       use_tqdm=False)
            assert output.outputs[0].error is None
            engine.check_integrity()

    def run_idle(passes, rows: int, kind: str, tiles, scored: bool) -> None:
        passes._fill_idle(rows, passes._sequences(rows))
        passes._forward(rows, passes._sequences(rows), tiles, None, kind == "score", scored).call()

    def test_a_library_is_called_with_a_window_and_without_one(monkeypatch):
        """Kernels of both kinds are compiled before a request comes; a cache too small for the window never calls it.
        """
        calls = []
        monkeypatch.setitem(prefill_attention.BACKENDS, "sdpa", lambda q, k, v, prefill, scale, out, window, softcap: (
            calls.append((len(q), len(k), window))))
        load = stars.engine.load_model

        def windowed(*given, **options):
            made = load(*given, **options)
            made.config = dataclasses.replace(made.config, sliding_window=(None, 100) * 3)
            return made

        monkeypatch.setattr("stars.engine.load_model", windowed)
        for cache_tokens, wanted in ((8192, {(1024, 1024), (924, 1024)}), (320, {(320, 320)})):
            calls.clear()
            with fake_cuda.gpu():
                stars.Engine(MODELS / "lm", device="cuda", dtype="bfloat16", prefill_backend="sdpa",
                             cache_tokens=cache_tokens, max_num_seqs=8, max_num_lanes=16, max_segment_size=32)
            assert set(calls) == {(*sizes, window) for sizes in wanted for window in (None, 100)}

    def arrival(draw: random.Random, index: int) -> tuple:
        """A request: prompts of 2 to 600 tokens, several policies, filters and penalties."""
        policy = draw.choice((
            stars.STARS(segment_size=16, max_attempts=8, reward_threshold=0.3, width=draw.choice((1, 3, 4, None))),
            stars.STARS(segment_size=32, max_attempts=3, reward_threshold=0.3, width=2), stars.Sample(),
            stars.BestOfN(n=3), stars.BlockwiseBestOfK(k=3, segment_size=8), stars.ARGS(topk=draw.choice((3, 10))),
            stars.RAD(topk=7),
            stars.CARDS(max_segment=32, max_attempts=8, reward_threshold=0.3, width=draw.choice((1, 3)))))
        kinds = (dict(), dict(top_k=20), dict(presence_penalty=0.5), dict(top_p=0.9, repetition_penalty=1.2))
        params = stars.SamplingParams(max_tokens=draw.randint(8, 64), seed=index, **draw.choice(kinds))
        length = draw.choice((draw.randint(2, 40), draw.randint(40, 256), draw.randint(256, 600)))
        return {"prompt_token_ids": draw.choices(range(20, 200), k=length)}, params, policy

    def test_a_token_that_is_enumerated_is_replays_alone(monkeypatch):
        """Of ranked lanes beside drawn ones, with filters and penalties and without: one row a response, a pass that
        scores what the host hands out, and nothing behind the draft, whose tokens the device has not chosen from."""
        drafts, trailing = [], []
        launch, score_trailing = stars.draft.Drafter.launch, stars.reward.causal.CausalReward.score_trailing
        monkeypatch.setattr(stars.draft.Drafter, "launch", lambda self, lanes: (
            drafts.append([(lane.ranks, lane.slab) for lane in lanes]), launch(self, lanes))[1])
        monkeypatch.setattr(stars.reward.causal.CausalReward, "score_trailing", lambda self, draft, candidates: (
            trailing.append([one.lane for one in candidates]), score_trailing(self, draft, candidates))[1])
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=8, max_num_lanes=48, max_segment_size=32, prefill_backend="triton")
            for seed, (policy, given) in enumerate((
                    (stars.ARGS(topk=10), {}), (stars.STARS(8, 6, 0.5, 0.7, 0.3, 4), dict(top_k=20)),
                    (stars.RAD(topk=6), dict(top_p=0.9, presence_penalty=0.3)), (stars.Sample(), {}))):
                engine.add_request(PROMPTS[seed], stars.SamplingParams(max_tokens=24, seed=seed, ignore_eos=True,
                                                                       **given), policy)
            engine.step()
            rounds = []
            for _ in range(8):
                before, launched = fake_cuda.events.copy(), fake_cuda.launched.copy()
                engine.step()
                rounds.append((fake_cuda.events - before, fake_cuda.launched - launched))
                engine.check_integrity()
        for found, launched in rounds:
            assert found["replay"] and not found["capture"] and not found["compile"], found
            assert not found["synchronize"] and not found["blocking transfer"], found
            assert set(launched) <= {"copy_rows_kernel"}, launched
        mixed = [draft for draft in drafts if len({ranks > 0 for ranks, _ in draft}) == 2]
        assert mixed and {ranks for draft in drafts for ranks, _ in draft} == {0, 10, 6}
        for draft in mixed:
            assert [ranks for ranks, _ in draft if ranks] == [10, 6][: sum(ranks > 0 for ranks, _ in draft)]
            assert len({slab for _, slab in draft}) == len(draft)
        drawn = {place for draft in drafts for place, (ranks, _) in enumerate(draft) if not ranks}
        assert trailing and {place for places in trailing for place in places} <= drawn

    def test_long_prompts_beside_responses_that_decode(monkeypatch):
        """No round runs more rows of prompts through a model than it may; both models' are launched on two streams, and
        a round with prompts in it replays, too."""
        rows = []
        prefill = Passes.prefill
        monkeypatch.setattr(Passes, "prefill", lambda *given: (
            rows.append((given[0], prefill(*given))), rows[-1][1])[1])
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=16, max_num_lanes=64, max_segment_size=32, prefill_backend="triton",
                                  max_num_batched_tokens=64)
            policy = stars.STARS(segment_size=4, max_attempts=8, reward_threshold=0.3, width=4)
            long = len(engine.tokenizer.encode(LONG))
            assert long > 5 * 64
            for prompt in PROMPTS[:2]:
                engine.add_request(prompt, stars.SamplingParams(max_tokens=200, seed=3, ignore_eos=True), policy)
            engine.step()
            rounds = []
            for seed in range(3):
                # Other words from the first page on, so that nothing is shared.
                engine.add_request(f"{seed} {LONG}", stars.SamplingParams(max_tokens=8, seed=seed), policy)
                while len(rounds) < 8 * (seed + 1):
                    rows.clear()
                    before, launched = fake_cuda.events.copy(), fake_cuda.launched.copy()
                    engine.step()
                    rounds.append((rows[:], fake_cuda.events - before, fake_cuda.launched - launched))
            assert len(engine._scheduler.groups) >= 2, "those that decode have not ended"
            engine.check_integrity()
        read = [one for one in rounds if any(count for _, count in one[0])]
        assert len(read) >= 15
        for given, found, launched in read:
            for passes in (engine._models.own.passes, engine.reward._passes):
                assert sum(count for owner, count in given if owner is passes) <= 64
            assert found["stream wait"] >= 2 and not found["synchronize"] and not found["blocking transfer"], found
            assert not found["capture"] and not found["compile"] and set(launched) <= {"copy_rows_kernel"}, launched

    @pytest.mark.parametrize("fused", [False, True])
    def test_the_launches_of_a_pass(monkeypatch, fused):
        """Of a draft's step, its head included, and of a scoring pass: no more than a decoder says, and six a layer
        where it is fused, in which case nothing is left to a library."""
        passes = {"draft_logits": [], "score": []}  # of each: rows, launches of ours and of a library, those it says

        def counted(name):
            run = getattr(Decoder, name)

            def call(decoder, batch, *given):
                before = fake_cuda.events["launch"]
                with Products() as products:
                    done = run(decoder, batch, *given)
                if not torch.cuda.is_current_stream_capturing():
                    rows = len(batch.token_ids)
                    passes[name].append((rows, fake_cuda.events["launch"] - before, products.count,
                                         decoder.launches(rows)))
                return done

            return call

        for name in passes:
            monkeypatch.setattr(Decoder, name, counted(name))
        shapes = [tuned.ModelShape(256, 512, 704, vocab) for vocab in (8192, 0)]
        table = tuned.Table(chains={(shape, "bf16"): ((128, True),) for shape in shapes} if fused else {})
        with fake_cuda.gpu(), tuned.using(table):
            engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=16, max_num_lanes=64, max_segment_size=32, prefill_backend="triton")
            decode(engine, 0, 0.0)
            engine.check_integrity()
        for name, layers, most in (("draft_logits", 6, 3), ("score", 3, 4)):
            assert any(rows <= 128 for rows, *_ in passes[name])
            for rows, ours, library, said in passes[name]:
                whole = fused and rows <= 128
                # Besides the layers: the embedding; a draft's head and, where it is not fused, its final norm; of a
                # score, the two picks of its last rows and the reward.
                assert ours + library <= (6 if whole else 10) * layers + most - (name == "draft_logits" and whole)
                assert said == (6 if whole else 10) * layers + 2 and library == (0 if whole else 4 * layers + 4 - most)

    def test_caches_take_what_memory_leaves(monkeypatch):
        """Of a small card: both the most tokens that fit, slabs of a segment, as the pair reads the same ids. What a
        decoder outgrows meanwhile is kept for graphs that may use it, with no memory reckoned for it: next to nothing.
        """
        with fake_cuda.gpu():
            seen = []
            for free in (1.8, 1.7):
                monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (int(free * 2**30), 2 << 30))
                engine = stars.Engine(MODELS / "lm", MODELS / "rm", device="cuda", prefill_backend="triton")
                caches = engine._cache, engine.reward.cache
                assert {cache.k_pages.shape[1] for cache in caches} == {engine.config.cache_tokens}
                assert {cache.slab_len for cache in caches} == {128} and engine.config.max_model_len == 1024
                seen.append((engine.config.cache_tokens, sum(cache.k_pages.nbytes for cache in caches)))
            assert seen[1][0] > 2048 and seen[0][0] < 64 * 1024  # more would not be used
            # A tenth of a GiB more is in pages, to less than a page: of keys, and as many values.
            page = 2 * sum(cache.k_pages.nbytes // cache.num_pages for cache in caches)
            assert abs(2 * (seen[0][1] - seen[1][1]) - 0.1 * 2**30) < page
            for decoder in (engine._models.own.passes.decoder, engine.reward.decoder):
                kept = [tensor for one in decoder._outgrown for tensor in (one if isinstance(one, tuple) else [one])]
                reserved = sum(tensor.nbytes for tensor in decoder._reserved)
                assert kept and sum(tensor.nbytes for tensor in kept) < reserved // 100
            decode(engine, 40, 0.2)
            engine.check_integrity()

    @pytest.mark.filterwarnings("ignore:Accessing the data pointer")
    @pytest.mark.parametrize("family", ["llama", "phi3"])
    def test_a_model_of_transformers_keeps_its_matrices_where_they_are(monkeypatch, tiny_model, family):
        """Those that are products by themselves; and memory is reckoned for the others alone."""
        directory = tiny_model(TinyModel(family, hidden=192, heads=2, kv_heads=1, tokenizer=True, dtype="bfloat16"))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        monkeypatch.setattr(loaded, "PLAIN", (*loaded.PLAIN, fake_cuda.FakeTensor))
        reckoned = []
        monkeypatch.setattr(fit, "fit_memory", lambda config, models, *others: reckoned.append(
            models["the language model"].weight_bytes) or config.fitted(4096))
        with fake_cuda.gpu():
            for module in model.modules():
                for name, one in module._parameters.items():
                    moved = None if one is None else torch.empty(one.shape, dtype=one.dtype, device="cuda")
                    module._parameters[name] = moved if moved is None else torch.nn.Parameter(moved)
            sizes = {"max_num_seqs": 2, "max_num_lanes": 4, "max_segment_size": 8, "tokenizer": directory}
            engine = stars.Engine.from_transformers(model, **sizes)
            assert engine.config.device == "cuda" and engine.config.dtype == "bfloat16"
            stars.Engine.from_transformers(model, dtype="float16", **sizes)
        decoder = engine._models.own.decoder
        layers = list(zip(decoder.layers, model.model.layers, strict=True))
        alone = [(decoder.embedding, model.model.embed_tokens), (decoder.head, model.lm_head)]
        alone += [pair for ours, theirs in layers
                  for pair in ((ours.o, theirs.self_attn.o_proj), (ours.down, theirs.mlp.down_proj))]
        joined = [weight for ours, _ in layers for weight in (ours.qkv, ours.gate_up)]
        if family == "phi3":
            alone += [pair for ours, theirs in layers for pair in (
                (ours.qkv, theirs.self_attn.qkv_proj), (ours.gate_up, theirs.mlp.gate_up_proj))]
            joined = []
        for ours, theirs in alone:
            assert ours.values.untyped_storage()._cdata == theirs.weight.untyped_storage()._cdata
        norms = sum(one.numel() for name, one in model.named_parameters() if "norm" in name)
        assert reckoned[0] == 2 * (norms + sum(weight.values.numel() for weight in joined))
        assert reckoned[1] == 2 * sum(one.numel() for one in model.parameters()), "another type is a copy of all"

    def test_an_adapter_is_captured_with_its_base(monkeypatch, tmp_path):
        """As the model that drafts and as a named one: three launches a product beside those of the single operations,
        the base's weights once in all, and the memory for both is what is said."""
        adapter = write_adapter(tmp_path / "adapter", MODELS / "lm", rank=4)
        other = write_adapter(tmp_path / "other", MODELS / "lm", ("q_proj", "down_proj"), rank=8)
        said, whole = [], sizes.needed_bytes
        monkeypatch.setattr(fit, "needed_bytes", lambda *given: said.append(whole(*given)) or said[-1])
        with fake_cuda.gpu():
            engine = stars.Engine(adapter, MODELS / "rm", device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=4, max_num_lanes=4, max_segment_size=16, prefill_backend="triton",
                                  models={"guide": other})
            decode(engine, 40, 0.2)
            members = engine._models.members
            jobs = [(engine._cache.open([5] * count, (0, 1)), [5] * count, count) for count in (17, 120)]
            for _ in range(2):
                for table, _, _ in jobs:
                    table.length = 0
                engine._models.prefill(jobs)
            for table, _, _ in jobs:
                engine._cache.close(table)
            drafter = engine._models.drafter((1,))
            engine.check_integrity()
        own, guide = (member.decoder for member in members)
        assert own.embedding is guide.embedding and own.layers[3].o is guide.layers[3].o and own.head is guide.head
        assert [len(one.adapters) for one in (own, guide)] == [24, 12] and drafter.decoder is guide
        assert own.adapters[0].down.values.dtype == own.dtype == torch.bfloat16
        assert [one.launches(4) for one in (own, guide)] == [62 + 72, 62 + 36]
        assert said[-1]["the model 'guide''s weights"] == 2 * sum(
            one.out_features * one.in_features for pair in guide.adapters for one in pair)
        for store, name in zip(engine._cache.stores, ("the language model", "the model 'guide'"), strict=True):
            assert said[-1][f"{name}'s cache"] == sum(
                one.nbytes for one in (store.k_pages, store.v_pages, store.k_slabs, store.v_slabs))

    def test_a_reward_over_the_engines_own_weights_is_captured(monkeypatch, tmp_path):
        """Its matrices are reckoned once, as the language model's, and its cache is its own."""
        head = {"score.weight": torch.randn(1, 256, generator=torch.Generator().manual_seed(1))}
        adapter = write_adapter(tmp_path / "reward", MODELS / "lm", rank=4, named="org/lm", whole=head)
        said, whole = [], sizes.needed_bytes
        monkeypatch.setattr(fit, "needed_bytes", lambda *given: said.append(whole(*given)) or said[-1])
        with fake_cuda.gpu():
            engine = stars.Engine(MODELS / "lm", adapter, device="cuda", dtype="bfloat16", cache_tokens=8192,
                                  max_num_seqs=2, max_num_lanes=2, max_segment_size=16, prefill_backend="triton")
            decode(engine, 40, 0.2)
            engine.check_integrity()
        own, reward = engine._models.own.passes.decoder, engine.reward.decoder
        assert isinstance(engine.reward, stars.LoraReward) and own.embedding is reward.embedding
        assert own.layers[3].o is reward.layers[3].o and (len(own.adapters), len(reward.adapters)) == (0, 24)
        assert said[-1]["the reward model's weights"] == 2 * 256 + 2 * sum(
            one.out_features * one.in_features for pair in reward.adapters for one in pair)
        [store] = engine.reward.cache.stores
        assert said[-1]["the reward model's cache"] == sum(
            one.nbytes for one in (store.k_pages, store.v_pages, store.k_slabs, store.v_slabs))

    def test_the_benchmarks_path_through_the_engine(monkeypatch, tmp_path):
        """Every part of the headline and of serving that an engine of 8B shapes takes, two layers of it: all of them
        run to their end, on replays, and nothing that a card would complain of."""
        import end_to_end
        import serving
        from bench import Bench
        from headline import Headline
        from record import Record, Settings
        from timing import rehearsal

        for library in prefill_attention.BACKENDS:
            monkeypatch.setitem(prefill_attention.BACKENDS, library, lambda *given: None)
        record = Record(tmp_path / "record.json", "headline-8b")
        settings = Settings(facts={"read_gb_s": 3000.0, "copy_gb_s": 3000.0, "matmul_tflop_s": 800.0})
        with fake_cuda.gpu():
            bench = Bench(record, settings, "Llama-3.1-8B", layers=2, seed=None)
            headline = Headline(record, settings, bench)
            record.part("steps", headline.steps)
            record.part("aligned", bench.aligned, 0.3, None, "aligned-0.3")
            record.part("plain tokens", bench.plain)
            record.part("reward passes", headline.reward_passes)
            record.part("prefill", bench.prefill)
            record.part("unfused", headline.unfused)
            with rehearsal():  # what lanes draw is made up anew each time
                record.part("early stop", bench.early_stop, 16)
            record.part("fewer rows", end_to_end.fewer_rows, bench)
            record.part("memory", bench.memory, "at the end")
            bench.tokens = 64
            record.part("arrivals", serving.arrivals, record, bench)
            record.part("a long prompt", serving.long_prompt, record, bench)
            record.part("together", end_to_end.together, record, bench)
            bench.engine.check_integrity()
        assert record.finish(), record.content["notes"]
        figures = {one["name"]: one for one in record.content["figures"]}
        # An event's millisecond over a segment of 32 steps, beside the bytes of two layers and the head.
        step = figures["8B: step, 1 lane over 1024 shared keys"]
        assert step["value"] == 1 / 32 and step["detail"]["bytes"] == bench.step_bytes(1) > 2 * 436e6 + 1050e6
        aims = [one["aim"] for one in record.content["figures"] if one["aim"]]
        assert aims[:3] == ["step", "step-16", "aligned-0.3"] and {"rm-4k", "rm-16k", "together"} <= set(aims)
        passes = [name for name in figures if name.startswith("8B: RM pass, 4 x 32 rows after 16352")]
        assert passes == ["8B: RM pass, 4 x 32 rows after 16352", "8B: RM pass, 4 x 32 rows after 16352, over 1024"]
        arrived = figures["8B: time to first segment at random arrivals, median"]
        assert arrived["detail"]["requests"] == serving.PROMPTS
        counted = [figures[name]["detail"]["events"] for name in figures if name.startswith("8B: rounds with")]
        assert counted[0] > 0 and counted[1:] == [0, 0]  # prompts of more rows than are captured; else all is known

    def test_every_tile_that_is_tried_on_a_card_is_launched(monkeypatch):
        """In passes of one layer of the 8B shape: nothing is left out by an error, and each is told to be compiled."""
        import tune_chain
        from record import Settings
        from timing import rehearsal

        seen = []  # (whether it is dependent, what is loaded) of each product

        def noted(function, args, kwargs) -> None:
            if function.fn.__name__ == "product_kernel":
                seen.append((kwargs["PDL"], kwargs["SCHEME"]))

        monkeypatch.setattr(fake_cuda, "on_variant", noted)
        with fake_cuda.gpu(), rehearsal():
            for scheme in ("", "fp8", "int8"):
                tune_chain.rehearse(Settings(), scheme)
        tried = {(pdl, scheme): seen.count((pdl, scheme)) for pdl, scheme in set(seen)}
        assert set(tried) == {(False, "none"), (True, "none"), (False, "fp8 weight"), (False, "int8 weight")}
        assert tried[False, "none"] > 60 < tried[True, "none"] + 20 and tried[False, "fp8 weight"] >= 25, tried

    @pytest.fixture
    def numbers(monkeypatch):
        """Whatever is read from the device is a small number, and true; replays take a tenth more or less."""
        import chain

        draw = random.Random(5)

        def right(one: chain.Pass) -> torch.Tensor:
            config, head = one.decoder.config, one.decoder.head
            return torch.empty(one.shape.rows, config.hidden_size if head is None else head.out_features, device="cuda")

        monkeypatch.setattr(chain.Pass, "reference", right)
        monkeypatch.setattr(fake_cuda.Event, "elapsed_time", lambda self, other: draw.uniform(0.9, 1.1))
        monkeypatch.setattr(torch, "equal", lambda one, other: one.shape == other.shape)
        for name, value in (("__float__", 1e-3), ("__int__", 0), ("__bool__", True)):
            monkeypatch.setattr(fake_cuda.FakeTensor, name, lambda self, value=value: value, raising=False)

    def test_tiles_are_chosen_in_a_pass(numbers, tmp_path):
        """The whole search of a card over one layer, in 16 bits: every part ends, and the table says what was found.
        """
        import models
        import tune_chain
        from record import Record, Settings

        record = Record(tmp_path / "record.json", "tune-chain")
        with fake_cuda.gpu():
            config = models.config_of("Llama-3.2-1B", layers=1)
            decoder = models.random_decoder(config, "cuda", torch.bfloat16, seed=None)
            settings = Settings(facts={"read_gb_s": 3000.0})
            tuner = tune_chain.Tuner(record, settings, decoder, models.scoring_over(decoder))
            kinds = tune_chain.kinds(False)
            for kind in kinds:
                record.part(kind.name, tuner.measure, kind)
        assert record.finish() and not record.content["notes"], record.content["notes"]
        found = record.content["facts"]["tuned bf16"]
        # What is measured twice, by more tiles, is there once.
        assert sorted((entry["rows"], entry["model"]["vocab"] > 0) for entry in found["chains"]) == sorted(
            {(kind.shape.rows, not kind.scores) for kind in kinds})
        table = tuned.parse({"plain": []} | found)
        ends = {key[0]: [rows for rows, _ in entries] for key, entries in table.tiles.items()}
        assert ends["normed"] == [1, 4, 16, 64, 128] and ends["qkv"] == ends["swiglu"] == [1, 4, 16, 32, 64, 128]
        assert any(tile.pdl and tile.prefetch for entries in table.tiles.values() for _, tile in entries)

    def test_quantised_weights_are_measured(numbers, monkeypatch, tmp_path):
        """The whole stage of a scheme over one layer: tiles, accuracy, steps, tokens of a pair."""
        import models
        import quantised
        from record import Record, Settings

        for library in prefill_attention.BACKENDS:
            monkeypatch.setitem(prefill_attention.BACKENDS, library, lambda *given: None)
        monkeypatch.setattr(quantised, "config_of", lambda shape, head: models.config_of(shape, head, layers=1))
        record = Record(tmp_path / "record.json", "quantised-8b")
        settings = Settings(facts={"read_gb_s": 3000.0, "chain errors": {"16 rows": 0.01}})
        with fake_cuda.gpu():
            record.part("fp8", quantised.of_scheme, record, settings, "Llama-3.2-1B", "fp8")
        assert record.finish() and not record.content["notes"], record.content["notes"]
        table = tuned.parse({"plain": []} | record.content["facts"]["tuned fp8"])
        assert {(key[0], key[1]): [rows for rows, _ in entries] for key, entries in table.tiles.items()
                if key[0] in ("swiglu", "normed")} == {("swiglu", "fp8"): [1, 16, 128], ("normed", "fp8"): [1, 16]}
        names = {check["name"] for check in record.content["checks"]}
        assert {"8B, fp8: chain, scores of 128 rows, fused beside float32",
                "8B fp8: logits beside dequantised weights in float32"} <= names
else:
    test_in_a_process_of_its_own = needs_triton(is_apart(Path(__file__), {"STARS_TEST_FAKE_CUDA": "1"}, 900))
