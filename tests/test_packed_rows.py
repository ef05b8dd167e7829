"""Matrices packed one below the other, from where they lie, and the memory that packed weights lie in."""

from __future__ import annotations

import mmap

import pytest
import torch

from stars import kernels
from stars.bindings import huge_pages, libstars

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars is not built")


@pytest.mark.parametrize("rows", [(32,), (7,), (64, 32, 5), (64, 33, 32), (1, 1), (96, 32, 32)])
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_rows_are_packed_as_those_of_one_matrix(rows, arithmetic):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(count, 37, generator=generator).bfloat16() for count in rows]
    bias = torch.randn(sum(rows), generator=generator)
    weight = kernels.pack_rows(parts, bias, arithmetic=arithmetic)
    joined = kernels.pack(torch.cat(parts), bias, arithmetic=arithmetic)
    assert torch.equal(weight.values, joined.values) and torch.equal(weight.bias, bias)
    assert torch.equal(weight.dense(), torch.cat(parts))
    assert (weight.out_features, weight.in_features, weight.dtype, weight.arithmetic) == (
        sum(rows), 37, torch.bfloat16, arithmetic)


def test_only_what_panels_would_share_is_copied_before(monkeypatch):
    joined: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *args, **options: joined.append(len(parts)) or cat(
        parts, *args, **options))
    kernels.pack_rows([torch.ones(64, 3, dtype=torch.bfloat16), torch.ones(40, 3, dtype=torch.bfloat16)])
    assert joined == []
    kernels.pack_rows([torch.ones(40, 3, dtype=torch.bfloat16), torch.ones(64, 3, dtype=torch.bfloat16)])
    assert joined == [2]


def test_rows_of_several_kinds_are_refused():
    wide, narrow = torch.ones(32, 4), torch.ones(32, 4, dtype=torch.bfloat16)
    for parts in ([wide, narrow], [narrow, torch.ones(32, 5, dtype=torch.bfloat16)]):
        with pytest.raises(ValueError, match="expected one number of columns and one type"):
            libstars.pack_rows(parts)


@pytest.fixture
def fresh(monkeypatch):
    """No block begun."""
    monkeypatch.setattr(huge_pages, "_block", None)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_memory_of_weights_is_apart_aligned_and_in_blocks(fresh):
    sizes = [huge_pages.LEAST, huge_pages.LEAST + 1, 3 * huge_pages.LEAST + 77, huge_pages.BLOCK - huge_pages.LEAST,
             huge_pages.BLOCK + 5, huge_pages.LEAST]
    taken = [huge_pages.empty(size) for size in sizes]
    for value, (one, size) in enumerate(zip(taken, sizes, strict=True)):
        assert (one.dtype, one.shape) == (torch.uint8, (size,)) and one.data_ptr() % huge_pages.ALIGNMENT == 0
        one.fill_(value)
    assert [set(one[[0, -1]].tolist()) for one in taken] == [{value} for value in range(len(sizes))]
    assert all(bool((one == value).all()) for value, one in enumerate(taken))
    places = [one.data_ptr() for one in taken]
    assert places[0] % huge_pages.PAGE == places[3] % huge_pages.PAGE == places[4] % huge_pages.PAGE == 0
    assert places[1] == places[0] + sizes[0]  # the first ones share a block,
    assert places[5] == places[3] + sizes[3]  # and one larger than a block leaves the newest one as it is


def test_small_ones_and_systems_without_large_pages_have_plain_memory(fresh, monkeypatch):
    assert huge_pages.empty(100).shape == (100,) and huge_pages._block is None
    monkeypatch.setattr(huge_pages, "_map", lambda size: None)
    assert huge_pages.empty(huge_pages.LEAST).shape == (huge_pages.LEAST,) and huge_pages._block is None
