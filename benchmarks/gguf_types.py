"""One GGUF file's weights in other types, for comparisons at equal precision: metadata, names and order as they are."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def rewrite(source: Path, target: Path, kind: str) -> None:
    """Writes `target` with the matrices of `source` as `kind`: "BF16", "Q8_0", "Q4_0" or "Q4_1".

    From the values that `source` holds, dequantised. The embedding, which is the head as well, is BF16 or else Q8_0,
    as llama.cpp has it where the columns are no multiple of 256; norms stay as they are.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target.with_suffix(".part"), str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        own = "Q8_0" if kind != "BF16" and tensor.name == "token_embd.weight" else kind
        into = GGMLQuantizationType[own]
        data = tensor.data if tensor.tensor_type == into else quantize(dequantize(tensor.data, tensor.tensor_type),
                                                                       into)
        writer.add_tensor(tensor.name, data, raw_dtype=into)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)


@cache
def matrix_bytes(path: Path) -> int:
    """Bytes of the matrices of a file with tied embeddings: what a step of one row reads of it."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
