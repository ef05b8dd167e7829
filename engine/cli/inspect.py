"""`stars inspect`: what a model directory or GGUF file holds and whether it would load, from its headers alone."""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stars.errors import ModelError
from stars.trace.json_lines import dumps, plain

if TYPE_CHECKING:
    from stars.model.loader import ModelSummary

SHOWN_TENSORS = 8


def inspect(args: argparse.Namespace) -> int:
    """Runs the command; 1 where tensors are missing or too many, so that it would not load."""
    from stars.model.config import refuse_pairwise
    from stars.model.families import FAMILIES
    from stars.model.files import read_json

    path = Path(args.directory) / "config.json"
    config = read_json(path) if path.is_file() else {}
    refuse_pairwise(config, str(path))
    named = config.get("architectures")
    architectures = named if isinstance(named, list) else []
    if config.get("model_type") not in (None, *FAMILIES) and any(
            str(name).endswith("ForSequenceClassification") for name in architectures):
        return _encoder(args, config, architectures)
    facts = _facts(args.directory, "auto" if args.reward_head is None else args.reward_head)
    if args.json:
        print(dumps(plain(facts)))
    else:
        _print(facts)
    return 0 if facts["loads"] else 1


def _facts(directory: str, reward_head: Any) -> dict[str, Any]:
    from stars.model.loader import inspect_model

    summary = inspect_model(directory, reward_head=reward_head)
    config = summary.config
    problem = _problem(directory, summary, reward_head)
    windows = [[window, len(list(group))] for window, group in groupby(config.sliding_window)]
    return {
        "directory": directory, "model_type": config.model_type, "architectures": list(config.architectures),
        "head": summary.head, "reward_head": _reward_head(summary), "steps": _steps(summary),
        "loads": problem is None, "problem": problem,
        "parameters": summary.parameters, "bytes": summary.bytes, "dtype": config.dtype, "types": summary.types,
        "layers": config.num_layers, "heads": config.num_heads, "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size, "context": config.context_length, "rope": str(config.rope),
        "windows": windows, "tied": summary.tied,
        # The CPU's cache is float32 whatever the checkpoint's type.
        "kv_bytes_per_token": 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4,
        "eos_token_ids": list(config.eos_token_ids), "bos_token_id": config.bos_token_id,
        "adapter": None if summary.adapter is None else {
            "base": str(summary.adapter.base), "modules": list(summary.adapter.modules),
            "ranks": list(summary.adapter.ranks), "products": summary.adapter.products},
        "tokenizer": summary.tokenizer, "chat_template": summary.chat_template, "shards": list(summary.shards),
        "missing": summary.missing, "unexpected": summary.unexpected,
    }


def _reward_head(summary: ModelSummary) -> dict[str, Any] | None:
    """What a reward model ends with and how it reads texts; None where there is no head that can be read."""
    form = summary.reward_head
    if form is None:
        return None
    gate, steps = form.gate, _steps(summary)
    template = "chat template for messages, raw for text" if summary.chat_template else "raw"
    if steps is not None and steps["template"] != "auto":
        template = steps["template"]
    return {
        "kind": "quantiles" if gate is not None and gate.quantiles > 1 else form.kind,
        "tensors": {name: list(wanted.shape) for name, wanted in form.tensors.items()},
        "labels": form.labels, "rows": None if form.rows is None else list(form.rows),
        "activation": form.activation, "label": form.label,
        "mean": None if form.normalisation is None else form.normalisation.mean,
        "std": None if form.normalisation is None else form.normalisation.std, "sign": form.sign,
        "objectives": None if gate is None else gate.objectives, "quantiles": None if gate is None else gate.quantiles,
        "temperature": None if gate is None else gate.temperature,
        "prompt_pattern": None if gate is None else list(gate.pattern),
        "pooling": "last token" if steps is None else "step tags",
        "template": template,
    }


def _steps(summary: ModelSummary) -> dict[str, Any] | None:
    """How a model of steps reads them, by its class; None for any other."""
    from stars.model.head_files import TWO_LABELS
    from stars.reward.steps import detected

    if not any(name.endswith(TWO_LABELS) for name in summary.config.architectures):
        return None
    steps = detected(summary.config, None)
    return {"separator": steps.separator, "tag": steps.tag, "template": steps.template}


def _problem(directory: str, summary: ModelSummary, reward_head: Any) -> str | None:
    """Why it would not load, in the loader's own words; None if it would."""
    from stars.model.head_files import VALUE_HEAD_FILE, head_choice
    from stars.model.loader import check, open_checkpoint

    if summary.head == "none":
        return "it has neither a language model head nor a reward head: use a checkpoint with one of them"
    try:
        check(open_checkpoint(directory, VALUE_HEAD_FILE if summary.head == "reward" else None), summary.config,
              summary.head, head_choice(reward_head))
    except ModelError as error:
        return str(error)
    return None


