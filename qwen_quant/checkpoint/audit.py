"""The audit: every parameter of the source is accounted for, or there is no artifact.

Before: the source must hold exactly the parameters that transformers' model of it needs, and each must be a linear to
quantize or be kept by a rule.  After: the written files are read back; names, dtypes, shapes and bytes must equal the
plan, kept tensors must equal the source, and each quantized linear must unpack to the codes that were solved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qwen_quant.checkpoint.families import ModelSpec
from qwen_quant.checkpoint.reader import CheckpointReader, raw_bytes
from qwen_quant.checkpoint.writer import PlannedShard
from qwen_quant.errors import AuditError, InputError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias_mask")


@dataclass(frozen=True)
class Accounting:
    """Every source parameter, once.

    Attributes:
        quantized: names of the weights (with ".weight") that become codes.
        kept: name -> the rule that keeps it 16-bit.
        dropped: buffers that transformers recomputes; not parameters.
    """

    quantized: tuple[str, ...]
    kept: dict[str, str]
    dropped: tuple[str, ...]


def _check_shapes(reader: CheckpointReader, expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in reader:
            raise InputError(
                f"{reader.folder} lacks the tensor '{name}'", "config.json asks for it", "fetch the checkpoint again"
            )
        info = reader.info(name)
        if info.shape != shape:
            raise InputError(
                f"'{name}' has shape {info.shape}", f"config.json asks for {shape}", "fetch the checkpoint again"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"'{name}' is {info.dtype}", "weights must be BF16, F16 or F32", "give the unquantized checkpoint"
            )


def _carried(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor that the model does not ask for is kept all the same: a tied head, or a passenger."""
    if spec.tied_head and name == spec.family.head + ".weight":
        return True
    return spec.is_passenger(name)


def account(spec: ModelSpec, reader: CheckpointReader, expected: dict[str, tuple[int, ...]]) -> Accounting:
    """Sort every tensor of the source into quantized, kept or dropped.

    Args:
        expected: name -> shape from `models.skeleton.expected_tensors`.

    Errors: InputError for a missing, unexpected or misshapen tensor; AuditError for one that no rule covers.
    """
    _check_shapes(reader, expected)
    linears = {name + ".weight" for name in spec.linear_names()}
    kept: dict[str, str] = {}
    dropped = []
    for name in reader.names:
        if name.endswith(_IGNORED_SUFFIXES):
            dropped.append(name)
        elif name in linears:
            continue
        elif name not in expected and not _carried(spec, name):
            raise InputError(
                f"{reader.folder} holds the unexpected tensor '{name}'",
                "config.json has no place for it",
                "check that config.json belongs to these weights",
            )
        else:
            reason = spec.keep_reason(name)
            if reason is None:
                raise AuditError(f"no rule says what to do with '{name}'")
            kept[name] = reason
    absent = sorted(linears - set(reader.names))
    if absent:
        raise AuditError(f"'{absent[0]}' is to be quantized but is not a tensor of the source")
    return Accounting(tuple(n + ".weight" for n in spec.linear_names()), kept, tuple(dropped))


def content_sha256(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 of the raw bytes of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def check_written(shards: tuple[PlannedShard, ...], reader: CheckpointReader) -> None:
    """The files on disk hold exactly the planned tensors, dtypes, shapes and bytes (AuditError otherwise)."""
    planned = {t.name: t for shard in shards for t in shard.tensors}
    if set(planned) != set(reader.names):
        odd = sorted(set(planned) ^ set(reader.names))
        raise AuditError(f"the artifact and its plan differ in {len(odd)} tensors, first '{odd[0]}'")
    for name, tensor in planned.items():
        info = reader.info(name)
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise AuditError(
                f"'{name}' was written as {info.dtype} {info.shape}", f"planned {tensor.dtype} {tensor.shape}"
            )
    for shard in shards:
        size = (reader.folder / shard.file_name).stat().st_size
        if size != shard.nbytes:
            raise AuditError(f"{shard.file_name} has {size} bytes", f"predicted {shard.nbytes}")


def check_kept(accounting: Accounting, source: CheckpointReader, artifact: CheckpointReader) -> None:
    """Every kept tensor's bytes equal the source's (AuditError naming the first that does not)."""
    for name in accounting.kept:
        if content_sha256(part for _, part in source.parts(name)) != content_sha256(
            part for _, part in artifact.parts(name)
        ):
            raise AuditError(f"'{name}' should be kept as it was, but its bytes differ from the source's")
