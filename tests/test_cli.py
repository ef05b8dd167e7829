"""The command line: every command, its exit codes, its errors, Ctrl-C and readers that go away."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stars
from editing import edit_json, edit_tensors
from json_rows import rows, write_rows
from lora import write_adapter
from stars.kernels import prefill_attention
from stars.model.action_head import save_action_head

SAMPLING = ["--max-tokens", "9", "--seed", "3"]
SMALL = ["--max-num-lanes", "8", "--max-num-seqs", "4"]


# -- arguments ----------------------------------------------------------------------------------------------------


def test_help_and_wrong_arguments_need_no_torch():
    program = ("import sys\nfrom stars.cli import main\n"
               "for arguments in ('--help', 'generate --bogus', 'generate x --policy sample --k 2',\n"
               "                  'generate x --temperature -1'):\n"
               "    try: main(arguments.split())\n"
               "    except SystemExit: pass\n"
               "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("arguments", "word"), [
    (["generate"], "--input"),
    (["generate", "x", "--input", "y"], "--input"),
    (["generate", "x", "--policy", "sample", "--beta", "1"], "--beta"),
    (["generate", "x", "--policy", "best-of-n", "--segment-size", "4"], "--segment-size"),
    (["generate", "x", "--policy", "stars", "--best-of", "4"], "--best-of"),
    (["generate", "x", "--model", "m", "--policy", "stars"], "--reward"),
    (["generate", "x", "y", "--stream"], "--stream"),
    (["generate", "x", "--stream", "--n", "2"], "--n"),
    (["generate", "x", "--json", "--output", "f"], "--json"),
    (["generate", "x", "--reward-threshold", "nan"], "--reward-threshold"),
    (["generate", "x", "--temperature", "warm"], "--temperature"),
    (["calibrate", "x", "--model", "m"], "--reward"),
    (["generate", "x", "--named", "guide"], "--named: invalid NAME=PATH value: 'guide'"),
    (["generate", "x", "--head", "=file"], "--head: invalid NAME=PATH value"),
    (["generate", "x", "--named", "a=b", "--named", "a=c"], "--named a is given twice"),
    (["calibrate", "x", "--head", "a=b", "--head", "a=c"], "--head a is given twice"),
    (["trace"], "COMMAND"),
    (["bogus"], "bogus"),
    ([], "COMMAND"),
])
def test_wrong_arguments(run, arguments, word):
    code, out, err = run(*arguments)
    assert code == 2 and not out and word in err.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "word"), [
    (["generate", "x", "--temperature", "-1"], "temperature"),
    (["generate", "x", "--policy", "stars", "--reward-threshold", "0", "--segment-size", "0"], "segment_size"),
    (["generate", "x", "--policy", "stars", "--reward-threshold", "0", "--beta", "-1"], "beta"),
    (["generate", "--input", "absent.jsonl"], "absent.jsonl"),
    (["generate", "x", "--model", "absent"], "absent"),
    (["generate", "x", "--output", "absent/out.jsonl"], "absent/out.jsonl"),
    (["generate", "x", "--output", "same", "--trace", "same"], "--output"),
    (["calibrate", "x", "--quantile", "2"], "quantile"),
    (["calibrate", "x", "--num-samples", "0"], "num_samples"),
    (["inspect", "absent"], "absent"),
    (["generate", "x", "--named", "guide=absent"], "models['guide']: absent is not a directory"),
    (["generate", "x", "--named", "lm=absent"], "models has the name 'lm'"),
    (["calibrate", "x", "--head", "agent=absent"], "heads['agent'] is 'absent', which is not there"),
    (["trace", "show", "absent"], "absent"),
    (["trace", "html", __file__], "line 1"),
    (["demo", "--max-tokens", "0"], "max_tokens"),
])
def test_errors_are_one_sentence(run, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if "shipped pair" not in line]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("stars: error: ") and word in lines[0]


# -- generate -----------------------------------------------------------------------------------------------------


def test_generate_prints_the_text(run, pair):
    code, out, err = run("generate", "Once upon", *pair[:2], *SAMPLING, *SMALL)
    engine = stars.Engine(pair[1], max_num_lanes=8)
    expected = engine.generate("Once upon", stars.SamplingParams(max_tokens=9, seed=3), use_tqdm=False)
    assert (code, out, err) == (0, expected[0].outputs[0].text + "\n", "")


def test_segments_may_be_longer_than_by_default(run, pair):
    """What the engine's sentence says to do, flags can."""
    stars_of = ["--reward-threshold", "0.0", "--segment-size", "130", "--max-attempts", "2"]
    code, _, err = run("generate", "Once upon", *pair, *SAMPLING, *SMALL, *stars_of)
    assert code == 1 and "max_segment_size" in err
    code, out, _ = run("generate", "Once upon", *pair, *SAMPLING, *SMALL, *stars_of, "--max-segment-size", "130")
    assert code == 0 and out


