"""Prefill through libraries: torch's SDPA on real pages, the others against stand-ins that check every argument, and
which of them is chosen or refused.

A stand-in has the signature and the meaning that the library documents, in plain torch: what is tested is our call.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from stars.kernels import prefill_attention as subject
from stars.kernels.attention import attention_reference
from stars.kernels.prefill_attention import (
    BACKENDS,
    BackendError,
    Case,
    Prefill,
    build,
    choose_backend,
    prefill_attention,
    problem,
)
from stars.kernels.types import Batch, LayerKV

HEAD_DIM = 16
IDLE = 3  # rows after the real ones


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What was found of libraries belongs to one test."""
    subject._load.cache_clear()
    yield
    subject._load.cache_clear()


# -- passes over pages --------------------------------------------------------------------------------------------


class Sequence(NamedTuple):
    prefix: int
    count: int


PASSES = {
    "a prompt": [Sequence(0, 37)],
    "one row": [Sequence(0, 1)],
    "a row behind a page": [Sequence(16, 1)],
    "up to a page": [Sequence(0, 16)],
    "one short of a page": [Sequence(0, 15)],
    "one past a page": [Sequence(0, 17)],
    "the next chunk": [Sequence(37, 17)],
    "single rows": [Sequence(15, 1), Sequence(0, 1), Sequence(32, 1)],
    "several": [Sequence(0, 37), Sequence(17, 15), Sequence(63, 1), Sequence(0, 1), Sequence(31, 33), Sequence(1, 17)],
}


class Pass(NamedTuple):
    q: torch.Tensor
    kv: LayerKV
    batch: Batch
    prefill: Prefill


