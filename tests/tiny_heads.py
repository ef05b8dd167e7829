"""Tiny reward models with every kind of head, and what each gives, written out in float64 over transformers' states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from editing import edit_config, edit_tensors
from tiny_models import TinyModel, write_model

HIDDEN = 36  # of TinyModel
PATTERN = (3, 9)  # at which gates read the prompt


class TinyHead(NamedTuple):
    """A head: what of the model's directory it is, and its reward."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    reward: Callable[[Tensor, int], Tensor]  # of float64 states [tokens, hidden] and the place of the prompt's pattern
    choice: Any = "auto"
    head: str = "reward"  # of the model that it is put on: "lm" has a language model head
    beside: dict[str, Tensor] = {}  # of value_head.safetensors


def write_head(directory: Path, kind: str, seed: int = 0, **tiny: Any) -> tuple[Any, Callable[[list[int], int], float]]:
    """Writes a model with that kind of head into DIRECTORY.

    Returns the choice of the head that it needs, and a function of a text's ids and of the place of the pattern in its
    prompt: the reward.
    """
    import transformers

    made = HEADS[kind](torch.Generator().manual_seed(seed + 100))
    write_model(directory, TinyModel(head=made.head, seed=seed, **tiny))
    gone = {} if made.head == "lm" else {"score__weight": ...}
    edit_tensors(directory, **gone | {name.replace(".", "__"): value for name, value in made.tensors.items()})
    edit_config(directory, **made.config)
    if made.beside:
        save_file(made.beside, directory / "value_head.safetensors")
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    matrix = None if made.head != "lm" else transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64).lm_head.weight

    def reward(ids: list[int], place: int = 0) -> float:
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
            if kind.startswith("vocabulary"):
                states = states @ matrix.T  # logits: their formula reads those
            return float(made.reward(states, place))

    return made.choice, reward


def _row(name: str, bias: bool, config: dict[str, Any]) -> Callable[[torch.Generator], TinyHead]:
    def make(generator: torch.Generator) -> TinyHead:
        weight, shift = 0.5 * torch.randn(1, HIDDEN, generator=generator), torch.randn(1, generator=generator) * bias
        tensors = {f"{name}.weight": weight} | ({f"{name}.bias": shift} if bias else {})
        return TinyHead(tensors, config, lambda h, _: h[-1] @ weight[0].double() + shift.double()[0])

    return make