def test_generate_prints_several_in_order(run, pair):
    code, out, _ = run("generate", "Once upon", "The dog", "A reward", *pair[:2], *SAMPLING, *SMALL, "--n", "2")
    headings = [line for line in out.splitlines() if line.startswith("==>")]
    assert code == 0 and headings == ["==> 0: Once upon", "==> 1: The dog", "==> 2: A reward"]
    assert out.count("--- completion 1") == 3


@pytest.mark.parametrize("policy", [
    ["sample"], ["best-of-n", "--best-of", "2"], ["blockwise", "--k", "2", "--segment-size", "4"],
    ["stars", "--segment-size", "4", "--max-attempts", "3", "--reward-threshold", "-0.5", "--width", "2"],
    ["stars", "--reward-threshold=-inf", "--alpha", "1", "--beta", "0"],
])
def test_policies(run, pair, policy, tmp_path):
    code, out, err = run("generate", "Once upon", *pair, *SAMPLING, *SMALL, "--policy", *policy, "--json", "--trace",
                         tmp_path / "t")
    (row,) = rows(out)
    assert code == 0 and err == ""
    assert isinstance(row["outputs"][0]["reward"], float) and row["seed"] == 3 and row["metrics"]["lm_seconds"] > 0
    (request,) = stars.read_trace(tmp_path / "t")
    assert request.completions[0].text == row["outputs"][0]["text"] and request.params["max_tokens"] == 9


def test_bad_rows_do_not_stop_the_others(run, pair, tmp_path):
    given = write_rows(
        tmp_path / "in.jsonl", '"Once upon"', {"id": 7, "prompt": "The dog", "note": [1]}, "{broken", {"id": 8},
        {"prompt": ""}, {"prompt_token_ids": [4, 5]}, {"prompt_token_ids": [99999]}, "", 17,
        {"messages": [{"role": "user", "content": "Hello"}]}, {"prompt": "x", "prompt_token_ids": [1]}, r'"\ud800"')
    results = tmp_path / "out.jsonl"
    code, out, err = run("generate", "--input", given, *pair[:2], *SAMPLING, *SMALL, "--output", results)
    written = {row["index"]: row for row in rows(results.read_text())}
    assert code == 1 and out == "" and err.endswith("6 of 11 rows failed\n")
    assert sorted(written) == list(range(11))
    assert [index for index, row in sorted(written.items()) if "error" not in row] == [0, 1, 5, 8, 9]
    assert written[1]["id"] == 7 and written[1]["note"] == [1] and written[1]["outputs"][0]["text"]
    assert "line 3" in written[2]["error"] and written[3]["id"] == 8 and "empty" in written[4]["error"]
    assert "99999" in written[6]["error"] and written[6]["outputs"] == []


def test_a_failing_reward_is_that_rows_error(run, pair, copied):
    broken = copied(pair[3])
    edit_tensors(broken, score__weight=lambda weight: weight * float("nan"))
    arguments = ["generate", "Once upon", *pair[:2], "--reward", broken, *SAMPLING, *SMALL, "--policy", "sample"]
    code, out, _ = run(*arguments, "--json")
    (row,) = rows(out)
    assert code == 1 and "NaN" in row["error"] and row["outputs"][0]["finish_reason"] == "error"
    code, _, err = run(*arguments)
    assert code == 1 and err.startswith("stars: error: ") and "NaN" in err


