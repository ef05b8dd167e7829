"""libstars against the torch references, and what it promises beyond them: bits that depend on nothing but the row.

Tolerances are derived. A float32 sum of K products in any order errs by at most K u / (1 - K u) times the sum of their
magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), with u = 2^-24.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch

from libstars_threads import threads
from random_products import random_case, run_linear
from stars import kernels
from stars.bindings import libstars
from stars.bindings.layouts import OPERATIONS, STRUCTURES
from stars.bindings.library import loaded
from stars.kernels.dispatch import references_only

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

U = 2.0**-24
ROWS = (1, 2, 3, 5, 17, 37, 123)
SHAPES = ((1, 1), (7, 3), (33, 31), (100, 65), (255, 129), (641, 333), (256, 2048))  # in_features, out_features
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, out_features", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_within_the_bound_of_a_float32_sum(rows, in_features, out_features, dtype):
    for with_bias in (False, True):
        x, matrix, bias = random_case(in_features, out_features, dtype, rows, with_bias)
        exact, magnitude = x.double() @ matrix.double().T, x.double().abs() @ matrix.double().abs().T
        if with_bias:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        terms = in_features + with_bias
        error = (run_linear(x, kernels.pack(matrix, bias)).double() - exact).abs()
        assert (error <= terms * U / (1 - terms * U) * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, out_features", [(37, 33), (300, 100), (257, 1409), (704, 256)])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(in_features, out_features, dtype):
    x, matrix, bias = random_case(in_features, out_features, dtype, 150)
    weight = kernels.pack(matrix, bias)
    everything = run_linear(x, weight)
    for rows in (*range(1, 41), 64, 65, 127):
        assert torch.equal(run_linear(x[:rows], weight), everything[:rows])
        assert torch.equal(run_linear(x[-rows:], weight), everything[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 33, 200])
def test_bits_do_not_depend_on_the_number_of_threads(rows, dtype):
    x, matrix, bias = random_case(300, 1409, dtype, rows)
    weight = kernels.pack(matrix, bias)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(run_linear(x, weight))
    assert all(torch.equal(result, results[0]) for result in results)


def test_small_integers_are_exact():
    x, matrix = torch.arange(-6.0, 6.0).repeat(5, 3), torch.arange(-18.0, 18.0).repeat(50, 1).roll(3, 0)
    assert torch.equal(run_linear(x, kernels.pack(matrix)), x @ matrix.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, out_features", SHAPES)
def test_unpack_gives_back_what_was_packed(in_features, out_features, dtype):
    _, matrix, _ = random_case(in_features, out_features, dtype, 1)
    packed = libstars.pack(matrix)
    assert packed.data_ptr() % 64 == 0
    assert torch.equal(libstars.unpack(packed, out_features, in_features, dtype), matrix)


def test_pack_stores_as_bfloat16_what_bfloat16_holds():
    x, matrix, _ = random_case(64, 96, torch.float32, 5, bias=False)
    narrow = matrix.to(torch.bfloat16)
    assert kernels.pack(matrix).dtype == torch.float32
    assert kernels.pack(narrow.float()).dtype == torch.bfloat16
    assert kernels.pack(matrix.half()).dtype == torch.float32
    # The same bits from either storage.
    wide = kernels.Weight(libstars.pack(narrow.float()), None, 96, 64, True, torch.float32)
    assert torch.equal(run_linear(x, wide), run_linear(x, kernels.pack(narrow)))
    assert torch.equal(kernels.pack(matrix).dense(), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_embedding_takes_rows_of_the_packed_matrix(rows, dtype):
    _, matrix, _ = random_case(61, 101, dtype, 1)
    token_ids = torch.randint(0, 101, (rows,), dtype=torch.int32, generator=torch.Generator().manual_seed(rows))
    out = torch.empty(rows, 61)
    kernels.embedding(token_ids, kernels.pack(matrix), out)
    assert torch.equal(out, matrix[token_ids.long()].float())


def test_embedding_of_a_token_outside_the_vocabulary_is_nan():
    _, matrix, _ = random_case(61, 101, torch.float32, 1)
    out = torch.empty(3, 61)
    kernels.embedding(torch.tensor([101, -1, 5], dtype=torch.int32), kernels.pack(matrix), out)
    assert out[:2].isnan().all() and torch.equal(out[2], matrix[5])


@pytest.mark.parametrize("hidden", [1, 15, 64, 257, 1031])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows, hidden):
    x, _, weight = random_case(hidden, hidden, torch.float32, rows)
    residual = x.flip(0) * 3
    for given in (None, residual):
        y = (x if given is None else given + x).double()
        expected = weight.double() * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        out, after = torch.empty_like(x), None if given is None else given.clone()
        kernels.rms_norm(x, weight, 1e-6, out, after)
        assert after is None or torch.equal(after, given + x)
        # The mean of squares errs by at most hidden + 2 roundings, its root by half of that, then four operations.
        assert ((out.double() - expected).abs() <= (hidden / 2 + 6) * U * expected.abs()).all()
    in_place = x.clone()
    kernels.rms_norm(in_place, weight, 1e-6, in_place)
    kernels.rms_norm(x, weight, 1e-6, out)
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("intermediate", [1, 16, 33, 704])
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows, intermediate):
    gate_up, _, _ = random_case(2 * intermediate, 1, torch.float32, rows)
    gate_up[:, :intermediate] *= 20
    out = torch.empty(rows, intermediate)
    kernels.swiglu(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    # The exponential errs by at most 2 ulp (4 u); the sum, the quotient and the product round once each.
    assert ((out.double() - expected).abs() <= 8 * U * expected.abs()).all()


@pytest.mark.parametrize("intermediate", [1, 33, 704])
def test_gelu(intermediate):
    gate_up, _, _ = random_case(2 * intermediate, 1, torch.float32, 3)
    gate_up[:, :intermediate] *= 4
    out = torch.empty(3, intermediate)
    kernels.swiglu(gate_up, out, "gelu_tanh")
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    # Where the tanh is near -1 the sum 1 + tanh keeps the tanh's absolute error: 4 u, times half the factors.
    assert ((out.double() - expected).abs() <= 8 * U * (expected.abs() + (gate * up).abs())).all()


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_a_norm_in_a_wider_matrix(rows):
    """Bits of the norm of those rows alone, and nothing beside them is written."""
    wide = torch.randn(rows, 61)
    weight = torch.randn(19)
    alone = wide[:, 23:42].contiguous()
    kernels.rms_norm(alone, weight, 1e-5, alone)
    expected = torch.cat((wide[:, :23], alone, wide[:, 42:]), dim=1)
    kernels.rms_norm(wide[:, 23:42], weight, 1e-5, wide[:, 23:42])
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("width", [1, 16, 37, 5000])
def test_rescale(width):
    x = torch.randn(3, width) * 20
    wanted = x.double() * 1.5
    kernels.rescale(scaled := x.clone(), 1.5)
    assert torch.equal(scaled, wanted.float())  # one rounding
    kernels.rescale(capped := x.clone(), 1.5, 7.0)
    expected = 7.0 * (wanted / 7.0).tanh()
    assert ((capped.double() - expected).abs() <= 8 * U * expected.abs()).all()
    kernels.rescale(large := torch.tensor([[-1e30, 1e30, -torch.inf, torch.inf]]), 1.0, 30.0)
    assert large.tolist() == [[-30.0, 30.0, -30.0, 30.0]]


def test_swiglu_at_the_ends():
    gate = torch.tensor([-torch.inf, -200.0, -100.0, 0.0, 100.0, torch.inf, torch.nan])
    out, expected = torch.empty(1, 7), torch.empty(1, 7)
    gate_up = torch.cat((gate, torch.ones(7)))[None]
    kernels.swiglu(gate_up, out)
    with references_only():
        kernels.swiglu(gate_up, expected)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("rows", ROWS)
def test_take_rows(rows):
    x = torch.randn(200, 61)
    index = torch.randint(0, 200, (rows,), dtype=torch.int32)
    out = torch.empty(rows, 61)
    kernels.take_rows(x, index, out)
    assert torch.equal(out, x[index.long()])


def test_no_rows_at_all():
    weight, norm = kernels.pack(torch.randn(5, 3)), torch.ones(3)
    kernels.linear(torch.empty(0, 3), weight, torch.empty(0, 5))
    kernels.embedding(torch.empty(0, dtype=torch.int32), weight, torch.empty(0, 3))
    kernels.rms_norm(torch.empty(0, 3), norm, 1e-6, torch.empty(0, 3))
    kernels.swiglu(torch.empty(0, 6), torch.empty(0, 3))
    kernels.take_rows(torch.empty(4, 3), torch.empty(0, dtype=torch.int32), torch.empty(0, 3))


class Counter:
    """x -> 2 x by a product, and a copy of column 0 as a thing to watch."""

    def __init__(self):
        self.x = torch.ones(1, 4)
        self.y = torch.empty(1, 4)
        self.weight = kernels.pack(2 * torch.eye(4))
        self.done = torch.zeros(1, dtype=torch.int32)

    def step(self) -> None:
        kernels.linear(self.x, self.weight, self.y)
        kernels.take_rows(self.y, torch.zeros(1, dtype=torch.int32), self.x)

    def watch(self, value: float) -> None:
        """`done` becomes non-zero when x reaches `value`: its bits in a copy of x minus `value`."""
        matrix, bias = torch.zeros(1, 4), torch.tensor([-value])
        matrix[0, 0] = 1.0
        kernels.linear(self.x, kernels.pack(matrix, bias), self.done.view(torch.float32).view(1, 1))


def test_a_program_replays_what_was_recorded():
    counter = Counter()
    with libstars.record() as program:
        counter.step()
    assert torch.equal(counter.x, torch.full((1, 4), 2.0))  # recording runs the operations too
    assert program.run(5, counter.done) == 5
    assert torch.equal(counter.x, torch.full((1, 4), 64.0))
    assert program.run(0, counter.done) == 0
    counter.x.fill_(3.0)  # a program reads memory when it runs
    assert program.run(1, counter.done) == 1
    assert torch.equal(counter.x, torch.full((1, 4), 6.0))


def test_a_program_keeps_its_tensors_alive():
    counter = Counter()
    with libstars.record() as program:
        counter.step()  # the index tensor is dropped on return
    junk = [torch.full((1,), 7, dtype=torch.int32) for _ in range(100)]
    counter.weight = None
    program.run(3, counter.done)
    assert torch.equal(counter.x, torch.full((1, 4), 16.0)) and len(junk) == 100


def test_a_program_stops_once_all_are_done():
    counter = Counter()
    with libstars.record() as program:
        counter.step()
        counter.watch(-1.0)  # x + 1 is never zero: done from the first run on
    counter.x.fill_(1.0)
    assert program.run(10, counter.done) == 1
    counter.x.fill_(1.0)
    two = torch.tensor([1, 0], dtype=torch.int32)
    assert program.run(4, two) == 4  # one of two is not done


def test_a_program_runs_the_same_bits_as_eager_calls():
    x, matrix, bias = random_case(100, 200, torch.bfloat16, 7)
    down, _, _ = random_case(100, 100, torch.float32, 100)
    up_weight, down_weight, norm = kernels.pack(matrix, bias), kernels.pack(down[:, :100].contiguous()), torch.rand(100)

    def step(state: torch.Tensor, scratch: list[torch.Tensor]) -> None:
        normed, gate_up, gated = scratch
        kernels.rms_norm(state, norm, 1e-5, normed)
        kernels.linear(normed, up_weight, gate_up)
        kernels.swiglu(gate_up, gated)
        kernels.linear(gated, down_weight, normed)
        kernels.rms_norm(normed, norm, 1e-5, normed, state)

    def buffers() -> list[torch.Tensor]:
        return [torch.empty(7, 100), torch.empty(7, 200), torch.empty(7, 100)]

    eager, replayed = x.clone(), x.clone()
    for _ in range(6):
        step(eager, buffers())
    with libstars.record() as program:
        step(replayed, buffers())
    program.run(5, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(eager, replayed)


def test_recordings_do_not_nest_and_end_with_an_error():
    with libstars.record(), pytest.raises(RuntimeError, match="do not nest"), libstars.record():
        pass
    with pytest.raises(ValueError, match="linear: x is"), libstars.record():
        kernels.linear(torch.ones(1, 2), kernels.pack(torch.ones(2, 3)), torch.ones(1, 2))
    with libstars.record():
        pass


def wrong_calls():
    weight, x, out = kernels.pack(torch.ones(5, 3), torch.ones(5)), torch.ones(2, 3), torch.ones(2, 5)
    ids = torch.zeros(2, dtype=torch.int32)
    return {
        "linear: x is float64": lambda: kernels.linear(x.double(), weight, out),
        "linear: x is float32 \\[2, 4\\]": lambda: kernels.linear(torch.ones(2, 4), weight, out),
        "linear: out is float32 \\[3, 5\\]": lambda: kernels.linear(x, weight, torch.ones(3, 5)),
        "linear: x .* not contiguous": lambda: kernels.linear(torch.ones(3, 2).T, weight, out),
        "linear: weight is not packed": lambda: kernels.linear(x, kernels.Weight(torch.ones(5, 3), None, 5, 3), out),
        "embedding: token_ids is int64": lambda: kernels.embedding(ids.long(), weight, x),
        "embedding: out is": lambda: kernels.embedding(ids, weight, out),
        "rms_norm: weight is float32 \\[2\\]": lambda: kernels.rms_norm(x, torch.ones(2), 1e-6, x),
        "rms_norm: residual is": lambda: kernels.rms_norm(x, torch.ones(3), 1e-6, x, torch.ones(1, 3)),
        "rms_norm: eps must not be negative": lambda: kernels.rms_norm(x, torch.ones(3), -1.0, x),
        "swiglu: gate_up is": lambda: kernels.swiglu(torch.ones(2, 5), torch.ones(2, 3)),
        "take_rows: index is": lambda: kernels.take_rows(x, ids.long(), x),
        "pack: matrix is float64": lambda: libstars.pack(torch.ones(2, 2).double()),
        "unpack: packed is": lambda: libstars.unpack(torch.ones(3, dtype=torch.uint8), 2, 2, torch.float32),
    }


@pytest.mark.parametrize("message", wrong_calls() if libstars.available() else [])
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        wrong_calls()[message]()


def test_the_library_refuses_what_the_binding_would_not_send():
    library = loaded()
    assert library.stars_call(99, b"\0" * 512) == 1 and b"unknown" in library.stars_last_error()
    assert library.stars_call(0, None) == 1 and b"null" in library.stars_last_error()
    for name, operation in OPERATIONS.items():
        params = STRUCTURES[f"stars_{name}_params"].from_buffer_copy(b"\xff" * 512)  # negative sizes
        assert library.stars_call(operation, ctypes.byref(params)) == 1
        assert b": size must be" in library.stars_last_error()
        params.size = ctypes.sizeof(params)
        assert library.stars_call(operation, ctypes.byref(params)) == 1
        assert library.stars_last_error().startswith(f"{name}: ".encode())
        assert b": size must be" not in library.stars_last_error()
    assert library.stars_program_add(None, 0, b"\0" * 512) == 1
    assert library.stars_program_run(None, 1, None, 0) == -1
    assert library.stars_packed_bytes(-1, 4, 0) == 0 and library.stars_packed_bytes(4, 4, 7) == 0


def test_threads_can_be_set_and_restored():
    before, usable = libstars.num_threads(), libstars.usable_cpus()
    with threads(3):
        assert libstars.num_threads() == 3
        libstars.set_num_threads(0)
        assert libstars.num_threads() == min(int(os.environ.get("STARS_NUM_THREADS", usable)), usable)
    assert libstars.num_threads() == before


def test_workers_that_fall_asleep_miss_nothing():
    x, matrix, bias = random_case(256, 2048, torch.float32, 1)
    weight = kernels.pack(matrix, bias)
    with threads(3):
        expected = run_linear(x, weight)
        for turn in range(400):
            if turn % 4 == 0:
                time.sleep(1e-6 * (turn % 50) * 10)  # around the time for which they spin
            assert torch.equal(run_linear(x, weight), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_compute():
    x, matrix, bias = random_case(256, 2048, torch.float32, 8)
    weight = kernels.pack(matrix, bias)
    expected = run_linear(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run_linear(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(run_linear(x, weight), expected)


ISA_SCRIPT = """
import pickle, sys, torch
from stars import kernels
from stars.bindings import libstars
assert libstars.available()
x, matrix, bias, gate_up, norm = pickle.load(open(sys.argv[1], "rb"))
products, gated, normed = [], torch.empty(37, 35), torch.empty(37, 201)
for weight in (kernels.pack(matrix, bias), kernels.pack(matrix.bfloat16(), bias)):
    product = torch.empty(37, 333)
    kernels.linear(x, weight, product)
    products.append(product)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13):
        some = torch.empty(rows, 333)
        kernels.linear(x[:rows], weight, some)
        assert torch.equal(some, product[:rows]), rows
