"""Which reward head a checkpoint has: found by the names of its tensors or as it is asked for, checked by its headers,
and read. A head is never made up: where there is none, or where there are several, an error says what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stars.errors import ModelError
from stars.kernels.linear import Weight, pack
from stars.model.config import ModelConfig
from stars.model.files import is_finite, printed, shown
from stars.model.heads import Activation, Gate, RewardHead
from stars.model.loaded import settings_beside
from stars.model.normalisation import Normalisation, read_normalisation
from stars.model.source import TensorSource, plain

LM_HEAD, SCORE_HEAD = "lm_head.weight", "score.weight"
VALUE_HEAD_FILE = "value_head.safetensors"
"""Beside a model's own files, as LlamaFactory writes it."""
PLACES = ("score", "v_head.summary", "v_head", "value_head", "regression_head", "score_head", "regression_layer")
"""What the tensors of heads are called before ".weight", or before the numbers of an MLP's products."""
TWO_LABELS = ("ForTokenClassification", "ForProcessRewardModel")
"""Ends of architectures whose two labels are bad and good."""
PATTERNS = {"llama": (128009, 128006, 78191, 128007, 271)}
"""Token ids at whose last occurrence a gate reads the prompt, by model type: Llama 3's header of the answer, from the
<|eot_id|> before it on."""
BATCH_NORM_EPS = 1e-5  # torch's, which no checkpoint says
SCORE_EPS = 1e-8  # added to the standard deviation by models of score_type
NAMED = 3  # tensors that an error names

Kind = Literal["linear", "mlp", "labels", "gated", "vocabulary"]


class HeadChoice(NamedTuple):
    """What the user says of a reward head; None leaves it to what is found."""

    tensor: str | None = None  # one of PLACES, "lm_head", or whatever stands before ".weight"
    rows: tuple[int, ...] | None = None  # of its last product: one is the reward, of two the second's probability is
    activation: Activation | None = None
    mean: float | None = None  # of the rewards: reward = (raw - mean) / std
    std: float | None = None
    sign: int | None = None  # -1 where lower is better
    prompt_pattern: tuple[int, ...] | None = None  # token ids, of a gate
    temperature: float | None = None  # of a gate


class GateForm(NamedTuple):
    """A gate, by its tensors' names."""

    products: tuple[str, ...]
    norms: tuple[str | None, ...]  # the batch norm behind each product's ReLU
    objectives: int
    quantiles: int  # rows of the head for each objective
    temperature: float
    pattern: tuple[int, ...]


class Wanted(NamedTuple):
    """The shape that a tensor must have."""

    shape: tuple[int, ...]
    keys: str  # what gives it


class HeadForm(NamedTuple):
    """A head of a checkpoint, by its headers."""

    kind: Kind
    tensors: dict[str, Wanted]  # all that are read, by the checkpoint's names
    products: tuple[str, ...]  # names without ".weight"
    rows: tuple[int, ...] | None  # of the last product; None: all
    labels: int
    activation: Activation
    label: int
    normalisation: Normalisation | None
    sign: int
    gate: GateForm | None

    @property
    def plain(self) -> bool:
        """Whether it is one row and nothing else."""
        return (len(self.products), self.labels, self.activation, self.gate) == (1, 1, "none", None)

    @property
    def float32_parameters(self) -> int:
        """Numbers of a head that is more than rows: it is kept in float32 whatever the model's dtype."""
        return 0 if self.plain or self.rows is not None else sum(
            math.prod(wanted.shape) for wanted in self.tensors.values())


