"""dtype="auto" on the CPU: which arithmetic it is by what is measured, and that the measurement is one."""

from __future__ import annotations

import logging
import math

import pytest

import stars
from stars.bindings import libstars
from stars.model import auto_dtype
from stars.model.loader import load_model
from tiny_models import TinyModel, write_model

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars is not built")


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the clock on a CPU that multiplies bfloat16 pairs: `measured(at_1, at_8)` says how many times as
    fast they are; the shapes that were tried are returned."""
    tried: list[tuple] = []

    def measures(at_1: float, at_8: float) -> list[tuple]:
        def seconds(shapes):
            tried.append(tuple(shapes))
            return {("float32", 1): at_1, ("float32", 8): at_8, ("bfloat16", 1): 1.0, ("bfloat16", 8): 1.0}

        monkeypatch.setattr(libstars, "available", lambda: True)
        monkeypatch.setattr(libstars, "isa", lambda: "avx512_bf16")
        monkeypatch.setattr(auto_dtype, "seconds", seconds)
        auto_dtype._measured.cache_clear()
        return tried

    yield measures
    auto_dtype._measured.cache_clear()


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model of llama's family with bfloat16 weights, and one with float32 weights."""
    return {dtype: write_model(tmp_path_factory.mktemp(dtype), TinyModel(dtype=dtype))
            for dtype in ("bfloat16", "float32")}


@pytest.mark.parametrize("at_1, at_8, dtype", [
    (1.0, 1.6, "bfloat16"), (1.3, 1.0, "bfloat16"), (0.95, 1.05, "bfloat16"),
    (1.0, 1.0, "float32"), (1.04, 1.04, "float32"), (0.9, 1.6, "float32"), (1.6, 0.94, "float32"),
    (0.7, 0.7, "float32"),
])
def test_what_is_ahead_is_taken_where_nothing_is_lost(measured, directories, at_1, at_8, dtype, caplog):
    measured(at_1, at_8)
    with caplog.at_level(logging.INFO, "stars"):
        decoder = load_model(directories["bfloat16"])
    assert decoder.arithmetic == dtype
    assert {weight.arithmetic for layer in decoder.layers for weight in (
        layer.qkv, layer.o, layer.gate_up, layer.down)} == {dtype}
    said = [record.getMessage() for record in caplog.records if record.name == "stars.model.auto_dtype"]
    assert said == [f'dtype "auto" of a llama model: {dtype}, as products of bfloat16 pairs were measured '
                    f'{at_1:.2f} at 1 row and {at_8:.2f} at 8 rows times as fast as those in float32']


def test_its_own_largest_products_are_tried_once_a_process(measured, directories):
    tried = measured(1.0, 2.0)
    config = load_model(directories["bfloat16"]).config
    load_model(directories["bfloat16"])
    assert tried == [((2 * config.intermediate_size, config.hidden_size),
                      (config.hidden_size, config.intermediate_size))]


def test_who_keeps_float32_is_not_measured(measured, directories):
    tried = measured(2.0, 2.0)
    assert load_model(directories["float32"]).arithmetic == "float32"  # it would lose bits of its weights
    assert load_model(directories["bfloat16"], deterministic=True).arithmetic == "float32"
    assert load_model(directories["bfloat16"], dtype="float32").arithmetic == "float32"
    assert load_model(directories["bfloat16"], quantization="int8").arithmetic == "float32"
    assert tried == []


def test_each_model_of_an_engine_has_its_own(measured, directories, tmp_path):
    measured(2.0, 2.0)
    reward = write_model(tmp_path / "reward", TinyModel(head="reward"))
    engine = stars.Engine(directories["bfloat16"], reward)
    assert "; cpu, bfloat16; " in repr(engine)
    assert engine.reward.decoder.arithmetic == "float32"
    assert "; cpu, float32; " in repr(stars.Engine(directories["bfloat16"], deterministic=True))


def test_other_processors_stay_as_they_were(monkeypatch, directories):
    monkeypatch.setattr(libstars, "isa", lambda: "avx512")
    monkeypatch.setattr(auto_dtype, "seconds", lambda _: pytest.fail("measured where there is no choice"))
    assert load_model(directories["bfloat16"]).arithmetic == "float32"
    assert auto_dtype.measured_dtype(((64, 32),)) == (
        "float32", "as no instruction here multiplies pairs of bfloat16 values")


def test_the_measurement_times_products_of_both_kinds(monkeypatch):
    ran: list[tuple] = []
    linear = auto_dtype.kernels.linear

    def noted(x, weight, out):
        ran.append((weight.arithmetic, x.shape[0], weight.out_features, weight.in_features))
        linear(x, weight, out)

    monkeypatch.setattr(auto_dtype.kernels, "linear", noted)
    monkeypatch.setattr(auto_dtype, "LARGEST", 40 * 33)
    times = auto_dtype.seconds([(100, 33), (7, 50)])
    assert set(ran) == {(arithmetic, rows, *shape) for arithmetic in ("float32", "bfloat16") for rows in (1, 8)
                        for shape in ((40, 33), (7, 50))}
    assert len(ran) == 8 * auto_dtype.TURNS
    assert set(times) == {(arithmetic, rows) for arithmetic in ("float32", "bfloat16") for rows in (1, 8)}
    assert all(0.0 < taken < math.inf for taken in times.values())
