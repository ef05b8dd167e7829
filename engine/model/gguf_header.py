"""The header of a GGUF file: metadata and tensors, every count, length and offset checked against the file's size.

Strings and arrays stay in the file until they are asked for. The gguf package's reader makes arrays of every token and
merge instead, which takes seconds for a vocabulary, and believes whatever counts it finds.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stars.errors import ModelError
from stars.model.files import GGUF_MAGIC, printed, shown
from stars.model.source import BLOCKS

VERSIONS = (2, 3)
MAX_ITEMS = 1 << 16
"""Keys of the metadata, and tensors: the largest models have a few thousand."""
MAX_STRINGS = 1 << 22
"""Strings of all arrays together: vocabularies and their merges are under a million."""
MAX_STRING = 1 << 24  # bytes; chat templates are the longest
MAX_NAME = 256  # bytes of a key's or tensor's
MAX_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
"""What ggml calls its types of tensors."""


class Array(NamedTuple):
    """An array of the metadata."""

    kind: str  # a letter of struct, or "s" of strings
    length: int
    at: int  # of its first byte in the file
    strings: array[int]  # where each string begins, its length before it


class StoredTensor(NamedTuple):
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]  # rows first
    kind: str  # ggml's name
    at: int  # of its first byte in the file
    nbytes: int  # 0 where the type is not read


class Header:
    """What GGUF file `path` holds; `data` is the file, mapped: what is written there stays in this process."""

    def __init__(self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, StoredTensor]):
        self.path = path
        self.data = data
        self.metadata = metadata
        self.tensors = tensors

    def get(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """A value, `default` where there is none; ModelError where it is of another kind."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            named = kinds if isinstance(kinds, tuple) else (kinds,)
            found = "an array" if isinstance(value, Array) else shown(value)
            raise ModelError(f"{self.path} has {key} = {found} where {' or '.join(one.__name__ for one in named)} is "
                             "needed: use another file")
        return value

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number; also where an array gives the same one for every layer. ModelError for anything else."""
        value = self.metadata.get(key)
        if isinstance(value, Array):
            different = {int(one) for one in self.numbers(key)} if value.kind in "BbHhIiQq" else set()
            if len(different) != 1:
                raise ModelError(f"{self.path} has {key} of its own for each layer, which is not supported: use a "
                                 "model whose layers are alike")
            return different.pop()
        found: int | None = self.get(key, int, default)
        return found

    def numbers(self, key: str) -> np.ndarray[Any, Any]:
        """An array of numbers, empty where there is none; ModelError where it is something else."""
        value = self.get(key, Array)
        if value is None:
            return np.empty(0)
        if value.kind == "s":
            raise ModelError(f"{self.path} has {key} of strings where numbers are needed: use another file")
        return np.frombuffer(self.data, np.dtype("<" + value.kind), value.length, value.at)

    def strings(self, key: str) -> list[str]:
        """An array of strings, empty where there is none; ModelError where it is something else, or no UTF-8."""
        value = self.get(key, Array)
        if value is None:
            return []
        if value.kind != "s":
            raise ModelError(f"{self.path} has {key} of numbers where strings are needed: use another file")
        try:
            return [self.string(at).decode() for at in value.strings]
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path} has {key} that are no UTF-8 ({error}): use another file") from error

    def string(self, at: int) -> bytes:
        """The string that begins at a byte of the file, its length before it."""
        return self.data[at : at + _LENGTH.unpack_from(self.data, at - 8)[0]]

    def floats(self, name: str) -> np.ndarray[Any, Any] | None:
        """The numbers of a small float32 tensor; None where there is no tensor of this name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.kind != "F32" or len(tensor.shape) != 1:
            raise ModelError(f"{name} of {self.path} is {tensor.kind} {list(tensor.shape)} where a vector in F32 is "
                             "needed: use another file")
        return np.frombuffer(self.data, np.float32, tensor.shape[0], tensor.at)


_LENGTH = struct.Struct("<Q")


def read_header(path: Path) -> Header:
    """The header of a GGUF file, which stays mapped while anything of it is held. Read once while a file is unchanged.

    Raises ModelError where it is none, of another version or byte order, cut short, or of sizes that make no sense.
    """
    try:
        status = path.stat()
        key = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _read(path.resolve(), path, key)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): copy the file again") from error