def head_choice(given: Any) -> HeadChoice:
    """What `given` asks for: "auto", a name of a tensor, or a dict of HeadChoice's fields. Raises ModelError."""
    if isinstance(given, HeadChoice):
        return given
    if isinstance(given, str):
        if given not in ("auto", "lm_head", *PLACES):
            raise ModelError(f'head is {shown(given)}, it must be "auto", one of {", ".join(PLACES)}, lm_head, or a '
                             f"dict of {', '.join(HeadChoice._fields)}")
        return HeadChoice() if given == "auto" else HeadChoice(given)
    if not isinstance(given, Mapping):
        raise ModelError(f'head is {shown(given)}, it must be "auto", the name of a tensor, or a dict of '
                         f"{', '.join(HeadChoice._fields)}")
    unknown = [name for name in given if name not in HeadChoice._fields]
    if unknown:
        raise ModelError(f"head has {shown(unknown[0])}, which is none of {', '.join(HeadChoice._fields)}")
    tensor = given.get("tensor")
    if tensor is not None and not (isinstance(tensor, str) and tensor.removesuffix(".weight")):
        raise ModelError(f"head.tensor is {shown(tensor)}, it must be the name of a tensor")
    activation, sign = given.get("activation"), given.get("sign")
    if activation is not None and activation not in get_args(Activation):
        raise ModelError(f"head.activation is {shown(activation)}, it must be one of {', '.join(get_args(Activation))}")
    if sign is not None and (type(sign) is not int or sign not in (1, -1)):
        raise ModelError(f"head.sign is {shown(sign)}, it must be 1, or -1 where lower is better")
    numbers = {name: _number(name, given.get(name)) for name in ("mean", "std", "temperature")}
    if (numbers["mean"] is None) != (numbers["std"] is None):
        raise ModelError("head has one of mean and std, it must have both or neither")
    rows, pattern = (_ids(name, given.get(name)) for name in ("rows", "prompt_pattern"))
    if rows is not None and (len(set(rows)) != len(rows) or len(rows) > 2):
        raise ModelError(f"head.rows is {shown(list(rows))}, it must be one row, or two: the bad one's and the good "
                         "one's")
    return HeadChoice(None if tensor is None else tensor.removesuffix(".weight"), rows, activation, numbers["mean"],
                      numbers["std"], sign, pattern, numbers["temperature"])


def has_head(checkpoint: TensorSource) -> bool:
    """Whether there are tensors of a reward head, whatever the architecture's name."""
    return bool(_found(checkpoint, settings_beside(checkpoint)))


def find_head(checkpoint: TensorSource, config: ModelConfig, choice: HeadChoice, architecture: str) -> HeadForm:
    """The head of a checkpoint; architecture: of a model that has one, for the error where this has none.

    Raises ModelError for none, for several, for labels whose meaning is not known, and for what `choice` says and there
    is not. What shapes its tensors have is for the loader to compare.
    """
    where = checkpoint.directory
    settings = settings_beside(checkpoint)
    place = _place(checkpoint, settings, choice, architecture)
    if place == "lm_head":
        return _vocabulary(checkpoint, config, choice)
    products = _products(checkpoint, place)
    if place == "regression_layer" and choice.rows is None:
        return _gated(checkpoint, config, choice, settings, products)
    _check_ungated(choice, where)
    tensors = _chain(checkpoint, products, config.hidden_size)
    total = tensors[products[-1] + ".weight"].shape[0]
    process = total == 2 and any(name.endswith(TWO_LABELS) for name in config.architectures)
    rows, labels, activation, label = choice.rows, total, choice.activation or "none", 0
    if rows is not None:
        _check_rows(rows, total, products[-1], where)
        labels, label = len(rows), len(rows) - 1
        activation = choice.activation or ("softmax" if labels == 2 else "none")
        if labels == 1 and activation == "softmax":  # among all of them
            label, labels, rows = rows[0], total, None
    elif total == 1:
        classifier = not config.is_reward or any(
            name.endswith("ForSequenceClassification") for name in config.architectures)
        if products == ("score",) and classifier and config.num_labels != 1:
            raise ModelError(
                f"config.json of {where} gives {config.num_labels} labels (id2label, 2 where it is absent) but "
                f'{SCORE_HEAD} has 1 row: set id2label to {{"0": "LABEL_0"}} if that row is the reward')
    elif process:
        activation, label = choice.activation or "softmax", 1
    else:
        name = products[-1] + ".weight"
        raise ModelError(
            f"{where} gives {total} labels ({name} is {list(checkpoint.tensors[name].shape)}) where a reward is one "
            f'number: use a model with num_labels = 1, or say which row it is with head={{"rows": [0]}}')
    if labels == 1 and activation == "softmax":
        raise ModelError(f'head.activation is "softmax" and {products[-1]}.weight of {where} has one row: use "none" '
                         'or "sigmoid"')
    kind: Kind = "mlp" if len(products) > 1 else "linear" if labels == 1 and activation == "none" else "labels"
    normalisation, sign, tensors = _normalisation(checkpoint, choice, settings, place, activation, tensors)
    return HeadForm(kind, tensors, products, rows, labels, activation, label, normalisation, sign, None)