def test_chat_is_one_user_message(run, pair, tmp_path):
    given = write_rows(tmp_path / "in.jsonl", {"messages": [{"role": "user", "content": "Hello"}]})
    _, as_messages, _ = run("generate", "--input", given, *pair[:2], *SAMPLING, *SMALL, "--json")
    code, as_text, _ = run("generate", "Hello", "--chat", *pair[:2], *SAMPLING, *SMALL, "--json")
    assert code == 0 and rows(as_text)[0]["outputs"] == rows(as_messages)[0]["outputs"]


def test_rows_from_stdin_without_a_tokenizer(run, tiny_model, monkeypatch):
    class Stdin:
        buffer = [b'{"prompt_token_ids": [3, 4], "id": "a"}\n']

    monkeypatch.setattr(sys, "stdin", Stdin)
    code, out, _ = run("generate", "--input", "-", "--model", tiny_model(), *SAMPLING, *SMALL, "--output", "-")
    (row,) = rows(out)
    assert code == 0 and row["id"] == "a" and row["outputs"][0]["text"] is None and row["outputs"][0]["token_ids"]


def test_stream_prints_the_same_text(run, pair):
    arguments = ["generate", "Once upon", *pair, *SAMPLING, *SMALL, "--policy", "stars", "--segment-size", "3",
                 "--reward-threshold", "-1"]
    _, whole, _ = run(*arguments)
    code, streamed, _ = run(*arguments, "--stream")
    assert code == 0 and streamed == whole


def test_threshold_is_measured_where_none_is_given(run, pair):
    code, _, err = run("generate", "Once upon", "", *pair, "--max-tokens", "4", "--seed", "3", *SMALL)
    assert code == 1 and "reward threshold" in err and "16 plain samples on 1 prompt;" in err
    assert "prompt 1: the prompt is empty" in err


def test_input_is_not_overwritten(run, pair, tmp_path):
    given = write_rows(tmp_path / "in.jsonl", {"prompt": "Once"})
    code, _, err = run("generate", "--input", given, "--output", given, *pair[:2])
    assert code == 1 and "--input" in err and rows(given.read_text()) == [{"prompt": "Once"}]


# -- the other commands -------------------------------------------------------------------------------------------


def test_calibrate(run, pair):
    code, out, _ = run("calibrate", "Once upon", "The dog", *pair, *SAMPLING, *SMALL, "--num-samples", "4",
                       "--quantile", "0.5", "--json")
    engine = stars.Engine(pair[1], pair[3], max_num_lanes=8, max_num_seqs=4)
    samples = engine.plain_samples(["Once upon", "The dog"], stars.SamplingParams(max_tokens=9, seed=3), 4)
    rewards = [sample.reward for own in samples for sample in own]
    (found,) = rows(out)
    assert code == 0 and found["samples"] == 8
    assert found["reward_threshold"] == pytest.approx(float(np.quantile(rewards, 0.5)), abs=1e-4)
    assert found["quantiles"]["0"] == pytest.approx(min(rewards), abs=1e-4)
    code, out, _ = run("calibrate", "Once upon", *pair, *SAMPLING, *SMALL, "--num-samples", "2")
    assert code == 0 and "reward_threshold" in out and "median" in out


