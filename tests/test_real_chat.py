"""The chat model that `make chat` fetches with the reward that ships for it: the file's weights serve both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stars
from stars import demo_chat
from stars.cli import main
from stars.errors import ModelError
from stars.kernels.quant import dequantize
from stars.model.loader import open_checkpoint
from test_models import addresses, decoders_of

pytestmark = [pytest.mark.real, pytest.mark.slow]
QUESTIONS = ("What is a good way to learn to cook?", "Why is the sky blue?")


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return demo_chat.chat_model()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(model) -> stars.Engine:
    return stars.Engine(model, demo_chat.chat_reward(), max_model_len=1024)


@pytest.fixture(scope="module")
def judge(model):
    """transformers' body with the file's weights, dequantised, and the adapter's products added to them, in float32;
    rewards by its last normed state."""
    import transformers
    from safetensors.torch import load_file

    source = open_checkpoint(model)
    weights = {name: source.read(name) for name in source.tensors}
    weights = {name: held.float() if isinstance(held, torch.Tensor) else dequantize(held)
               for name, held in weights.items()}
    low = load_file(demo_chat.REWARD / "adapter_model.safetensors")
    for name, down in low.items():
        if ".lora_A." in name:
            own = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            weights[own] = weights[own] + 2.0 * low[name.replace("lora_A", "lora_B")].float() @ down.float()
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    body = transformers.LlamaModel(config)
    body.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()
                          if name.startswith("model.")})
    head = low["base_model.model.score.weight"].float()[0]

    def reward(ids: list[int]) -> float:
        with torch.no_grad():
            return float(body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ head)

    return reward


def test_replies_are_read_as_transformers_reads_them(engine, judge):
    """To a hundredth of the rewards' spread on held-out replies, 0.34: weights are as stored in both, and the engine's
    products may round their activations."""
    params = stars.SamplingParams(max_tokens=24, temperature=0.8, seed=1, n=3)
    for output in engine.generate([{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS], params,
                                  stars.Sample(score=True), use_tqdm=False):
        for completion in output.outputs:
            ids = [token for token in completion.token_ids if token != engine.tokenizer.eos_token_id]
            assert abs(completion.reward - judge([*output.prompt_token_ids, *ids])) < 0.0034


def test_the_files_weights_are_held_once(engine):
    own, reward = decoders_of(engine)["lm"], engine.reward.decoder
    assert isinstance(engine.reward, stars.LoraReward)
    assert addresses(own)[0] == addresses(reward)[0] and len(reward.adapters) == 4 * 30


def test_the_demonstration(model, capsys):
    assert main(["demo", "--chat", "What is the capital of France?", "--max-tokens", "32"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = demo_chat.held_out(demo_chat.REWARD)["whole"]
    assert f"in {100 * found.share:.1f} % (95 %: " in out and out.count("STARS, segment by segment") == 1
    assert ("knows nothing" in out) == (found.low <= 0.5)
