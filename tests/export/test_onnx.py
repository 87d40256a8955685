"""ONNX: refusals and packing without the library; with onnx the weights, with onnxruntime the logits of the graph."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_quant.errors import AuditError, InputError
from qwen_quant.export import onnx, onnx_data
from qwen_quant.export.decoder import kept_parts, notes_of, packed_zeros, read_decoder, unpacked_zeros, write_companions
from qwen_quant.export.export import ExportJob, export_artifact
from qwen_quant.export.formats import ExportOptions
from qwen_quant.export.source import ExportSource
from qwen_quant.export.verify import judge, verify
from qwen_quant.progress import no_progress
from qwen_quant.runtime.loading import load_model
from tests.export.making import edit, gptq_folder
from tests.support.checkpoints import make_checkpoint
from tests.support.moe import make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint

HAS_ONNX = importlib.util.find_spec("onnx") is not None
HAS_RUNTIME = HAS_ONNX and importlib.util.find_spec("onnxruntime") is not None
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx: pip install 'qwen-quant[onnx]'")


def artifact(folder: Path, family: str = "qwen2", *, tied: bool = True, **how: Any) -> Path:
    if family == "qwen":
        copy_checkpoint(folder / "model", "tiny7b")
    else:
        make_checkpoint(folder / "model", family, tied=tied)
    gptq_folder(folder / "model", folder / "q", **how)
    return folder / "q"


def test_what_the_graph_cannot_hold_is_refused(tmp_path: Path) -> None:
    assert onnx.ONNX.check(ExportSource(artifact(tmp_path))) == []
    cases = {"act-order (desc_act)": ("qwen2", {"act_order": True}), "3 bit codes": ("qwen2", {"bits": 3})}
    for k, (what, (family, how)) in enumerate({**cases, "family qwen4_exp_text": ("qwen4_exp_text", {})}.items()):
        make = make_family_checkpoint if "exp" in family else make_checkpoint
        make(tmp_path / f"m{k}", family)
        gptq_folder(tmp_path / f"m{k}", tmp_path / f"q{k}", **how)
        reasons = onnx.ONNX.check(ExportSource(tmp_path / f"q{k}"))
        assert [(reason.what, reason.max_error) for reason in reasons] == [(what, None)]


@pytest.mark.parametrize("groups", [1, 4, 7])
def test_zeros_are_packed_row_by_row(groups: int) -> None:
    zeros = torch.randint(0, 16, (5, groups), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    packed = packed_zeros(zeros, 4).numpy()
    assert packed.shape == (5, (groups + 1) // 2)
    for row in range(5):
        for group in range(groups):
            assert packed[row, group // 2] >> 4 * (group % 2) & 15 == zeros[row, group]
    assert torch.equal(unpacked_zeros(torch.from_numpy(packed), groups, 4), zeros)


def test_a_value_beyond_fp16_is_not_made_infinite(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    edit(folder, model__norm__weight=torch.full((128,), 1e6, dtype=torch.bfloat16))
    source = ExportSource(folder)
    with pytest.raises(InputError, match="cannot hold"):
        list(kept_parts(source, "model.norm.weight", torch.float16))
    (kept,) = kept_parts(source, "model.norm.weight", torch.bfloat16)
    assert torch.equal(kept, source.reader.read("model.norm.weight"))


def test_a_first_generation_model_is_described_as_qwen2(tmp_path: Path) -> None:
    source = ExportSource(artifact(tmp_path, "qwen"))
    assert onnx.ONNX.check(source) == [] and any("LogN" in note for note in notes_of(source))
    decoder, config = read_decoder(source), source.spec.config
    assert decoder.name(1, "qkv") == "transformer.h.1.attn.c_attn" and decoder.name(1, "q_norm") == ""
    assert (decoder.name(0, "gate"), decoder.name(0, "up")) == ("transformer.h.0.mlp.w2", "transformer.h.0.mlp.w1")
    exponents = torch.arange(0, decoder.head_dim, 2) / decoder.head_dim
    assert torch.allclose(decoder.inv_freq, float(config["rotary_emb_base"]) ** -exponents)
    out = tmp_path / "out"
    out.mkdir()
    write_companions(source, out, "f32")
    written = json.loads((out / "config.json").read_text())
    assert (written["model_type"], written["torch_dtype"]) == ("qwen2", "float32")
    assert written["intermediate_size"] == config["intermediate_size"] // 2


@pytest.mark.skipif(HAS_ONNX, reason="onnx is installed")
def test_a_missing_library_names_the_extra_before_anything_is_written(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    with pytest.raises(InputError, match="needs the package onnx") as error:
        export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    assert "qwen-quant[onnx]" in error.value.next_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "q"]


def logits(session: Any, ids: torch.Tensor, past: list[np.ndarray]) -> tuple[torch.Tensor, list[np.ndarray]]:
    """One step over new tokens [B, L]; returns their logits and the cache."""
    names = [entry.name for entry in session.get_inputs()][2:]
    total = ids.shape[1] + past[0].shape[2]
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((ids.shape[0], total), dtype=np.int64)}
    first, *cache = session.run(None, {**feed, **dict(zip(names, past, strict=True))})
    return torch.from_numpy(first), cache


@needs_onnx
@pytest.mark.parametrize(
    ("family", "tied", "how"),
    [
        ("qwen2", True, {}),
        ("qwen3", False, {"sym": False}),
        ("qwen3", True, {"bits": 8, "sym": False}),
        ("qwen", False, {}),
    ],
)
def test_the_graph_gives_the_logits_of_the_dequantized_model(
    tmp_path: Path, family: str, tied: bool, how: dict[str, Any]
) -> None:
    folder = artifact(tmp_path, family, tied=tied, **how)
    result = export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    assert result.proof.exact and result.proof.equal_linears == len(ExportSource(folder).linears)
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert None not in model.values()  # onnxruntime-genai refuses null, as where a config names no special token
    decoder = model["decoder"]
    assert decoder["filename"] == "model.onnx" and model["type"] == ("qwen2" if family == "qwen" else family)
    assert family == "qwen" or (decoder["head_size"], decoder["num_key_value_heads"]) == (32, 2)
    if not HAS_RUNTIME:
        return
    import onnxruntime

    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_model(folder)(ids).logits
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((2, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
    first, past = logits(session, ids[:, :9], [empty] * 2 * decoder["num_hidden_layers"])
    steps = [first]
    for k in range(9, 12):
        step, past = logits(session, ids[:, k : k + 1], past)
        steps.append(step)
    difference = (torch.cat(steps, 1) - expected).abs().max()
    assert difference <= 2e-5 * expected.abs().max(), f"largest difference of logits {difference:.2g}"


@needs_onnx
def test_a_killed_export_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path, sym=False)
    monkeypatch.setattr(onnx_data, "COMMIT_BYTES", 1)
    export_artifact(ExportJob(folder, tmp_path / "whole", "onnx"), no_progress)
    real, read = onnx_data._tensors, []

    def dies(source: ExportSource, name: str) -> dict[str, torch.Tensor]:
        read.append(name)
        if len(read) == 6:
            raise KeyboardInterrupt
        return real(source, name)

    monkeypatch.setattr(onnx_data, "_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    assert len(read) == 15 and read[5] == read[6]  # 14 linears, the sixth twice
    for name in (onnx.MODEL_FILE, onnx_data.DATA_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@needs_onnx
def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    export_artifact(ExportJob(folder, tmp_path / "out", "onnx"), no_progress)
    source, path = ExportSource(folder), tmp_path / "out" / onnx_data.DATA_FILE
    data = bytearray(path.read_bytes())
    place = bytes(data).find(source.packed("model.layers.1.mlp.up_proj").stream.numpy().tobytes())
    data[place + 7] ^= 0x10
    path.write_bytes(data)
    plan = onnx.ONNX.plan(source, ExportOptions())
    proof = verify(source, onnx._read_back(tmp_path / "out", source), plan, no_progress)
    assert proof.equal_linears == 13 and proof.worst_linear == "model.layers.1.mlp.up_proj"
    with pytest.raises(AuditError):
        judge(proof, [], None)