def _print(facts: dict[str, Any]) -> None:
    heads = {"lm": "language model", "reward": "reward", "none": "none"}
    windows = "none" if all(window is None for window, _ in facts["windows"]) else ", ".join(
        f"{count} layers {'full' if window is None else f'{window} tokens'}" for window, count in facts["windows"])
    tied = ", tied to the embeddings" if facts["tied"] and facts["head"] == "lm" else ""
    shards, types = facts["shards"], facts["types"]
    stored = facts["dtype"] if len(types) < 2 else ", ".join(f"{count} {kind}" for kind, count in types.items())
    rows = [
        ("directory", facts["directory"]),
        ("model type", f"{facts['model_type']} ({', '.join(facts['architectures']) or 'no architecture named'})"),
        *_adapter_rows(facts["adapter"]),
        ("head", heads[facts["head"]] + tied + _described(facts["reward_head"])),
        *_head_rows(facts["reward_head"]),
        *_step_rows(facts["steps"]),
        ("parameters", f"{facts['parameters']:,} ({_size(facts['bytes'])} as {stored})"),
        ("layers", f"{facts['layers']}, hidden {facts['hidden_size']}, MLP {facts['intermediate_size']}"),
        ("attention", f"{facts['heads']} heads, {facts['kv_heads']} KV heads, head_dim {facts['head_dim']}"),
        ("vocabulary", f"{facts['vocab_size']:,}"),
        ("context", f"{facts['context']:,} tokens"),
        ("rope", facts["rope"]),
        ("sliding window", windows),
        ("KV cache", f"{_size(facts['kv_bytes_per_token'])} a token (float32)"),
        ("EOS ids", ", ".join(map(str, facts["eos_token_ids"])) or "none"),
        ("tokenizer", "yes" if facts["tokenizer"] else "none: prompts as token ids only"),
        ("chat template", "yes" if facts["chat_template"] else "none"),
        ("shards", f"{len(shards)} ({', '.join(shards[:3])}{', …' if len(shards) > 3 else ''})"),
        ("missing", _names(facts["missing"])),
        ("unexpected", _names(facts["unexpected"])),
        ("loads", "yes" if facts["loads"] else f"no: {facts['problem']}"),
    ]
    for name, value in rows:
        print(f"{name:<15} {value}")


def _adapter_rows(adapter: dict[str, Any] | None) -> list[tuple[str, str]]:
    if adapter is None:
        return []
    ranks = adapter["ranks"]
    return [("adapter", f"LoRA of {', '.join(adapter['modules'])}; rank{'s' if len(ranks) > 1 else ''} "
                        f"{', '.join(map(str, ranks))}"), ("base", adapter["base"])]


def _described(head: dict[str, Any] | None) -> str:
    """What a head is, in words, behind the word for it."""
    if head is None:
        return ""
    kinds = {
        "linear": "one row, its logit", "mlp": f"MLP, {head['labels']} label{'s' if head['labels'] > 1 else ''}",
        "labels": f"{head['labels']} label{'s' if head['labels'] > 1 else ''}",
        "vocabulary": f"row{'s' if head['labels'] > 1 else ''} "
                      f"{', '.join(map(str, head['rows'] or []))} of the language model head",
        "gated": f"{head['objectives']} objectives, weighted by the prompt",
        "quantiles": f"{head['objectives']} objectives of {head['quantiles']} quantiles, weighted by the prompt",
    }
    read = "" if head["activation"] == "none" else f", {head['activation']} of label {head['label']}"
    return f" ({kinds[head['kind']]}{read})"


def _head_rows(head: dict[str, Any] | None) -> list[tuple[str, str]]:
    if head is None:
        return []
    affine = "none" if head["std"] is None else f"(raw - {head['mean']:g}) / {head['std']:g}"
    rows = [
        ("head tensors", _names([f"{name} {shape}" for name, shape in head["tensors"].items()])),
        ("normalisation", affine + (", lower is better: negated" if head["sign"] < 0 else "")),
        ("pooling", head["pooling"]), ("template", head["template"]),
    ]
    if head["prompt_pattern"] is not None:
        rows.append(("gate", f"read at the prompt's last {head['prompt_pattern']}; temperature "
                             f"{head['temperature']:g}"))
    return rows


def _step_rows(steps: dict[str, Any] | None) -> list[tuple[str, str]]:
    if steps is None:
        return []
    read = "read at its last token" if steps["tag"] is None else f"{steps['tag']} after each, and read there"
    return [("steps", f"split at {steps['separator']!r}, {read}; template {steps['template']}")]


def _encoder(args: argparse.Namespace, config: dict[str, Any], architectures: list[Any]) -> int:
    """A model that only transformers knows, which can be a reward model all the same."""
    named, labels = config.get("id2label"), config.get("num_labels") or 2
    if isinstance(named, dict) and named:
        labels = len(named)
    if type(labels) is not int:
        raise ModelError(f"{args.directory}/config.json: num_labels is {labels!r}, it must be an integer")
    facts = {"directory": args.directory, "model_type": config["model_type"], "architectures": architectures,
             "head": "reward", "labels": labels, "loads": labels == 1, "runtime": "transformers"}
    if args.json:
        print(dumps(plain(facts)))
    else:
        print(f"directory       {args.directory}")
        print(f"model type      {config['model_type']} ({', '.join(map(str, architectures))})")
        print(f"head            reward, {labels} label{'s' if labels != 1 else ''}"
              + ("" if labels == 1 else ": choose one with stars.EncoderReward(model, label=...)"))
        print("runtime         transformers (whole texts are scored again each time)")
    return 0 if facts["loads"] else 1


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _names(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - SHOWN_TENSORS} more" if len(names) > SHOWN_TENSORS else ""
    return f"{len(names)}: {', '.join(names[:SHOWN_TENSORS])}{more}"
