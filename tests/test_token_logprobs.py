"""Log-probabilities and logits at every row of spans: those of a full recomputation, whatever passes they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from building import PADDED, config_of
from stars import logit_reads
from stars.cache import PagedCache
from stars.errors import ModelError
from stars.passes import Passes, Span
from stars.sizes import ModelSizes
from stars.target import CPU, Target
from toy import ToyModel

PROMPT = [1, 2, 3, 4, 2, 2, 1]
TEXTS = [[1], [2, 3, 1, 1, 4, 2, 3], [4, 4, 1], [3, 1], [2, 1, 1, 4, 3]]


def of(model: ToyModel, target: Target = CPU, sequences: int = 8) -> tuple[Passes, list[Span]]:
    """Passes of the model, and a span of each text behind the prompt, whose pages it has."""
    decoder = model.decoder()
    config = config_of(target, cache_tokens=32, page_size=4)
    sizes = ModelSizes(num_slabs=5, slab_len=8, max_sequences=sequences, max_positions=32, max_lanes=0)
    cache = PagedCache(decoder.config, config, sizes, decoder.dtype)
    passes = Passes(decoder, cache, config, sizes)
    table = cache.open(PROMPT)
    passes.prefill([(table, PROMPT, len(PROMPT))])
    return passes, [Span(table, text, len(PROMPT), range(8 * slab, 8 * slab + len(text)))
                    for slab, text in enumerate(TEXTS)]


def wanted_logits(model: ToyModel) -> torch.Tensor:
    """[rows of all texts, vocab], of a full recomputation each."""
    beginnings = [text[: row + 1] for text in TEXTS for row in range(len(text))]
    return torch.tensor(np.stack([model.logits(PROMPT + text) for text in beginnings]))


@pytest.mark.parametrize("sequences, chunk", [(8, 64), (2, 64), (8, 3)])
@pytest.mark.parametrize("target", [CPU, PADDED], ids=["CPU", "padded"])
def test_as_a_full_recomputation(monkeypatch, target, sequences, chunk):
    """In one pass and in several, in one product of the head and in several, recorded and replayed."""
    monkeypatch.setattr(logit_reads, "LOGIT_ROWS", chunk)
    model = ToyModel(vocab=5, seed=3)
    passes, spans = of(model, target, sequences)
    logits = wanted_logits(model)
    targets = [[(token + place) % 5 for place, token in enumerate(text)] for text in TEXTS]
    logprobs = torch.log_softmax(logits, dim=-1)
    flat = [token for those in targets for token in those]
    for _ in range(2):
        torch.testing.assert_close(passes.logits(spans), logits.float(), rtol=1e-5, atol=1e-5)
        found = passes.logprobs(spans, targets)
        assert [len(those) for those in found] == [len(text) for text in TEXTS]
        assert [one for those in found for one in those] == pytest.approx(
            logprobs[range(len(flat)), flat].tolist(), abs=1e-5)


def test_several_tokens_at_a_row():
    """Of spans of one row, beside others; what is not one for each row of a longer one is refused."""
    model = ToyModel(vocab=5, seed=3)
    passes, spans = of(model)
    logprobs = torch.log_softmax(wanted_logits(model), dim=-1)
    targets = [[4, 0, 2, 0], *TEXTS[1:]]
    found = passes.logprobs(spans, targets)
    assert found[0] == pytest.approx(logprobs[0, targets[0]].tolist(), abs=1e-5)
    flat = [token for text in TEXTS[1:] for token in text]
    assert [one for those in found[1:] for one in those] == pytest.approx(
        logprobs[range(1, 1 + len(flat)), flat].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="for every row of every span"):
        passes.logprobs(spans, [*TEXTS[:1], [1], *TEXTS[2:]])


def test_a_model_that_has_no_logits_says_so():
    passes, spans = of(ToyModel(seed=4, head="reward"))
    with pytest.raises(ModelError, match="no language model head"):
        passes.logits(spans)
    with pytest.raises(ModelError, match="no language model head"):
        passes.logprobs(spans, TEXTS)