@lru_cache(maxsize=4)
def _read(resolved: Path, path: Path, key: tuple[int, ...]) -> Header:
    if key[1] < 24:
        raise ModelError(f"{path} has {key[1]} bytes, which is no GGUF file: copy the file again")
    with resolved.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    cursor = _Cursor(path, data)
    if data[:4] != GGUF_MAGIC:
        raise ModelError(f"{path} does not begin as a GGUF file does: give a GGUF file, or a model's directory")
    version = int.from_bytes(data[4:8], "little")
    if version & 0xFFFF == 0 and version:
        raise ModelError(f"{path} is a GGUF file of big-endian numbers, which are not read: convert the model again "
                         "without --bigendian")
    if version not in VERSIONS:
        raise ModelError(f"{path} is GGUF version {version}, and versions {' and '.join(map(str, VERSIONS))} are read: "
                         "convert the model again")
    cursor.at = 8
    count, keys = cursor.scalar("Q"), cursor.scalar("Q")
    if count > MAX_ITEMS or keys > MAX_ITEMS:
        raise cursor.damaged(f"says that it has {max(count, keys)} {'tensors' if count > MAX_ITEMS else 'keys'}")
    metadata = _metadata(cursor, keys)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > MAX_ITEMS:
        raise cursor.damaged(f"has general.alignment = {shown(alignment)}")
    return Header(path, data, metadata, _tensors(cursor, count, alignment))


class _Cursor:
    """A place in a file, which only moves within it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.at = 0
        self.strings = 0  # in arrays, so far

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} {what}, which is damaged: copy the file again")

    def skip(self, count: int) -> int:
        """Moves on by `count` bytes; returns where it was."""
        if count > len(self.data) - self.at:
            raise ModelError(f"{self.path} is cut short, or damaged: its header goes on beyond its {len(self.data)} "
                             "bytes: copy the file again")
        self.at += count
        return self.at - count

    def scalar(self, kind: str) -> Any:
        return struct.unpack_from("<" + kind, self.data, self.skip(struct.calcsize("<" + kind)))[0]

    def text(self, most: int = MAX_STRING) -> str:
        length = self.scalar("Q")
        if length > most:
            raise self.damaged(f"has a string of {length} bytes in its header")
        begin = self.skip(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"has a string in its header that is no UTF-8 ({error})") from error

    def string_array(self, count: int) -> array[int]:
        """Where each of `count` strings begins, all of which are skipped."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise self.damaged(f"says that it has {self.strings} strings")
        places, data, at, end = array("q"), self.data, self.at, len(self.data)
        unpack: Callable[[Any, int], tuple[int]] = _LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8
            places.append(at)
            length = unpack(data, at - 8)[0]
            if length > MAX_STRING:
                raise self.damaged(f"has a string of {length} bytes in its header")
            at += length
        self.skip((at if len(places) == count else end + 1) - self.at)
        return places


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text(MAX_NAME)
        if key in metadata:
            raise cursor.damaged(f"has {printed(key)} twice")
        metadata[key] = _value(cursor, cursor.scalar("I"), key)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise cursor.damaged(f"has {printed(key)} of type {kind}")
    inner, count = cursor.scalar("I"), cursor.scalar("Q")
    begin = cursor.at
    if inner == _STRING:
        return Array("s", count, begin, cursor.string_array(count))
    if inner not in _SCALARS:
        raise cursor.damaged(f"has {printed(key)} as an array of type {inner}")
    cursor.skip(count * struct.calcsize("<" + _SCALARS[inner]))
    return Array(_SCALARS[inner], count, begin, array("q"))


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, StoredTensor]:
    described = []
    for _ in range(count):
        name = cursor.text(MAX_NAME)
        dimensions = cursor.scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise cursor.damaged(f"has {printed(name)} of {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        described.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, number, offset in described:
        if name in tensors:
            raise cursor.damaged(f"has {printed(name)} twice")
        tensors[name] = _tensor(cursor, name, shape, _NAMES.get(number, f"type {number}"), begin, offset, alignment)
    return tensors


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: str, begin: int, offset: int,
            alignment: int) -> StoredTensor:
    """A tensor, once all of it is known to lie in the file."""
    if kind not in BLOCKS:
        return StoredTensor(shape, kind, begin + offset, 0)
    columns, nbytes = BLOCKS[kind]
    size = 1
    for length in shape:
        size *= length
    if not size or shape[-1] % columns:
        raise cursor.damaged(f"has {printed(name)} in {kind} of shape {list(shape)}")
    size = size // columns * nbytes
    if offset % alignment or begin + offset + size > len(cursor.data):
        raise ModelError(f"{cursor.path} is cut short, or damaged: {printed(name)} lies at {begin + offset} to "
                         f"{begin + offset + size} of its {len(cursor.data)} bytes: copy the file again")
    return StoredTensor(shape, kind, begin + offset, size)
