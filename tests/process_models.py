"""Tiny process reward models of each format, and what transformers and torch say of a text, read whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stars.model.tokenizer import load_tokenizer
from tiny_models import BOS, CHAT_TEMPLATE, EOS, write_tokenizer

EXTRA, SHEPHERD = "<extra_0>", "ки"
FORMATS = ("mlp", "token", "shepherd")


def write_process_model(directory: Path, source: Path, kind: str, seed: int = 1) -> Path:
    """A model of `kind` in DIRECTORY, with a tokenizer whose tokens go over the ends of steps; source: `source_of`."""
    shutil.copytree(source, directory)
    write_tokenizer(directory, seed=2, chat_template=CHAT_TEMPLATE)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for merge in (["Ċ", "Ċ"], [".", "ĊĊ"], [".ĊĊ", "The"]):
        vocabulary.setdefault("".join(merge), len(vocabulary))
        tokenizer["model"]["merges"].append(merge)
    for content, special in ((EXTRA, True), (SHEPHERD, False)):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {
            "id": len(vocabulary) + (content == SHEPHERD), "content": content, "special": special, "normalized": False})
    tokenizer["pre_tokenizer"]["use_regex"] = False  # so that a merge may go over the end of a word, or of a step
    path.write_text(json.dumps(tokenizer))
    config = json.loads((directory / "config.json").read_text())
    names = {"mlp": "Qwen2ForProcessRewardModel", "token": "Qwen2ForTokenClassification"}
    config["architectures"] = [names.get(kind, config["architectures"][0])]
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    (directory / "config.json").write_text(json.dumps(config))
    if kind == "shepherd":
        return directory
    tensors = load_file(directory / "model.safetensors")
    hidden = tensors.pop("score.weight").shape[1]
    noise = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        tensors["score.0.weight"] = torch.randn(hidden, hidden, generator=noise) / hidden**0.5
        tensors["score.0.bias"] = torch.randn(hidden, generator=noise) * 0.5
    last = "score.2" if kind == "mlp" else "score"
    tensors[last + ".weight"] = torch.randn(2, hidden, generator=noise)
    tensors[last + ".bias"] = torch.randn(2, generator=noise) * 0.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def source_of(tiny_model: Callable[..., Path], kind: str) -> Path:
    """The model that one of `kind` is made from, with embeddings enough for its tokenizer."""
    if kind == "shepherd":
        return tiny_model(family="mistral", vocab=400, seed=16)
    return tiny_model(family="qwen2", head="reward", vocab=400, seed=9)


@cache
def _loaded(directory: Path) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """(backbone, labels of its hidden states) in transformers and torch."""
    import transformers

    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    if kind.endswith("ForCausalLM"):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        rows = [load_tokenizer(directory).encode(sign, add_special_tokens=False)[0] for sign in "-+"]
        return model.model, lambda states: model.lm_head(states)[..., rows]
    if kind.endswith("ForTokenClassification"):
        model = transformers.AutoModelForTokenClassification.from_pretrained(directory, dtype=torch.float32).eval()
        return model.model, model.score
    backbone = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tensors = load_file(directory / "model.safetensors")
    first, second = ((tensors[f"score.{place}.weight"], tensors[f"score.{place}.bias"]) for place in (0, 2))
    return backbone, lambda states: torch.nn.functional.linear(
        torch.relu(torch.nn.functional.linear(states, *first)), *second)


def step_scores(directory: Path, before: str, text: str, special: bool) -> list[float]:
    """P(good) after every step of `text` behind the prompt `before`, as the cards of these models compute it."""
    tokenizer = load_tokenizer(directory)
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]

    def steps(separator: str) -> list[str]:
        return [step for step in text.split(separator) if step.strip()] or [""]

    def encode(piece: str, special: bool = False) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=special)

    if kind.endswith("ForTokenClassification"):
        ids, places = encode(before, special), []
        for step in steps("\n\n") if text.strip() else [""]:
            ids += encode(step) + encode("\n\n")
            places.append(len(ids) - 1)
    else:
        tag, separator, end = (SHEPHERD, "\n", " ки\n") if kind.endswith("ForCausalLM") else (EXTRA, "\n\n", EXTRA)
        ids = encode(before + "".join(step + end for step in steps(separator)), special)
        places = [place for place, token in enumerate(ids) if token == encode(tag)[0]]
    return scores_at(directory, ids, places)


def scores_at(directory: Path, ids: Sequence[int], places: Sequence[int]) -> list[float]:
    """P(good) at these places of a text."""
    backbone, labels = _loaded(directory)
    with torch.no_grad():
        states = backbone(torch.tensor([list(ids)])).last_hidden_state[0]
        good: list[float] = torch.softmax(labels(states[list(places)]), dim=-1)[:, 1].tolist()
    return good


__all__ = ["BOS", "EOS", "FORMATS", "scores_at", "source_of", "step_scores", "write_process_model"]
