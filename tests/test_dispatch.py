"""The dispatch table: rows are whole, tensors decide, and neither `kernels` nor `bindings` knows the engine."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import blend_cases
import edit_cases
import logprob_cases
import penalty_cases
import ranking_cases
from sampler_lanes import make_lanes
from stars import bindings, kernels
from stars.bindings import libstars
from stars.kernels import dispatch
from stars.kernels.dispatch import OPERATIONS, Implementation, operation, references_only
from stars.kernels.linear import pack
from stars.kernels.prefill_attention import build
from stars.kernels.types import Batch, LaneState, LayerKV, SplitSpace, Stream
from test_libstars_verdict import VOCAB, make_draft, make_trailing

ROWS = sorted(OPERATIONS)
MAY_IMPORT = {"kernels": ("stars.kernels", "stars.bindings"),
              "bindings": ("stars.bindings", "stars.kernels.types", "stars.errors")}


# -- the rows -----------------------------------------------------------------------------------------------------


def parameters(function: Callable) -> list[tuple[str, object]]:
    """Names and defaults, in order."""
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]


def declared(target: str) -> list[tuple[str, object]]:
    """As `parameters`, from the source: Triton need not be there, nor a GPU."""
    module, _, name = target.partition(":")
    tree = ast.parse(Path(find_spec(module).origin).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:  # a module that gathers functions of others
        function = getattr(__import__(module, fromlist=[name]), name)
        return parameters(function)
    [function] = found
    arguments, defaults = function.args.args, function.args.defaults
    values = [inspect.Parameter.empty] * (len(arguments) - len(defaults)) + [ast.literal_eval(one) for one in defaults]
    return list(zip([argument.arg for argument in arguments], values, strict=True))


def test_every_operation_of_the_package_is_a_row():
    assert set(kernels.__all__) - {"Weight", "pack", "pack_rows"} == set(ROWS)
    assert all(getattr(kernels, name) is OPERATIONS[name].call for name in ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_whole(name):
    """Each column takes what the operation takes; what an implementation takes besides has a default."""
    row = OPERATIONS[name]
    assert row.call.__doc__ and row.call.__name__ == name
    assert row.cpu or row.cuda
    wanted = parameters(row.call)
    assert parameters(row.reference) == wanted
    for implementation in (*row.cpu, *row.cuda):
        target = implementation.target
        found = declared(target) if isinstance(target, str) else parameters(target)
        assert found[: len(wanted)] == wanted, target
        assert all(default is not inspect.Parameter.empty for _, default in found[len(wanted) :]), target
        if implementation.when is not None:
            inspect.signature(implementation.when).bind(*wanted)
    for column in (row.cpu, row.cuda):  # after one that always runs, none ever would
        assert None not in [implementation.when for implementation in column[:-1]]


def test_conditions_are_asked_in_order_and_the_reference_serves_the_rest(monkeypatch):
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    ran: list[str] = []

    def small(x: torch.Tensor, scale: float = 1.0) -> None:
        ran.append("small")

    def narrow(x: torch.Tensor, scale: float = 1.0) -> None:
        ran.append("narrow")

    def reference(x: torch.Tensor, scale: float = 1.0) -> None:
        ran.append(f"reference {scale}")

    @operation(cpu=[Implementation(small, lambda x, scale=1.0: x.numel() < 4),
                    Implementation(narrow, when=lambda x, scale=1.0: x.dtype == torch.float16)],
               cuda="stars.kernels.nowhere:nothing", reference=reference)
    def example(x: torch.Tensor, scale: float = 1.0) -> None:
        """Nothing."""

    monkeypatch.setattr(dispatch, "column", lambda tensor: "cpu")
    for size, dtype in ((3, torch.float16), (5, torch.float16), (5, torch.float32)):
        example(torch.zeros(size, dtype=dtype), 2.0)
    example(x=torch.zeros(3))
    assert ran == ["small", "narrow", "reference 2.0", "small"]
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):  # not before it is asked for
        example(torch.zeros(1))
    monkeypatch.setattr(dispatch, "column", lambda tensor: "reference")
    example(torch.zeros(1), scale=3.0)
    assert ran[4:] == ["reference 3.0"] and list(dispatch.OPERATIONS) == ["example"]


def test_where_tensors_live_decides(monkeypatch):
    on_cpu, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    assert dispatch.column(elsewhere) == "reference"
    monkeypatch.setattr(libstars, "available", lambda: True)
    assert dispatch.column(on_cpu) == "cpu"
    with references_only():
        assert dispatch.column(on_cpu) == "reference"
    monkeypatch.setattr(libstars, "available", lambda: False)
    assert dispatch.column(on_cpu) == "reference"


# -- the columns of the CPU ---------------------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(rows: int = 40) -> LayerKV:
    """Pages of 4 tokens and slabs, two key heads of 6."""
    return LayerKV(*numbers(4, rows, 2, 6, seed=9), 4)


def batch(into_slab: bool = True) -> Batch:
    """Five rows of two sequences that share a prefix of 9 keys; one row is not written."""
    return Batch(ints([0] * 5), ints([9, 10, 9, 10, 11]), ints([20, 21, 30, -1, 32]), into_slab, ints([0, 2, 5]),
                 ints([0, 0]), ints([[3, 1, 5]]), ints([9, 9]), ints([20, 30]), ints([0, 0]))


def of_append_draft() -> tuple:
    draw = np.random.default_rng(3)
    draft = make_draft(draw, 5, 7, 3)
    return draft, make_trailing(draw, draft, 6, 2), VOCAB


def lanes_with_cuts() -> LaneState:
    """Five lanes, one of which is cut, and one too early to be."""
    lanes = make_lanes(5, temperature=0.7, top_k=11)
    lanes.entropy_cut[[1, 3]], lanes.least_tokens[3] = 0.5, 1
    return lanes


def stream() -> Stream:
    """Five rows of 64 features whose scaled and squares are not of their residual, so that each is seen to be read."""
    return Stream(numbers(5, 64, seed=4), numbers(5, 64, seed=5), numbers(5, 2, seed=6).square() * 32)


def space() -> SplitSpace:
    return SplitSpace(torch.zeros(1), ints([0]))


CASES: dict[str, Callable[[], tuple]] = {
    "append_draft": of_append_draft,
    "apply_penalties": lambda: penalty_cases.make_case(4, lanes=5, vocab=37),
    "attention": lambda: (numbers(5, 4, 6), caches(), batch(), 0.4, torch.zeros(5, 4, 6), 7, 20.0),
    "blend_logits": lambda: blend_cases.make_blend(4, 3, 6, 5, 37, unread=9.0),
    "copy_rows": lambda: (*numbers(2, 3, 11, 2, 5), ints([4, 0, 9]), *torch.zeros(2, 3, 7, 2, 5), ints([6, 1, 2])),
    "edit_logits": lambda: edit_cases.make_case(3, lanes=5, vocab=37),
    "embedding": lambda: (ints([3, 16, 3, 0, 7]), pack(numbers(17, 9)), torch.zeros(5, 9)),
    "embedding_scaled": lambda: (ints([3, 16, 3, 0, 7]), pack(numbers(17, 64)), numbers(64, seed=1), stream()),
    "linear": lambda: (numbers(5, 9), pack(numbers(17, 9, seed=1), numbers(17, seed=2)), torch.zeros(5, 17)),
    "linear_normed": lambda: (stream(), pack(numbers(17, 64, seed=1), numbers(17, seed=2)), 1e-5, torch.zeros(5, 17),
                              space()),
    "linear_residual": lambda: (numbers(5, 9), pack(numbers(64, 9, seed=1), numbers(64, seed=2)), numbers(64, seed=3),
                                stream(), space()),
    "linear_swiglu": lambda: (stream(), pack(numbers(34, 64, seed=1), numbers(34, seed=2)), 1e-5, torch.zeros(5, 17),
                              space()),
    "qkv_rope": lambda: (stream(), pack(numbers(48, 64, seed=7), numbers(48, seed=8)), 1e-5, batch(),
                         *numbers(2, 13, 3, seed=1).sin(), caches(), torch.zeros(5, 4, 6), numbers(6, seed=2),
                         numbers(6, seed=3), space()),
    "rescale": lambda: (numbers(5, 37), 1.7, 2.5),
    "rms_norm": lambda: (numbers(5, 9), numbers(9, seed=1), 1e-5, torch.zeros(5, 9), numbers(5, 9, seed=2)),
    "rope_write": lambda: (numbers(5, 8 * 6), batch(), *numbers(2, 13, 3, seed=1).sin(), caches(), torch.zeros(5, 4, 6),
                           numbers(6, seed=2), numbers(6, seed=3), 1e-5),
    "sample_step": lambda: (numbers(5, 37), lanes_with_cuts(), True),
    "score": lambda: (numbers(5, 9), numbers(5, 9, seed=1), numbers(9, seed=2), 1e-5,
                      pack(numbers(1, 9, seed=3), torch.tensor([0.5])), torch.zeros(5, 9), torch.zeros(5)),
    "swiglu": lambda: (numbers(5, 34), torch.zeros(5, 17)),
    "take_rows": lambda: (numbers(5, 9), ints([4, 0, 4]), torch.zeros(3, 9)),
    "token_logprobs": lambda: (numbers(5, 37), ints([0, 36, -1, 7, 21, 3, 3, 3, 0, -1]).view(5, 2), torch.zeros(5, 2)),
    "top_logprobs": lambda: logprob_cases.make_draws(2, lanes=5, vocab=37),
    "top_tokens": lambda: (numbers(5, 37), ranking_cases.make_ranking(5, 6, (6, 0, 3, 1, 4), top_p=0.7), True),
}
"""Arguments of odd sizes, the same at every call."""


def tensors(arguments: tuple) -> Iterator[torch.Tensor]:
    for one in arguments:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, tuple):
            yield from tensors(one)


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
@pytest.mark.parametrize("name", ROWS)
def test_the_cpu_agrees_with_the_reference(name, monkeypatch):
    """All that an operation writes, and that it writes at all, from memory of its own."""
    row = OPERATIONS[name]
    given, ours, wanted = (CASES[name]() for _ in range(3))
    row.call(*ours)
    row.reference(*wanted)
    with references_only():
        row.call(*(again := CASES[name]()))
    changed = 0
    for before, got, right, once_more in zip(*map(tensors, (given, ours, wanted, again)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
        assert torch.equal(once_more, right)
        changed += not torch.equal(before, right)
    assert changed


def test_copies_of_another_type_than_libstars_has():
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        k, v = (10 * numbers(2, 3, 11, 2, 5)).to(dtype)
        to_k, to_v = torch.zeros(2, 3, 7, 2, 5, dtype=dtype)
        kernels.copy_rows(k, v, ints([4, 0]), to_k, to_v, ints([6, 1]))
        assert torch.equal(to_k[:, [6, 1]], k[:, [4, 0]]) and torch.equal(to_v[:, [6, 1]], v[:, [4, 0]])


def test_a_pass_for_a_library_goes_to_it():
    q, kv, into_pages = numbers(5, 4, 6), caches(), batch(into_slab=False)
    wanted, got = torch.zeros(5, 4, 6), torch.zeros(5, 4, 6)
    OPERATIONS["attention"].reference(q, kv, into_pages, 0.4, wanted)
    by_library = into_pages._replace(prefill=build("sdpa", [[3, 1, 5]] * 2, [9, 9], [2, 3], 4, "cpu"),
                                     block_tables=ints([[-(1 << 20)] * 3]))  # which it does not read
    kernels.attention(q, kv, by_library, 0.4, got)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# -- what the rooms import ----------------------------------------------------------------------------------------


def imported(source: str) -> Iterator[str]:
    """Every module named in an import, wherever it stands: in functions and for types alone too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room they come from"
            # What `from stars import` names are rooms.
            yield from [node.module] if node.module != "stars" else (f"stars.{alias.name}" for alias in node.names)