kernels.swiglu(gate_up, gated)
kernels.rms_norm(x, norm, 1e-6, normed)
pickle.dump((libstars.isa(), products, gated, normed), open(sys.argv[2], "wb"))
"""


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_instruction_sets_agree(isa, tmp_path):
    if isa == "avx2" and libstars.isa() == "base":
        pytest.skip("this machine has no AVX2")
    x, matrix, bias = random_case(201, 333, torch.float32, 37)
    gate_up, norm = torch.randn(37, 70), torch.rand(201)
    given, taken = tmp_path / "given", tmp_path / "taken"
    given.write_bytes(pickle.dumps((x, matrix, bias, gate_up, norm)))
    subprocess.run([sys.executable, "-c", ISA_SCRIPT, str(given), str(taken)], check=True, cwd=tmp_path,
                   env={**os.environ, "STARS_ISA": isa})
    used, products, gated, normed = pickle.loads(taken.read_bytes())
    assert used == isa
    magnitude = x.abs() @ matrix.abs().T + bias.abs()
    for stored, product in zip((matrix, matrix.bfloat16()), products, strict=True):
        error = (product - run_linear(x, kernels.pack(stored, bias))).abs()
        assert (error <= 2 * 203 * U * 1.01 * magnitude).all()  # 1.01: bfloat16 may be larger in magnitude
    expected_gated, expected_normed = torch.empty_like(gated), torch.empty_like(normed)
    kernels.swiglu(gate_up, expected_gated)
    kernels.rms_norm(x, norm, 1e-6, expected_normed)
    torch.testing.assert_close(gated, expected_gated, rtol=16 * U, atol=0)
    torch.testing.assert_close(normed, expected_normed, rtol=220 * U, atol=0)