def make_pass(sequences: list[Sequence], backend: str, heads: int = 4, kv_heads: int = 2,
              dtype: torch.dtype = torch.float32, page_size: int = 16) -> Pass:
    """A pass over shuffled pages; idle rows and whatever no row may see are NaN."""
    draw = torch.Generator().manual_seed(len(sequences) + heads)
    width = max(s.prefix + s.count for s in sequences) // page_size + 2
    tables = torch.randperm(len(sequences) * width, generator=draw).int().view(len(sequences), width)
    lengths = [s.count for s in sequences]
    rows = sum(lengths)
    q = torch.randn(rows + IDLE, heads, HEAD_DIM, generator=draw)
    q[rows:] = torch.nan
    pages = [torch.randn(tables.numel() * page_size, kv_heads, HEAD_DIM, generator=draw) for _ in range(2)]
    written = torch.zeros(tables.numel() * page_size, dtype=torch.bool)
    for s, table in zip(sequences, tables.long(), strict=True):
        at = torch.arange(s.prefix + s.count)
        written[table[at // page_size] * page_size + at % page_size] = True
    for tensor in pages:
        tensor[~written] = torch.nan
    none = torch.zeros(len(sequences), dtype=torch.int32)
    every_row = torch.zeros(rows + IDLE, dtype=torch.int32)
    batch = Batch(
        every_row, every_row, every_row, False, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        torch.arange(len(sequences), dtype=torch.int32), tables,
        torch.tensor([s.prefix for s in sequences], dtype=torch.int32), none, none)
    k_pages, v_pages = (tensor.to(dtype) for tensor in pages)
    kv = LayerKV(k_pages, v_pages, k_pages[:0], v_pages[:0], page_size)
    prefill = build(backend, tables.tolist(), [s.prefix for s in sequences], lengths, page_size, "cpu")
    return Pass(q.to(dtype), kv, batch, prefill)


def reference(of: Pass, dtype: torch.dtype, scale: float, window: int | None, softcap: float | None) -> torch.Tensor:
    """float32 [rows, heads, head_dim]: the reference on float32 copies, or plain torch with all steps in `dtype`."""
    if dtype == torch.float32:
        kv = LayerKV(*(tensor.float() for tensor in of.kv[:4]), of.kv.page_size)
        out = torch.zeros_like(of.q, dtype=torch.float32)
        attention_reference(of.q.float(), kv, of.batch, scale, out, window, softcap)
        return out[: of.prefill.rows]
    keys, values = of.kv.k_pages[of.prefill.key_rows.long()], of.kv.v_pages[of.prefill.key_rows.long()]
    return plain_attention(of.q[: of.prefill.rows].to(dtype), keys.to(dtype), values.to(dtype),
                           of.prefill.cu_seqlens_q, of.prefill.cu_seqlens_k, scale,
                           None if window is None else window - 1, 0, softcap).float()


def plain_attention(q, k, v, cu_q, cu_k, scale, left, right, softcap=None) -> torch.Tensor:
    """Attention over ragged sequences as the libraries document it, in the type of q. The last row is at the last key;
    a row sees `left` keys before its own and `right` after it, None being all of them."""
    out = torch.empty_like(q)
    for s in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        repeat = q.shape[1] // k.shape[1]
        key, value = k[keys].repeat_interleave(repeat, 1), v[keys].repeat_interleave(repeat, 1)
        scores = torch.einsum("rhd,khd->hrk", q[rows], key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        count, length = rows.stop - rows.start, keys.stop - keys.start
        ahead = torch.arange(length) - (torch.arange(count) + length - count)[:, None]  # [rows, keys]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if right is not None:
            seen &= ahead <= right
        if left is not None:
            seen &= ahead >= -left
        out[rows] = torch.einsum("hrk,khd->rhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)
    return out


def check(of: Pass, scale: float, window: int | None, softcap: float | None = None) -> None:
    """At most twice the error of plain torch in the same type, against float32; idle rows are left alone."""
    out = torch.full_like(of.q, 7.0)
    with torch.inference_mode():
        prefill_attention(of.q, of.kv, of.prefill, scale, out, window, softcap)
    assert (out[of.prefill.rows :] == 7).all()
    exact = reference(of, torch.float32, scale, window, softcap)
    allowed = 1e-5
    if of.q.dtype != torch.float32:
        allowed += 2 * (reference(of, of.q.dtype, scale, window, softcap) - exact).abs().max().item()
    assert (out[: of.prefill.rows].float() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PASSES)
def test_sdpa(name, dtype):
    """torch's SDPA gives the reference's attention over pages of several sizes, grouped heads and windows."""
    for heads, kv_heads in ((4, 4), (4, 1), (8, 2), (8, 1)):
        for page_size in (16, 4):
            of = make_pass(PASSES[name], "sdpa", heads, kv_heads, dtype, page_size)
            for window in (None, 1, 2, 17, 37, 1000):
                check(of, 0.3, window)


def test_build():
    """Rows of keys follow the pages, everything is int32 in one block, and empty sequences are refused."""
    prefill = build("sdpa", [[5, 2, 9], [0, 7]], [3, 0], [2, 4], 4, "cpu")
    assert prefill.key_rows.tolist() == [20, 21, 22, 23, 8, 0, 1, 2, 3]
    assert prefill.cu_seqlens_q.tolist() == [0, 2, 6] and prefill.cu_seqlens_k.tolist() == [0, 5, 9]
    assert prefill.q_lengths == (2, 4) and prefill.k_lengths == (5, 4)
    assert (prefill.rows, prefill.max_q, prefill.max_k) == (6, 4, 5)
    tensors = (prefill.key_rows, prefill.cu_seqlens_q, prefill.cu_seqlens_k)
    assert {tensor.dtype for tensor in tensors} == {torch.int32} and all(tensor.is_contiguous() for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    with pytest.raises(ValueError, match="sequence without any: leave it out"):
        build("sdpa", [[1], [2]], [0, 4], [3, 0], 4, "cpu")


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_a_softcap_is_never_passed_over(backend):
    """A backend without softcap refuses it also where nobody asked choose_backend."""
    of = make_pass(PASSES["a prompt"], backend)
    with pytest.raises(ValueError, match=f"{backend} has no softcap"):
        prefill_attention(of.q, of.kv, of.prefill, 0.3, torch.empty_like(of.q), None, 30.0)


# -- stand-ins ----------------------------------------------------------------------------------------------------


def check_ragged(q, k, v, cu_q, cu_k, max_q, max_k) -> None:
    """What every varlen function takes for granted, and reads out of bounds or computes wrongly without."""
    for tensor, cumulated, most in ((q, cu_q, max_q), (k, cu_k, max_k), (v, cu_k, max_k)):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1 and tensor.dtype == q.dtype and not tensor.isnan().any()
        assert cumulated.dtype == torch.int32 and cumulated.is_contiguous() and len(cumulated) == len(cu_q)
        assert type(most) is int and most == cumulated.diff().max() and cumulated.diff().min() >= 1
        assert cumulated[0] == 0 and cumulated[-1] == len(tensor)


def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                 return_attn_probs=False, block_table=None):
    """flash-attn 2.6 to 2.8: -1 is no window, and causal sets the right one to 0."""
    assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
    check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = (None if size < 0 else size for size in window_size)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return plain_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, 0 if causal else right, softcap)


def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                 softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                 num_splits=1, pack_gqa=None, deterministic=False, return_lse=False):
    """flash-attn-4: None is no window, a negative one is taken as it stands, and the output comes in a pair."""
    assert all(value is None for value in (qv, min_seqlen_k, seqused_q, seqused_k, gather_kv_indices, page_table,
                                           learnable_sink, pack_gqa)) and num_splits == 1 and not return_lse
    check_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = window_size
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = plain_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, 0 if causal else right, softcap)
    return out, None


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """torch 2.10."""
    assert return_aux is None
    check_ragged(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return plain_attention(query, key, value, cu_seq_q, cu_seq_k, query.shape[-1] ** -0.5, None,
                           0 if is_causal else None)


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1)):
    """torch 2.11: causal is (-1, 0), as a tuple."""
    assert return_aux is None and type(window_size) is tuple
    check_ragged(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    left, right = (None if size < 0 else size for size in window_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return plain_attention(query, key, value, cu_seq_q, cu_seq_k, scale, left, right)


def varlen_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    """torch 2.12 and 2.13: fewer key heads have to be asked for."""
    assert (seqused_k, block_table, num_splits) == (None, None, None)
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
                       window_size=window_size)


STAND_INS = {
    "flash-attn-4": ("flash-attn-4", flash_attn_4), "flash-attn-2": ("flash-attn-2", flash_attn_2),
    "torch 2.10": ("varlen", varlen_2_10), "torch 2.11": ("varlen", varlen_2_11), "torch 2.12": ("varlen", varlen_2_12),
}


def put(monkeypatch, backend: str, function) -> None:
    """Makes `function` what an import of the backend's library finds."""
    name, attribute = subject._SOURCES[backend][:2]
    packages = [name] if name.startswith("torch") else ["flash_attn", name]
    for package in packages:
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, loader=None, origin="a stand-in")
        module.__path__ = []
        monkeypatch.setitem(sys.modules, package, module)
    setattr(module, attribute, function)
    if backend == "varlen":
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stand_in", STAND_INS)
def test_calls_of_libraries(stand_in, dtype, monkeypatch):
    """Each call means causal attention at the right scale, window and softcap, and passes no idle row."""
    backend, function = STAND_INS[stand_in]
    put(monkeypatch, backend, function)
    assert problem(backend) is None
    windows = (None,) if stand_in == "torch 2.10" else (None, 1, 2, 17, 64, 1000)
    softcaps = (None, 0.7) if backend.startswith("flash") else (None,)
    for sequences in PASSES.values():
        for heads, kv_heads in ((4, 4), (4, 1), (8, 1)):
            of = make_pass(sequences, backend, heads, kv_heads, dtype)
            for window, softcap, scale in itertools.product(windows, softcaps, (HEAD_DIM**-0.5, 0.3)):
                check(of, scale, window, softcap)


