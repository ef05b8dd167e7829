"""GGUF files that are damaged, hostile or not supported end in one sentence, before memory is taken for them."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests: pip install gguf==0.19.0")

import stars  # noqa: E402
from gguf_files import write_gguf  # noqa: E402
from stars.errors import ModelError, StarsError  # noqa: E402
from stars.model.config import load_config  # noqa: E402
from stars.model.gguf_header import read_header  # noqa: E402
from stars.model.loader import inspect_model, load_model, open_checkpoint  # noqa: E402
from stars.model.tokenizer import load_tokenizer  # noqa: E402
from tiny_models import TinyModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY = TinyModel("llama", hidden=32, heads=2, kv_heads=1, intermediate=32, layers=1, tokenizer=True, chat_template=True)
FILES = "cut short, or damaged"


@pytest.fixture(scope="module")
def path(tiny_model, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("good") / "model.gguf", tiny_model(TINY), "Q4_0")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def head(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


KEY = head(keys=1) + string(b"k")
NO_TENSORS = head(tensors=1) + string(b"t")
HOSTILE = {
    "empty": (b"", "has 0 bytes, which is no GGUF file"),
    "short": (b"GGUF\x03\0\0\0", "has 8 bytes, which is no GGUF file"),
    "magic": (b"GGML" + bytes(40), "does not begin as a GGUF file does: give a GGUF file, or a model's directory"),
    "version 1": (head(version=1) + bytes(40), "is GGUF version 1, and versions 2 and 3 are read: convert the model"),
    "version 4": (head(version=4) + bytes(40), "is GGUF version 4, and versions 2 and 3 are read: convert the model"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a GGUF file of big-endian numbers, which are not read"),
    "keys": (head(keys=2**63), f"says that it has {2**63} keys, which is damaged: copy the file again"),
    "tensors": (head(tensors=2**40), f"says that it has {2**40} tensors, which is damaged"),
    "missing keys": (head(keys=9), FILES),
    "name": (head(keys=1) + struct.pack("<Q", 2**62), f"has a string of {2**62} bytes in its header"),
    "no UTF-8": (head(keys=1) + string(b"\xff\xfe") + bytes(40), "has a string in its header that is no UTF-8"),
    "type": (KEY + struct.pack("<I", 77) + bytes(40), "has k of type 77"),
    "text": (KEY + struct.pack("<IQ", 8, 2**33), f"has a string of {2**33} bytes"),
    "array": (KEY + struct.pack("<IIQ", 9, 10, 2**60), FILES),
    "strings": (KEY + struct.pack("<IIQ", 9, 8, 2**60) + bytes(40), f"says that it has {2**60} strings"),
    "fewer strings": (KEY + struct.pack("<IIQ", 9, 8, 2**21) + bytes(4096), FILES),
    "nested": (KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "has k as an array of type 9"),
    "twice": (head(keys=2) + 2 * (string(b"k") + struct.pack("<IB", 0, 1)), "has k twice"),
    "alignment": (head(keys=1) + string(b"general.alignment") + struct.pack("<II", 4, 0), "has general.alignment = 0"),
    "odd alignment": (head(keys=1) + string(b"general.alignment") + struct.pack("<II", 4, 48), "alignment = 48"),
    "dimensions": (NO_TENSORS + struct.pack("<I", 2**31), f"has t of {2**31} dimensions"),
    "elements": (NO_TENSORS + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 0), FILES),
    "no elements": (NO_TENSORS + struct.pack("<IQIQ", 1, 0, 0, 0), "has t in F32 of shape"),
    "part of a block": (NO_TENSORS + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(4096), "has t in Q4_0 of shape .33."),
    "offset": (NO_TENSORS + struct.pack("<IQIQ", 1, 32, 0, 2**63), FILES),
    "odd offset": (NO_TENSORS + struct.pack("<IQIQ", 1, 32, 0, 4) + bytes(4096), FILES),
    "architecture": (head(keys=1) + string(b"general.architecture") + struct.pack("<I", 8) + string(b"rwkv7"),
                     "is of architecture 'rwkv7', which is not supported: use one of llama, qwen2, qwen3"),
    "no architecture": (head() + bytes(40), "is of architecture None, which is not supported"),
}


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_one_sentence(tmp_path, content, said):
    """At once and without memory, whatever the counts in them are."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        for read in (load_config, open_checkpoint, stars.Engine):
            with pytest.raises(ModelError, match=said) as caught:
                read(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 15


def everything(path: Path) -> None:
    """What an engine reads of a file."""
    inspect_model(path)
    load_tokenizer(path)
    load_model(path, max_rows=1)


def outcomes(content: bytes, directory: Path, changes: list[Callable[[bytearray], None]]) -> list[str]:
    """What each change of a file ends in: "" where it still is a model, else the error; only StarsErrors are any."""
    said = []
    for number, change in enumerate(changes):
        changed = bytearray(content)
        change(changed)
        path = directory / f"{number}.gguf"
        path.write_bytes(changed)
        try:
            everything(path)
            said.append("")
        except StarsError as error:
            said.append(str(error))
        path.unlink()
    return said


def test_truncated_files(path, tmp_path):
    content = path.read_bytes()
    generator = random.Random(0)
    places = [*range(0, 400, 7), *(generator.randrange(len(content)) for _ in range(60)), len(content) - 40]
    changes = [lambda changed, place=place: changed.__delitem__(slice(place, None)) for place in places]
    assert all("\n" not in error and error for error in outcomes(content, tmp_path, changes))


def test_flipped_bytes(path, tmp_path):
    """Of the header, where every byte means something."""
    content = path.read_bytes()
    end = min(tensor.at for tensor in read_header(path).tensors.values())
    generator = random.Random(1)

    def flip(changed: bytearray) -> None:
        for _ in range(generator.choice((1, 1, 3))):
            changed[generator.randrange(end)] = generator.choice((0, 1, 8, 127, 128, 255, generator.randrange(256)))

    begin = time.perf_counter()
    said = outcomes(content, tmp_path, [flip] * 600)
    assert time.perf_counter() - begin < 60
    assert all("\n" not in error for error in said)
    assert 50 < sum(error == "" for error in said) < 550


@pytest.mark.parametrize(("change", "said"), [
    ({"llama__block_count": 2}, "has llama.block_count = 2 and tensors of 1 layers: copy the file again"),
    ({"llama__block_count": 0}, "has llama.block_count = 0 where a positive integer is needed: use another file"),
    ({"llama__embedding_length": "wide"}, "has llama.embedding_length = 'wide' where int is needed: use another file"),
    ({"llama__embedding_length": None}, "has llama.embedding_length = None where a positive integer is needed"),
    ({"llama__embedding_length": 64, "llama__rope__dimension_count": 32},
     r"has shape \[\d+, 32\] where its metadata asks for \[\d+, 64\]"),
    ({"llama__attention__head_count": 7, "llama__rope__dimension_count": 4}, r"shape .32, 32. where its metadata asks"),
    ({"llama__attention__head_count": 3, "llama__attention__head_count_kv": 2, "llama__rope__dimension_count": 10},
     "has 3 attention heads, not a multiple of its 2 key-value heads: use another file"),
    ({"llama__attention__head_count": [1, 2]}, "has llama.attention.head_count of its own for each layer"),
    ({"llama__expert_count": 8}, "is a mixture of experts, which is not supported: use a dense model"),
    ({"split__count": 3}, "is one part of a model in several files: join them with llama-gguf-split --merge"),
    ({"llama__rope__scaling__type": "wobbly"}, "uses rope type 'wobbly', which is not supported"),
    ({"llama__attention__value_length": 8}, "has values of another length than its keys, which is not supported"),
])
def test_metadata_that_does_not_fit_is_said(tiny_model, tmp_path, change, said):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(TINY), **change)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(path)
    assert "config.json" not in str(caught.value) and "\n" not in str(caught.value)


def test_types_that_are_not_read_are_named(path, tmp_path):
    """By ggml's names, and `stars inspect` says it too; the file's other tensors are looked at all the same."""
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_down.weight"
    place = content.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", content, place) == (2,)
    content[place] = 22
    changed = tmp_path / "model.gguf"
    changed.write_bytes(content)
    with pytest.raises(ModelError, match="mlp.down_proj.weight of .* is stored as IQ2_S, which is not supported"):
        load_model(changed)
    assert inspect_model(changed).types["IQ2_S"] == 1


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(ModelError, match="no.gguf is not there: give the path of a GGUF file"):
        stars.Engine(tmp_path / "no.gguf")
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK" + bytes(40))
    with pytest.raises(ModelError, match="model.bin is a file: give the directory"):
        stars.Engine(other)