def test_imports_are_found_wherever_they_stand():
    source = "import stars.rules\ndef f():\n    from stars import errors, kernels\nif X:\n    from stars.cache import A"
    assert sorted(imported(source)) == ["stars.cache", "stars.errors", "stars.kernels", "stars.rules"]


@pytest.mark.parametrize("room", [kernels, bindings], ids=["kernels", "bindings"])
def test_a_room_imports_nothing_of_the_engine(room):
    name, folder = room.__name__.removeprefix("stars."), Path(room.__file__).parent
    files = list(folder.rglob("*.py") if name == "kernels" else folder.glob("*.py"))  # adapters know the engine
    assert len(files) > (30 if name == "kernels" else 1)
    for file in files:
        for module in imported(file.read_text()):
            assert module.partition(".")[0] != "stars" or any(
                f"{module}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[name]), f"{file} imports {module}"


def test_rows_name_nothing_of_the_engine():
    targets = [one.target for row in OPERATIONS.values() for one in (*row.cpu, *row.cuda)]
    targets = [target for target in targets if isinstance(target, str)]
    assert len(targets) >= 20
    assert all(target.startswith(("stars.kernels.triton.", "stars.bindings.libstars:")) for target in targets)


def test_a_cpu_without_triton():
    """Neither Triton nor libstars is imported before a tensor asks, and Triton need not be there at all."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from stars import kernels
assert "stars.bindings.libstars" not in sys.modules
kernels.swiglu(torch.ones(3, 10), out := torch.empty(3, 5))
assert torch.allclose(out, torch.nn.functional.silu(torch.ones(3, 5)))
assert "stars.bindings.libstars" in sys.modules
assert not [name for name in sys.modules if name.startswith("stars.kernels.triton.")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