@pytest.mark.parametrize("command", [["generate", "x"], ["calibrate", "x", "--num-samples", "2"]])
def test_named_models_and_heads_reach_the_engine(run, pair, tmp_path, monkeypatch, command):
    """A path with a sign of equality, an adapter, a file."""
    adapter = write_adapter(tmp_path / "a=b", Path(pair[1]))
    head = tmp_path / "head.safetensors"
    shapes = {"ln": (36,), "linear1": (5, 36), "linear2": (5, 5), "output_linear": (2, 5)}
    save_action_head({f"{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
                     | {f"{part}.bias": torch.zeros(shape[0]) for part, shape in shapes.items()}, head)
    built, engine = [], stars.Engine
    monkeypatch.setattr("stars.engine.Engine", lambda *given, **named: built.append((named, engine(*given, **named)))
                        or built[-1][1])
    code, _, err = run(*command, *pair, *SAMPLING, *SMALL, "--named", f"guide={adapter}", "--named", f"plain={pair[1]}",
                       "--head", f"agent={head}", *(["--policy", "sample"] if command[0] == "generate" else []))
    [(named, made)] = built
    assert code == 0, err
    assert named["models"] == {"guide": str(adapter), "plain": pair[1]} and named["heads"] == {"agent": str(head)}
    assert "; models guide, plain; reward CausalReward" in repr(made)


def test_inspect_of_an_adapter(run, tiny_model, tmp_path):
    base = tiny_model(tokenizer=True, chat_template=True)
    adapter = write_adapter(tmp_path / "adapter", base, ("q_proj", "v_proj"), ranks={"v_proj": 5})
    code, out, _ = run("inspect", adapter, "--json")
    (facts,) = rows(out)
    assert code == 0 and facts["loads"] and facts["head"] == "lm" and facts["tokenizer"] and facts["chat_template"]
    assert facts["adapter"] == {"base": str(base), "modules": ["q_proj", "v_proj"], "ranks": [3, 5], "products": 2}
    code, out, _ = run("inspect", adapter)
    assert code == 0
    assert f"adapter         LoRA of q_proj, v_proj; ranks 3, 5\nbase            {base}\n" in out
    of_another = Path(shutil.copytree(adapter, tmp_path / "other"))
    edit_json(of_another / "adapter_config.json", base_model_name_or_path=str(tiny_model(hidden=48)))
    code, out, _ = run("inspect", of_another)
    assert code == 1 and "use the adapter with the base model that it was trained on" in out


def test_inspect(run, pair, tiny_model, copied):
    code, out, _ = run("inspect", pair[3], "--json")
    (facts,) = rows(out)
    assert code == 0 and facts["head"] == "reward" and facts["loads"]
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 6 * 4  # K and V, layers, KV heads, head_dim, float32
    code, out, _ = run("inspect", tiny_model(sharded=True, family="mistral", window=8))
    assert code == 0 and "8 tokens" in out and "safetensors" in out and "no" not in out.split("loads")[1]
    broken = copied(tiny_model())
    edit_tensors(broken, model__norm__weight=...)
    code, out, _ = run("inspect", broken)
    assert code == 1 and "model.norm.weight" in out


def test_inspect_names_what_is_unsupported(run, tiny_model, tmp_path):
    config = json.loads((tiny_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    code, out, err = run("inspect", tmp_path)
    assert code == 1 and not out and err.startswith("stars: error: ") and "mamba" in err


def test_inspect_of_an_encoder(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "num_labels": 1}))
    code, out, _ = run("inspect", tmp_path)
    assert code == 0 and "transformers" in out


def test_trace_views(run, pair, tmp_path):
    trace = tmp_path / "t.jsonl"
    run("generate", "Once upon", "The dog", *pair, *SAMPLING, *SMALL, "--reward-threshold", "0", "--trace", trace)
    code, out, _ = run("trace", "show", trace)
    assert code == 0 and "request 0" in out and "request 1" in out and "\x1b" not in out
    code, out, _ = run("trace", "show", trace, "--color", "always", "--attempts")
    assert code == 0 and "\x1b[" in out
    code, out, _ = run("trace", "html", trace)
    assert code == 0 and out.strip() == str(tmp_path / "t.html")
    assert "<!doctype html>" in (tmp_path / "t.html").read_text()
    code, _, err = run("trace", "html", trace, "-o", trace)
    assert code == 1 and "the trace itself" in err and stars.read_trace(trace)


def test_info(run, monkeypatch):
    """Without a GPU, nothing but the CPU's attention serves a prefill; what is wrong with each library is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = run("info", "--json")
    (facts,) = rows(out)
    assert code == 0 and facts["stars"] == stars.__version__ and facts["cores"] >= 1
    assert facts["gpu"] is None and facts["prefill"]["chosen"] is None
    assert list(facts["prefill"]["backends"]) == ["flash-attn-4", "flash-attn-2", "varlen", "sdpa"]
    assert facts["prefill"]["backends"]["sdpa"] == {"version": facts["torch"], "problem": None}
    code, out, _ = run("info")
    assert code == 0 and "libstars" in out
    assert re.search(r"^dtype auto +(float32|bfloat16) on the CPU for a model in bfloat16, as ", out, re.M)
    assert re.search(r"^gpu +none that torch can use$", out, re.M)
    assert re.search(r"^prefill +the CPU's own attention", out, re.M)


def test_info_with_a_gpu(run, monkeypatch):
    """The GPU, the library that prefill would take on it, and why not a preferred one; a GPU that is refused."""
    pytest.importorskip("triton")
    fields = {"name": "NVIDIA H100", "major": 9, "minor": 0, "total_memory": 80 << 30}
    problems = {"flash-attn-4": "is not installed", "flash-attn-2": "is not importable (undefined symbol)"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (fields["major"], fields["minor"]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**fields))
    monkeypatch.setattr(prefill_attention, "problem", problems.get)
    code, out, _ = run("info", "--json")
    (facts,) = rows(out)
    assert facts["gpu"] == {"name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 << 30}
    assert code == 0 and facts["prefill"]["chosen"] == "varlen"
    assert facts["prefill"]["backends"]["flash-attn-4"]["problem"] == "is not installed"
    code, out, _ = run("info")
    assert code == 0 and re.search(r"^gpu +NVIDIA H100, compute capability 9.0, 80.0 GiB$", out, re.M)
    (line,) = (line for line in out.splitlines() if line.startswith("prefill "))
    assert line.endswith(f"varlen {facts['torch']} for a bfloat16 model (flash-attn-4 is not installed, flash-attn-2 "
                         "is not importable (undefined symbol))")
    fields["major"] = 7
    code, out, _ = run("info")
    assert code == 0 and re.search(r"^prefill +the CPU's own attention, as device=\"cuda\" is refused here", out, re.M)


def test_demo(run, tmp_path):
    code, out, err = run("demo", "--max-tokens", "16", "--trace", tmp_path / "t.jsonl")
    assert code == 0 and err == ""
    assert "toys" in "".join(out.splitlines()[:4]) and "This film was" in out and "Summary" in out
    assert max(map(len, out.splitlines())) <= 100 + len(str(tmp_path)) and "\x1b" not in out
    assert len(stars.read_trace(tmp_path / "t.jsonl")) == out.count("STARS, segment by segment")


# -- interrupted --------------------------------------------------------------------------------------------------

STARS = [sys.executable, "-c", "import sys; from stars.cli import main; sys.exit(main())"]


def test_ctrl_c_keeps_the_finished_rows(pair, tmp_path):
    given = write_rows(tmp_path / "in.jsonl", *({"prompt": "Once", "id": number} for number in range(3000)))
    process = subprocess.Popen(
        [*STARS, "generate", "--input", given, *pair[:2], "--max-tokens", "60", "--ignore-eos", *SMALL, "--json",
         "--trace", tmp_path / "t.jsonl"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    # Not communicate(), which passes over what readline has buffered.
    kept, err = rows(first + process.stdout.read()), process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert 0 < len(kept) < 3000 and all(row["outputs"][0]["finish_reason"] == "length" for row in kept)
    assert err.splitlines() == [f"stars: interrupted: {len(kept)} of 3000 rows had finished and were kept"]
    assert len(stars.read_trace(tmp_path / "t.jsonl")) == len(kept)


def test_a_reader_that_goes_away_is_silent(pair, tmp_path):
    given = write_rows(tmp_path / "in.jsonl", *({"prompt": "Once"} for _ in range(2000)))
    process = subprocess.Popen([*STARS, "generate", "--input", given, *pair[:2], "--max-tokens", "8", *SMALL, "--json"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141


def test_what_only_a_gpu_multiplies_is_refused_by_name(run, pair):
    """The flags take whatever some device does."""
    for flag in ("--quantization", "--reward-quantization"):
        code, _, err = run("generate", "x", "--device", "cpu", *pair, flag, "fp8")
        name = flag.strip("-").replace("-", "_")
        assert code == 1 and f"{name} is 'fp8', it must be None, \"int8\" or \"int4\" on device \"cpu\"" in err


def test_policy_values_are_refused_before_anything_is_measured(run):
    """A bad segment size is known at once: no model is loaded and no threshold measured first."""
    code, _, error = run("generate", "x", "--segment-size", "0")
    assert code == 1 and error.count("\n") == 1
    assert "STARS.segment_size is 0" in error