def read_head(checkpoint: TensorSource, form: HeadForm, device: torch.device, deterministic: bool,
              ) -> Weight | RewardHead:
    """The head of that form, whose tensors were checked: float32, with all that is fixed folded into its products."""
    products = [_read(checkpoint, name) for name in form.products]
    matrix, bias = products.pop()
    if form.rows is not None:
        matrix, bias = matrix[list(form.rows)], None if bias is None else bias[list(form.rows)]
    gate = None
    if form.gate is not None:
        transform = plain(checkpoint, "reward_transform_matrix").double()
        folded = [(transform.T @ one.double().view(form.gate.objectives, form.gate.quantiles, -1).mean(dim=1)).float()
                  for one in (matrix, bias) if one is not None]
        matrix, bias = folded[0], None if bias is None else folded[1].view(-1)
        gate = _read_gate(checkpoint, form.gate, device, deterministic)
    if form.normalisation is not None:
        mean, std = form.normalisation
        matrix = (matrix.double() / std).float()
        shift = torch.tensor([-mean / std], dtype=torch.float64)
        bias = (shift if bias is None else bias.double() / std + shift).float()
    if form.sign < 0:
        matrix, bias = -matrix, None if bias is None else -bias
    products.append((matrix, bias))
    layers = _packed(products, device, deterministic)
    return layers[0] if form.plain else RewardHead(layers, form.activation, form.label, gate)


def _place(checkpoint: TensorSource, settings: dict[str, Any], choice: HeadChoice, architecture: str) -> str:
    """Where the head is: what stands before ".weight", or before the numbers of its products."""
    where, found = checkpoint.directory, _found(checkpoint, settings)
    if choice.tensor == "lm_head" or (choice.tensor is not None and _has_products(checkpoint, choice.tensor)):
        return choice.tensor
    if choice.tensor is not None:
        there = f"its heads are {', '.join(map(printed, found))}" if found else "it has no reward head"
        raise ModelError(f"{where} has no tensor {printed(choice.tensor)}.weight, and {there}: name another one with "
                         "head")
    if len(found) > 1:
        raise ModelError(f"{where} has {len(found)} reward heads ({', '.join(map(printed, found))}): choose one with "
                         f"head={found[0]!r}")
    if found:
        return found[0]
    others = [name for name in checkpoint.tensors if name.endswith("weight") and not name.startswith(
        ("model.", "layers.", "embed_tokens.", "norm.", "lm_head."))]
    if others:
        advice = f', or, if it is {printed(others[0])}, say so with head={{"tensor": …}}'
    elif LM_HEAD in checkpoint.tensors:
        advice = f', or, if it is a row of {LM_HEAD}, say so with head={{"tensor": "lm_head", "rows": [0]}}'
    else:
        advice = ""
    raise ModelError(f"{where} has no reward head {SCORE_HEAD}: use a checkpoint with architectures {architecture}"
                     f"{advice}")


def _found(checkpoint: TensorSource, settings: dict[str, Any]) -> list[str]:
    """The places at which there are products, also the one that OpenRLHF says in config.json."""
    prefix = settings.get("value_head_prefix")
    places = [*PLACES, *([prefix] if isinstance(prefix, str) and prefix != "lm_head" else ())]
    return [place for place in dict.fromkeys(places) if _has_products(checkpoint, place)]


def _has_products(checkpoint: TensorSource, place: str) -> bool:
    return any(f"{place}.{name}" in checkpoint.tensors for name in ("weight", "0.weight"))