def _mlp(name: str, widths: tuple[int, ...], config: dict[str, Any]) -> Callable[[torch.Generator], TinyHead]:
    """Products of these widths, the last one of one row, or of two labels."""

    def make(generator: torch.Generator) -> TinyHead:
        tensors, columns = {}, HIDDEN
        for index, rows in enumerate(widths):
            tensors[f"{name}.{2 * index}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5 * 1.4
            tensors[f"{name}.{2 * index}.bias"] = 0.5 * torch.randn(rows, generator=generator)
            columns = rows

        def reward(h: Tensor, place: int) -> Tensor:
            x = h[-1]
            for index in range(len(widths)):
                x = tensors[f"{name}.{2 * index}.weight"].double() @ (x.relu() if index else x)
                x = x + tensors[f"{name}.{2 * index}.bias"].double()
            return x[0] if len(x) == 1 else x.softmax(0)[1]

        return TinyHead(tensors, config, reward)

    return make


def _labels(generator: torch.Generator) -> TinyHead:
    weight, bias = 0.1 * torch.randn(2, HIDDEN, generator=generator), torch.randn(2, generator=generator)
    return TinyHead({"score.weight": weight, "score.bias": bias}, {"architectures": ["LlamaForTokenClassification"]},
                    lambda h, _: (weight.double() @ h[-1] + bias.double()).softmax(0)[1])


def _of_several(choice: dict[str, Any], read: Callable[[Tensor], Tensor]) -> Callable[[torch.Generator], TinyHead]:
    """One of three labels, or two of them."""

    def make(generator: torch.Generator) -> TinyHead:
        weight = 0.5 * torch.randn(3, HIDDEN, generator=generator)
        return TinyHead({"score_head.weight": weight}, {}, lambda h, _: read(weight.double() @ h[-1]), choice)

    return make


def _value_file(generator: torch.Generator) -> TinyHead:
    weight, bias = 0.5 * torch.randn(1, HIDDEN, generator=generator), torch.randn(1, generator=generator)
    return TinyHead({}, {}, lambda h, _: weight[0].double() @ h[-1] + bias.double()[0], head="lm",
                    beside={"v_head.summary.weight": weight, "v_head.summary.bias": bias})


def _score_model(kind: str, sign: int, choice: Any = "auto") -> Callable[[torch.Generator], TinyHead]:
    """With a normaliser, as a reward or as a cost, which is only divided and of which less is better."""

    def make(generator: torch.Generator) -> TinyHead:
        weight, bias = 0.5 * torch.randn(1, HIDDEN, generator=generator), torch.randn(1, generator=generator)
        mean, variance = torch.tensor([0.75]), torch.tensor([3.0])

        def reward(h: Tensor, _: int) -> Tensor:
            raw = weight[0].double() @ h[-1] + bias.double()[0]
            raw = raw - mean.double()[0] if kind == "reward" else raw
            return sign * raw / (variance.double()[0].sqrt() + 1e-8)

        return TinyHead({"score_head.weight": weight, "score_head.bias": bias, "normalizer.mean": mean,
                         "normalizer.var": variance, "normalizer.count": torch.tensor([7])},
                        {"architectures": ["LlamaForScore"], "score_type": kind, "do_normalize": True}, reward, choice)

    return make


def _vocabulary(rows: list[int]) -> Callable[[torch.Generator], TinyHead]:
    def reward(logits: Tensor, _: int) -> Tensor:
        last = logits[-1][rows]
        return last[0] if len(rows) == 1 else last.softmax(0)[1]

    return lambda _: TinyHead({}, {}, reward, {"tensor": "lm_head", "rows": rows}, "lm")


def _gated(objectives: int, quantiles: int, norms: bool) -> Callable[[torch.Generator], TinyHead]:
    """Objectives, or quantiles of each; the gate's products with ReLU behind them, with or without batch norms."""

    def make(generator: torch.Generator) -> TinyHead:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        heads, transform = 0.5 * draw(objectives * quantiles, HIDDEN), torch.eye(objectives) + 0.3 * draw(
            objectives, objectives)
        scale, gate, number = torch.tensor([1.7]), {}, 0
        widths = (13, 11, objectives)
        for columns, rows in zip((HIDDEN, *widths), widths, strict=False):
            last = rows == widths[-1]
            gate[f"gating.layers.{number}.weight"] = draw(rows, columns)
            if last or not norms:
                gate[f"gating.layers.{number}.bias"] = draw(rows)
            if norms and not last:
                norm = f"gating.layers.{number + 2}"
                gate |= {f"{norm}.weight": draw(rows), f"{norm}.bias": draw(rows), f"{norm}.running_mean": draw(rows),
                         f"{norm}.running_var": draw(rows).square() + 0.3,
                         f"{norm}.num_batches_tracked": torch.tensor(5)}
            number += 3 if norms else 1

        def reward(h: Tensor, place: int) -> Tensor:
            x = h[place]
            for number in sorted({int(name.split(".")[2]) for name in gate}):
                layer = {name.split(".")[3]: value.double() for name, value in gate.items()
                         if name.startswith(f"gating.layers.{number}.")}
                if "running_var" in layer:
                    x = torch.nn.functional.batch_norm(x[None], layer["running_mean"], layer["running_var"],
                                                       layer["weight"], layer["bias"])[0]
                    continue
                x = layer["weight"] @ x + layer.get("bias", torch.tensor(0.0, dtype=torch.float64))
                if number != max(int(name.split(".")[2]) for name in gate):
                    x = x.relu()
            weights = (x / 3.5).softmax(0) * scale.double()[0]
            each = (heads.double() @ h[-1]).view(objectives, quantiles).mean(1)
            return (weights * (each @ transform.double())).sum()

        config = {"architectures": ["LlamaForRewardModelWithGating"], "num_objectives": objectives,
                  "gating_temperature": 3.5} | ({"num_quantiles": quantiles} if quantiles > 1 else {})
        return TinyHead({"regression_layer.weight": heads, "reward_transform_matrix": transform,
                         "gating.logit_scale": scale, **gate}, config, reward, {"prompt_pattern": list(PATTERN)})

    return make


HEADS: dict[str, Callable[[torch.Generator], TinyHead]] = {
    "row": _row("score", False, {}),
    "row with bias": _row("score", True, {}),
    "value_head, normalised": lambda generator: _normalised(_row("value_head", True, {})(generator)),
    "regression_head": _row("regression_head", False, {"architectures": ["LlamaRewardModel"]}),
    "v_head of a file": _value_file,
    "score model": _score_model("reward", 1),
    "cost model": _score_model("cost", -1),
    "cost model, as it is": _score_model("cost", 1, {"sign": 1}),
    "mlp": _mlp("score", (HIDDEN, 1), {"architectures": ["LlamaForRewardModel"]}),
    "mlp, normalised": lambda generator: _normalised(_mlp("score", (21, 1), {})(generator)),
    "mlp of three": _mlp("v_head.summary", (23, 10, 1), {}),
    "labels": _labels,
    "mlp of labels": _mlp("score", (HIDDEN, 2), {"architectures": ["LlamaForProcessRewardModel"]}),
    "one of three": _of_several({"rows": [2]}, lambda x: x[2]),
    "one of three, softmax": _of_several({"rows": [1], "activation": "softmax"}, lambda x: x.softmax(0)[1]),
    "one of three, sigmoid": _of_several({"rows": [1], "activation": "sigmoid"}, lambda x: x[1].sigmoid()),
    "two of three": _of_several({"rows": [2, 0]}, lambda x: x[[2, 0]].softmax(0)[1]),
    "vocabulary row": _vocabulary([0]),
    "vocabulary pair": _vocabulary([11, 6]),
    "gated": _gated(7, 1, False),
    "quantiles": _gated(5, 3, True),
}


def _normalised(made: TinyHead) -> TinyHead:
    """The same with config.json's mean and std."""
    return made._replace(config={**made.config, "normalize_reward": True, "mean": -1.25, "std": 0.4},
                         reward=lambda h, place: (made.reward(h, place) + 1.25) / 0.4)