def test_stand_ins_are_what_they_stand_in_for():
    """varlen_2_12 has the signature of the torch that is here, from 2.12 on."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    theirs, ours = (list(inspect.signature(function).parameters) for function in (varlen.varlen_attn, varlen_2_12))
    if "enable_gqa" not in theirs:
        pytest.skip("an older torch")
    assert theirs[: len(ours)] == ours


# -- installed or not ---------------------------------------------------------------------------------------------


def write_package(tmp_path, monkeypatch, body: str | None, cute: str | None = None) -> None:
    """A package flash_attn, and flash_attn.cute where given, at the front of the path; None writes no module."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    if body is not None:
        (package / "__init__.py").write_text(body)
    if cute is not None:
        (package / "cute").mkdir()
        (package / "cute" / "__init__.py").write_text(cute)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute"):  # so that what an import leaves behind is taken away again
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


GOOD_2 = "def flash_attn_varlen_func(q, k, v, window_size=(-1, -1), softcap=0.0): ...\n"
GOOD_4 = "def flash_attn_varlen_func(q, max_seqlen_q=None, max_seqlen_k=None, window_size=None, softcap=0.0): ...\n"


@pytest.mark.parametrize(("body", "cute", "problem_2", "problem_4"), [
    (GOOD_2, None, None, "is not installed"),
    (GOOD_2, GOOD_4, None, None),
    (None, GOOD_4, "is not installed", None),
    ("", None, "is not importable (module 'flash_attn' has no attribute 'flash_attn_varlen_func')", "is not installed"),
    ("raise ImportError('undefined symbol:\\n  _ZN3c10')", GOOD_4,
     *["is not importable (undefined symbol: _ZN3c10)"] * 2),
    ("raise OSError", None, *["is not importable (OSError)"] * 2),
    (GOOD_2.replace(", softcap=0.0", ""), None, "is too old (no softcap)", "is not installed"),
    # What flash-attn 2.8 brings along, without and with the package that it needs.
    (GOOD_2, "import nothing_of_that_name", None, "is not importable (No module named 'nothing_of_that_name')"),
    (GOOD_2, GOOD_4.replace("max_seqlen_k=None, ", ""), None, "is too old (no max_seqlen_k)"),
])
def test_installs(tmp_path, monkeypatch, body, cute, problem_2, problem_4):
    """A broken or old install counts as absent, and why is remembered."""
    write_package(tmp_path, monkeypatch, body, cute)
    assert problem("flash-attn-2") == problem_2 and problem("flash-attn-4") == problem_4