def _products(checkpoint: TensorSource, place: str) -> tuple[str, ...]:
    """The names of the products at a place: itself, or numbers 0, 2, …, between which there are ReLUs."""
    if f"{place}.weight" in checkpoint.tensors:
        return (place,)
    numbers = _numbers(checkpoint, place)
    if numbers != list(range(0, 2 * len(numbers), 2)):
        raise ModelError(f"{checkpoint.directory} has products {', '.join(map(str, numbers))} of {printed(place)} "
                         "where 0, 2, … are needed, with ReLU between them: use another reward model")
    return tuple(f"{place}.{number}" for number in numbers)


def _numbers(checkpoint: TensorSource, place: str) -> list[int]:
    """The n for which there is a PLACE.n.weight, ascending."""
    parts = [name.removeprefix(place + ".").split(".") for name in checkpoint.tensors if name.startswith(place + ".")]
    return sorted(int(part[0]) for part in parts
                  if len(part) == 2 and part[1] == "weight" and part[0].isascii() and part[0].isdigit()
                  and str(int(part[0][:9])) == part[0])


def _chain(checkpoint: TensorSource, products: Sequence[str], columns: int) -> dict[str, Wanted]:
    """The tensors of products that follow each other, the first of which takes `columns`."""
    tensors: dict[str, Wanted] = {}
    keys = "hidden_size"
    biased = any(f"{name}.bias" in checkpoint.tensors for name in products)
    for name in products:
        shape = checkpoint.tensors[f"{name}.weight"].shape
        rows = shape[0] if len(shape) == 2 else 1  # other shapes are refused as such
        tensors[f"{name}.weight"] = Wanted((rows, columns), f"{rows}, {keys}")
        if biased:
            tensors[f"{name}.bias"] = Wanted((rows,), f"rows of {name}.weight")
        columns, keys = rows, f"rows of {name}.weight"
    return tensors


def _vocabulary(checkpoint: TensorSource, config: ModelConfig, choice: HeadChoice) -> HeadForm:
    """Rows of the language model head: a logit of the next token's, or the probability of one token of two."""
    bare = not any(name.startswith("model.") for name in checkpoint.tensors)
    names = ("embed_tokens", "model.embed_tokens")
    name = "lm_head" if LM_HEAD in checkpoint.tensors or not config.tie_word_embeddings else names[not bare]
    rows = choice.rows or (0,)
    if config.logit_softcap is not None:
        raise ModelError(f"{checkpoint.directory} keeps its logits within {config.logit_softcap:g} "
                         "(final_logit_softcapping), which a reward of rows of the language model head does not: use a "
                         "model with a reward head")
    _check_ungated(choice, checkpoint.directory)
    _check_rows(rows, config.vocab_size, name, checkpoint.directory)
    activation: Activation = choice.activation or ("none" if len(rows) == 1 else "softmax")
    if len(rows) == 1 and activation == "softmax":
        raise ModelError(f'head.activation is "softmax" and head.rows is {list(rows)}: give two rows, the second of '
                         "which is the good one")
    tensors = {f"{name}.weight": Wanted((config.vocab_size, config.hidden_size), "vocab_size, hidden_size")}
    normalisation, sign, tensors = _normalisation(checkpoint, choice, {}, name, activation, tensors)
    return HeadForm("vocabulary", tensors, (name,), rows, len(rows), activation, len(rows) - 1, normalisation, sign,
                    None)


