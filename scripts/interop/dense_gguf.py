"""The same weights in a GGUF file of another type, to see what a type's arithmetic does in llama.cpp.

    python dense_gguf.py SOURCE_FOLDER OUT_FOLDER f32|q8_0

Every tensor is dequantized by gguf-py and written as F32, or (matrices of blocks only) as Q8_0.
The metadata are copied.
F32 weights make llama.cpp multiply in FP32: what is left is its own noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
from gguf.quants import dequantize, quantize


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def rewrite(source: Path, out: Path, kind: str) -> None:
    """Write `source` to `out` with its quantized tensors as `kind`, everything else as F32."""
    reader = gguf.GGUFReader(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    _copy_fields(reader, writer)
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype("float32")
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if kind == "q8_0" and tensor.tensor_type not in plain:
            packed = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(values, packed), raw_dtype=packed)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    rewrite(next(Path(sys.argv[1]).glob("*.gguf")), Path(sys.argv[2]) / "model.gguf", sys.argv[3])