def test_nothing_installed(monkeypatch):
    """Without any library SDPA is left, and an explicit choice says how to install."""
    for name in ("flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "flash_attn.cute", raising=False)
    case = Case((9, 0), torch.bfloat16, 128)
    assert [problem(name) for name in BACKENDS] == ["is not installed"] * 2 + ["is not in this torch", None]
    assert choose_backend(case) == "sdpa"
    for name, extra in (("flash-attn-2", "flash"), ("flash-attn-4", "flash4")):
        with pytest.raises(BackendError, match=rf'"{name}", which is not installed: .*\[{extra}\]", or use prefill_ba'):
            choose_backend(case, name)
    with pytest.raises(BackendError, match='"varlen", which is not in this torch: use prefill_backend="auto"'):
        choose_backend(case, "varlen")


def test_torch_without_flash_attention(monkeypatch):
    """A build of torch without the kernels has the function all the same."""
    put(monkeypatch, "varlen", varlen_2_12)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert problem("varlen") == "is not in this build of torch"


def test_no_import_before_the_case_suits(tmp_path, monkeypatch):
    """A library is imported only for a case that it takes."""
    write_package(tmp_path, monkeypatch, GOOD_2, GOOD_4)
    assert choose_backend(Case((9, 0), torch.float32, 128)) == "triton" and "flash_attn" not in sys.modules
    assert choose_backend(Case((8, 0), torch.bfloat16, 128)) == "flash-attn-2"
    assert "flash_attn" in sys.modules and "flash_attn.cute" not in sys.modules
    assert choose_backend(Case((9, 0), torch.bfloat16, 128)) == "flash-attn-4"


# -- the choice ---------------------------------------------------------------------------------------------------


def serves(name: str, case: Case) -> bool:
    """What each backend takes, said once more."""
    if name == "triton":
        return True
    half = case.dtype in (torch.float16, torch.bfloat16)
    flash = case.head_dim % 8 == 0 and case.head_dim <= 256
    return half and not case.deterministic and {
        "flash-attn-4": flash and (case.capability[0] == 9 or case.capability[0] == 10 and case.head_dim <= 128),
        "flash-attn-2": flash, "varlen": flash and case.softcap is None, "sdpa": case.softcap is None}[name]


CASES = [Case(*values) for values in itertools.product(
    [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [torch.float16, torch.bfloat16, torch.float32],
    [64, 80, 96, 128, 256, 100, 264], [None, 30.0], [False, True], [False, True])]


@pytest.mark.parametrize("installed", [subset for size in range(4) for subset in itertools.combinations(
    ["flash-attn-4", "flash-attn-2", "varlen"], size)], ids=lambda names: "+".join(names) or "none")
def test_choice(installed, monkeypatch):
    """The first that is there and serves the case, for every case; an explicit choice of any other is refused."""
    found = {"flash-attn-4": flash_attn_4, "flash-attn-2": flash_attn_2, "varlen": varlen_2_12}
    monkeypatch.setattr(subject, "_load", lambda name: (found[name], None) if name in installed else (None, "is out"))
    there = {*installed, "sdpa", "triton"}
    for case in CASES:
        good = [name for name in [*BACKENDS, "triton"] if name in there and serves(name, case)]
        assert choose_backend(case) == good[0], case
        for name in [*BACKENDS, "triton"]:
            if name in good:
                assert choose_backend(case, name) == name
            else:
                with pytest.raises(BackendError, match=f'prefill_backend is "{name}", which .*: use prefill_backend='):
                    choose_backend(case, name)


def test_torch_2_10_has_no_window(monkeypatch):
    """There varlen attention serves full attention only."""
    put(monkeypatch, "varlen", varlen_2_10)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    case = Case((9, 0), torch.bfloat16, 128)
    assert choose_backend(case) == "varlen" and choose_backend(case._replace(windowed=True)) == "sdpa"
    with pytest.raises(BackendError, match="which has no sliding window in this torch"):
        choose_backend(case._replace(windowed=True), "varlen")


def test_refusals_say_why():
    """One sentence with the culprit."""
    good = Case((9, 0), torch.bfloat16, 128)
    for name, case, reason in (
        ("flash-attn-4", good._replace(capability=(8, 9)), "needs a GPU of compute capability 9 or 10, not 8.9"),
        ("flash-attn-4", good._replace(capability=(10, 0), head_dim=256), "up to 128 as head_dim, not 256"),
        ("flash-attn-2", good._replace(capability=(7, 5)), "needs a GPU of compute capability 8.0 or more, not 7.5"),
        ("flash-attn-2", good._replace(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
        ("varlen", good._replace(softcap=30.0), "has no softcap"),
        ("sdpa", good._replace(deterministic=True), "the same bits in any batch, as deterministic=True does"),
    ):
        with pytest.raises(BackendError, match=reason):
            choose_backend(case, name)
    with pytest.raises(ValueError, match="prefill_backend is 'fa3', it must be one of \"auto\", \"flash-attn-4\", "):
        choose_backend(good, "fa3")
