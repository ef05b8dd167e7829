"""Models that are one GGUF file: the same numbers, texts and refusals as of a directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests: pip install gguf==0.19.0")

from gguf_files import K_TYPES, write_gguf  # noqa: E402
from test_loader import logits, reward  # noqa: E402
from tiny_models import TinyModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = TinyModel("llama", hidden=64, heads=4, kv_heads=2, intermediate=96, layers=1)
LARGE = TinyModel("llama", hidden=256, heads=4, kv_heads=2, intermediate=512, layers=1, tied=True)
RELATIVE = 1e-3
"""Of the largest logit. Products of quantised weights may round activations; all else is float32."""


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.fixture(scope="session")
def gguf_model(tiny_model, tmp_path_factory):
    """gguf_model(tiny, kind, kinds): that file, with its twin directory beside it. Treat both as read-only."""
    written: dict[tuple, Path] = {}

    def get(tiny: TinyModel, kind: str = "F32", kinds: tuple[tuple[str, str], ...] = (), **metadata) -> Path:
        key = (tiny, kind, kinds, tuple(metadata.items()))
        if key not in written:
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            written[key] = write_gguf(path, tiny_model(tiny), kind, dict(kinds), **metadata)
        return written[key]

    return get


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_TYPES])
def test_every_type_gives_the_logits_of_its_numbers(gguf_model, kind):
    """All matrices of one type, the embedding that is the head among them."""
    path = gguf_model(LARGE if kind in K_TYPES else SMALL, kind)
    close(logits(path), logits(path.with_suffix("")))