def _gated(checkpoint: TensorSource, config: ModelConfig, choice: HeadChoice, settings: dict[str, Any],
           products: tuple[str, ...]) -> HeadForm:
    """Objectives, or quantiles of each, that a gate weights by the prompt."""
    where = checkpoint.directory
    tensors = _chain(checkpoint, products, config.hidden_size)
    total = tensors[products[-1] + ".weight"].shape[0]
    quantiles = _count(settings, "num_quantiles", 1, where)
    objectives = _count(settings, "num_objectives", max(1, total // quantiles), where)
    if objectives * quantiles != total:
        raise ModelError(f"config.json of {where} gives {objectives} objectives of {quantiles} quantiles and "
                         f"{products[-1]}.weight has {total} rows: use config.json of the same checkpoint")
    numbers = _numbers(checkpoint, "gating.layers")
    if not numbers:
        raise ModelError(f'{where} has {total} rows of {products[-1]}.weight and no gate of them (gating.layers): say '
                         'which row is the reward with head={"rows": [0]}')
    gates: list[str] = []
    norms: list[str | None] = []
    for name in (f"gating.layers.{number}" for number in numbers):
        if len(checkpoint.tensors[f"{name}.weight"].shape) == 1 and gates and norms[-1] is None:
            norms[-1] = name
        else:
            gates.append(name)
            norms.append(None)
    columns, keys = config.hidden_size, "hidden_size"
    for name, norm in zip(gates, norms, strict=True):
        # Whether a product has a bias is a matter of each: where a batch norm follows it needs none.
        part = _chain(checkpoint, [name], columns)
        rows = part[f"{name}.weight"].shape[0]
        if name == gates[-1]:
            rows, keys = objectives, "num_objectives, " + keys
        tensors |= {key: Wanted((rows, *wanted.shape[1:]), wanted.keys if name != gates[-1] else keys)
                    for key, wanted in part.items()}
        if norm is not None:
            tensors |= {f"{norm}.{key}": Wanted((rows,), f"rows of {name}.weight")
                        for key in ("weight", "bias", "running_mean", "running_var")}
        columns, keys = rows, f"rows of {name}.weight"
    tensors["reward_transform_matrix"] = Wanted((objectives, objectives), "num_objectives, num_objectives")
    tensors["gating.logit_scale"] = Wanted((1,), "1")
    temperature = choice.temperature
    if temperature is None:
        temperature = settings.get("gating_temperature", 10)
    if not is_finite(temperature) or temperature <= 0:
        raise ModelError(f"config.json of {where} has gating_temperature = {shown(temperature)}, which must be "
                         "positive: repair it")
    pattern = choice.prompt_pattern or PATTERNS.get(config.model_type, ())
    if not pattern or max(pattern) >= config.vocab_size:
        raise ModelError(f"the gate of {where} reads the prompt at tokens that are not known for this vocabulary of "
                         f'{config.vocab_size}: say them with head={{"prompt_pattern": [ids]}}')
    if (choice.activation or "none") != "none":
        raise ModelError(f"head.activation is {choice.activation!r} and the head of {where} is weighted by a gate: "
                         "leave it out")
    gate = GateForm(tuple(gates), tuple(norms), objectives, quantiles, float(temperature), pattern)
    normalisation, sign, tensors = _normalisation(checkpoint, choice, settings, "regression_layer", "none", tensors)
    if normalisation is not None:
        raise ModelError(f"{where} has a mean and std of rewards and a gate, whose weights need not sum to one: leave "
                         "them out")
    return HeadForm("gated", tensors, products, None, objectives, "none", 0, None, sign, gate)


def _normalisation(checkpoint: TensorSource, choice: HeadChoice, settings: dict[str, Any], place: str,
                   activation: Activation, tensors: dict[str, Wanted],
                   ) -> tuple[Normalisation | None, int, dict[str, Wanted]]:
    """Mean and std, the sign, and the tensors with those of the two among them."""
    where, sign = checkpoint.directory, choice.sign or 1
    normalisation: Normalisation | None
    if place == "score_head":
        normalisation, cost, more = _of_score_model(checkpoint, settings)
        sign, tensors = choice.sign or (-1 if cost else 1), tensors | more
    else:
        normalisation = read_normalisation(checkpoint) if choice.mean is None and settings else None
    if choice.mean is not None and choice.std is not None:
        normalisation = Normalisation(choice.mean, choice.std)
    if activation != "none" and (normalisation is not None or sign < 0):
        raise ModelError(f"{where} has a reward after {activation}, which is neither normalised nor of another sign: "
                         "leave mean, std and sign out, and set normalize_reward to false")
    return normalisation, sign, tensors


def _of_score_model(checkpoint: TensorSource, settings: dict[str, Any],
                    ) -> tuple[Normalisation | None, bool, dict[str, Wanted]]:
    """The normaliser of a score model, where config.json says `do_normalize`; whether it is a cost, which is divided by
    its spread alone; the tensors it is in."""
    where = checkpoint.directory
    kind, wanted = settings.get("score_type", "reward"), settings.get("do_normalize", False)
    if kind not in ("reward", "cost", "critic"):
        raise ModelError(f"config.json of {where} has score_type = {shown(kind)} where reward, cost or critic is "
                         "needed: repair it")
    if not isinstance(wanted, bool):
        raise ModelError(f"config.json of {where} has do_normalize = {shown(wanted)} where true or false is needed: "
                         "repair it")
    cost = kind == "cost"
    if not wanted or kind == "critic":
        return None, cost, {}
    values = []
    for name in ("normalizer.mean", "normalizer.var"):
        info = checkpoint.tensors.get(name)
        value = float(plain(checkpoint, name).item()) if info is not None and info.size == 1 else math.nan
        if not math.isfinite(value) or (name == "normalizer.var" and value <= 0):
            raise ModelError(f"config.json of {where} says do_normalize and it has no usable tensor {name} of one "
                             "number: set do_normalize to false for the raw score")
        values.append(value)
    mean, variance = values
    tensors = {name: Wanted(checkpoint.tensors[name].shape, "1") for name in ("normalizer.mean", "normalizer.var")}
    return Normalisation(0.0 if cost else mean, math.sqrt(variance) + SCORE_EPS), cost, tensors


def _read(checkpoint: TensorSource, name: str) -> tuple[Tensor, Tensor | None]:
    """A product's matrix and bias, float32 copies."""
    bias = f"{name}.bias"
    return (plain(checkpoint, f"{name}.weight").to(torch.float32, copy=True),
            plain(checkpoint, bias).to(torch.float32, copy=True) if bias in checkpoint.tensors else None)


def _read_gate(checkpoint: TensorSource, form: GateForm, device: torch.device, deterministic: bool) -> Gate:
    """The gate, with batch norms folded into the products behind them."""
    products: list[tuple[Tensor, Tensor | None]] = []
    scale, shift = None, None
    for name, norm in zip(form.products, form.norms, strict=True):
        matrix, bias = _read(checkpoint, name)
        if scale is not None and shift is not None:
            moved = matrix.double() @ shift
            bias = (moved if bias is None else moved + bias.double()).float()
            matrix = (matrix.double() * scale).float()
        products.append((matrix, bias))
        scale = shift = None
        if norm is not None:
            weight, offset, mean, variance = (plain(checkpoint, f"{norm}.{key}").double()
                                              for key in ("weight", "bias", "running_mean", "running_var"))
            scale = weight / (variance + BATCH_NORM_EPS).sqrt()
            shift = offset - mean * scale
    return Gate(_packed(products, device, deterministic), form.temperature,
                float(plain(checkpoint, "gating.logit_scale").item()), form.pattern)


def _packed(products: Sequence[tuple[Tensor, Tensor | None]], device: torch.device, deterministic: bool,
            ) -> tuple[Weight, ...]:
    return tuple(pack(matrix.to(device), None if bias is None else bias.to(device), deterministic)
                 for matrix, bias in products)


def _check_rows(rows: Sequence[int], total: int, name: str, where: Any) -> None:
    if max(rows) >= total:
        raise ModelError(f"head.rows is {list(rows)} and {printed(name)}.weight of {where} has {total} rows: choose "
                         "others")


def _check_ungated(choice: HeadChoice, where: Any) -> None:
    for name in ("prompt_pattern", "temperature"):
        if getattr(choice, name) is not None:
            raise ModelError(f"head.{name} is of a gate, and the head of {where} has none: leave it out")


def _count(settings: dict[str, Any], name: str, default: int, where: Any) -> int:
    value = settings.get(name, default)
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json of {where} has {name} = {shown(value)} where a positive integer is needed: "
                         "repair it")
    return value


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not is_finite(value) or (name != "mean" and value <= 0):
        raise ModelError(f"head.{name} is {shown(value)}, it must be a {'' if name == 'mean' else 'positive '}number")
    return float(value)


def _ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value or not all(type(one) is int and one >= 0 for one in value):
        raise ModelError(f"head.{name} is {shown(value)}, it must be a list of row numbers" if name == "rows" else
                         f"head.{name} is {shown(value)}, it must be a list of token ids")
    return tuple(value)
