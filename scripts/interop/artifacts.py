"""The artifacts that consumers are given: tiny ones of each family, made here with GPTQ, and what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers

from qwen_quant.checkpoint.families import read_model_spec
from qwen_quant.preparation import QuantizeJob
from qwen_quant.progress import no_progress
from qwen_quant.qwen1_tokenizer import SPLIT_PATTERN
from qwen_quant.recipe import CalibrationConfig, GPTQConfig, RunConfig
from qwen_quant.sequential import quantize_checkpoint
from tests.support.artifacts import change_config
from tests.support.checkpoints import SIZES, SPECIALS, edit_tensors, make_checkpoint, text_file
from tests.support.moe import SPARSE_FAMILIES, make_family_checkpoint
from tests.support.qwen1 import copy_checkpoint
from tests.support.qwen1_vocabulary import write_qwen1_tokenizer

GROUP_SIZE = 32
QWEN1_ROWS = 151936  # of embedding and head in the published first-generation checkpoints
# name -> (family, what GPTQ is told beside the group size). Widths are multiples of 128 where a kernel asks for it.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-qwen2": ("qwen2", {}),
    "tiny-qwen2-asym": ("qwen2", {"sym": False}),
    "tiny-qwen2-int8": ("qwen2", {"bits": 8}),
    "tiny-qwen3": ("qwen3", {}),
    "tiny-qwen1": ("qwen", {}),
    "tiny-qwen2_moe": ("qwen2_moe", {}),
    "tiny-qwen3_moe": ("qwen3_moe", {}),
    "tiny-qwen3_next": ("qwen3_next", {}),
    "tiny-qwen3_5": ("qwen3_5_text", {}),
    "tiny-qwen3_5_moe": ("qwen3_5_moe_text", {}),
    "tiny-qwen3_5-vision": ("qwen3_5", {}),
    "tiny-qwen4_exp": ("qwen4_exp_text", {}),
}
# Experts in every block, as llama.cpp, GPTQModel and the published checkpoints have them.
_EVERY_BLOCK = {"mlp_only_layers": [], "decoder_sparse_step": 1, "shared_expert_intermediate_size": 128}


def make_tiny(name: str, work: Path) -> Path:
    """The Int4 folder `name` of TINY under `work`, made once."""
    out = work / "artifacts" / name
    if out.exists():
        return out
    family, options = TINY[name]
    source = work / "sources" / family
    if not source.exists():
        _make_source(source, family)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = CalibrationConfig(str(text_file(work / "text.txt")), 12, 64)
    config = GPTQConfig(group_size=GROUP_SIZE, **options)
    quantize_checkpoint(QuantizeJob(source, out, config, rows, RunConfig(device="cpu"), name), no_progress)
    return out


def _make_source(folder: Path, family: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if family == "qwen":
        _with_real_vocabulary(copy_checkpoint(folder))
    elif family in ("qwen2", "qwen3"):
        make_checkpoint(folder, family, intermediate_size=256)
    else:
        sparse = family in SPARSE_FAMILIES
        make_family_checkpoint(folder, family, **(_EVERY_BLOCK if sparse else {"intermediate_size": 256}))
    if family != "qwen":
        _with_merges(folder)


def _with_merges(folder: Path) -> None:
    """A small vocabulary with merges and Qwen2's splitting rule: llama.cpp refuses a vocabulary without merges."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZES["vocab_size"] - len(SPECIALS), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text_file(folder / "text.txt").read_text(encoding="utf-8")], trainer)
    (folder / "text.txt").unlink()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))


def _with_real_vocabulary(folder: Path) -> None:
    """Rows for every token of the published vocabulary, so that the golden strings are those of the real tokenizer."""
    generator = torch.Generator().manual_seed(0)
    width = int(read_model_spec(folder).config["hidden_size"])
    rows = {
        key: torch.randn(QWEN1_ROWS, width, generator=generator).mul(0.3).bfloat16()
        for key in ("transformer__wte__weight", "lm_head__weight")
    }
    edit_tensors(folder, **rows)
    change_config(folder, vocab_size=QWEN1_ROWS)
    write_qwen1_tokenizer(folder)
