"""Whether a GPU can run what is asked of it: refused here, in one sentence, before any weight is read."""

from __future__ import annotations

import torch

from stars.errors import ModelError
from stars.kernels.limits import MAX_HEADS_A_KEY, MAX_HIDDEN, MAX_VOCAB
from stars.model.config import ModelConfig

MIN_CAPABILITY = (8, 0)  # bfloat16 tensor cores and asynchronous copies
MIN_TRITON = (3, 6)
HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head sizes that attention has kernels for."""


def auto_device(config: ModelConfig) -> str:
    """What device="auto" is: "cuda" where there is a GPU whose kernels serve the model, else "cpu"."""
    try:
        check_gpu()
        check_model(config)
    except ModelError:
        return "cpu"
    return "cuda"


def check_gpu() -> None:
    """Raises ModelError unless there is a GPU of a supported capability and a Triton that is new enough."""
    if not torch.cuda.is_available():
        raise ModelError('device="cuda" needs an NVIDIA GPU and a CUDA build of torch, and torch finds none: use '
                         'device="cpu"')
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise ModelError(f"the GPU has compute capability {capability[0]}.{capability[1]} and the kernels need "
                         f'{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or more: use device="cpu"')
    try:
        import triton
    except ImportError:
        raise ModelError('device="cuda" needs triton: pip install triton') from None
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        raise ModelError(f"triton is {triton.__version__} and the kernels need {MIN_TRITON[0]}.{MIN_TRITON[1]} or "
                         "more: pip install --upgrade triton")


def check_model(config: ModelConfig, sampled: bool = True) -> None:
    """Raises ModelError for a model whose shape the GPU's kernels do not serve; `sampled`: a language model's."""
    if config.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ModelError(f"the model has head_dim {config.head_dim} and the GPU's attention has kernels for {sizes}: "
                         'use device="cpu"')
    for name, size, largest in (("query heads for each key head", config.num_heads // config.num_kv_heads,
                                 MAX_HEADS_A_KEY),
                                ("hidden columns", config.hidden_size, MAX_HIDDEN),
                                ("tokens in its vocabulary", config.vocab_size if sampled else 0, MAX_VOCAB)):
        if size > largest:
            raise ModelError(f'the model has {size} {name} and the GPU\'s kernels take {largest}: use device="cpu"')
