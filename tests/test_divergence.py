"""evaluation/: hand-computed figures, the streamed models against whole ones, pairs that do not fit together."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from qwen_quant.activations import ActivationStore
from qwen_quant.checkpoint.identity import weights_sha256
from qwen_quant.errors import InputError
from qwen_quant.evaluation import pair, streaming, validate
from qwen_quant.evaluation.divergence import summarize, token_divergence
from qwen_quant.evaluation.perplexity import perplexity_pair, token_losses, windows_of
from qwen_quant.evaluation.validate import validate_pair
from qwen_quant.progress import no_progress
from qwen_quant.recipe import ValidationConfig
from qwen_quant.results import ValidationResult
from qwen_quant.runtime.loading import load_model
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import edit_tensors, make_checkpoint, text_file

WINDOW = 48


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().float()


def test_divergence_by_hand() -> None:
    p, q = logs([0.5, 0.25, 0.25], [0.5, 0.5, 0.0]), logs([0.25, 0.5, 0.25], [0.25, 0.75, 0.0])
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)]
    assert token_divergence(p, q.clone()).tolist() == pytest.approx(expected, abs=1e-7)
    assert token_divergence(p, p.clone()).tolist() == [0.0, 0.0]


def test_a_token_that_only_the_quantized_model_excludes_is_infinitely_far() -> None:
    assert token_divergence(logs([0.5, 0.5]), logs([1.0, 0.0])).tolist() == [math.inf]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from((0.1, 1.0, 8.0)))
def test_divergence_agrees_with_scipy_and_is_not_negative(seed: int, spread: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    p, q = (spread * torch.randn(5, 300, generator=rng) for _ in range(2))
    found = token_divergence(torch.log_softmax(p, 1), torch.log_softmax(q, 1)).numpy()
    expected = rel_entr(softmax(p.double().numpy(), axis=1), softmax(q.double().numpy(), axis=1)).sum(1)
    assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)
    assert (found > -1e-6).all()


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0, 20), min_size=1, max_size=60))
def test_quantiles_agree_with_numpy(values: list[float]) -> None:
    found = summarize(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.bool))
    expected = np.quantile(values, [0.5, 0.9, 0.99])
    assert [found.kl_median, found.kl_p90, found.kl_p99] == pytest.approx(expected.tolist())
    assert (found.kl_max, found.tokens, found.top1_agreement) == (max(values), len(values), 1.0)
    assert found.kl_mean == pytest.approx(sum(values) / len(values))


def test_perplexity_by_hand() -> None:
    losses = token_losses(logs([0.5, 0.5], [0.125, 0.875]), torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(8)])
    pair = perplexity_pair(losses, losses + math.log(2))
    assert (pair.baseline, pair.quantized, pair.ratio, pair.tokens) == pytest.approx((4, 8, 2, 2))


def test_windows_are_disjoint_and_the_rest_is_dropped() -> None:
    assert windows_of(list(range(11)), 4, None).ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(list(range(11)), 4, 1).ids.tolist() == [[0, 1, 2, 3]]
    assert windows_of(list(range(11)), 4, 9).ids.shape == (2, 4)
    with pytest.raises(InputError, match="11 tokens, less than one window of 12"):
        windows_of(list(range(11)), 12, None)


def test_sliding_windows_score_every_token_once() -> None:
    windows = windows_of(list(range(11)), 4, None, 2)
    assert windows.ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    scored = [windows.scored_ids(k) for k in range(4)]
    assert sum(scored, []) == list(range(1, 10))
    disjoint = windows_of(list(range(11)), 4, None)
    assert [disjoint.scored_ids(k) for k in range(2)] == [[1, 2, 3], [5, 6, 7]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture(scope="module")
def artifact(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "int4"
    make_artifact(qwen2_folder, folder, sym=False)
    return folder


def compare(baseline: Path, quantized: Path, text: Path, **changes: int) -> ValidationResult:
    return validate_pair(baseline, quantized, settings_for(text, **changes), no_progress)


def settings_for(text: Path | str, **changes: int) -> ValidationConfig:
    return ValidationConfig((str(text),), **{"window_tokens": WINDOW, **changes}, device="cpu", smoke=False)


def whole_model(baseline: Path, quantized: Path, text: Path) -> dict[str, float]:
    """The slow reference: both models whole, all logits at once, everything in FP64."""
    ids = torch.tensor(validate.load_tokenizer(baseline).encode(text.read_text()))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        p, q = (load_model(f, dtype=torch.float64)(windows).logits.log_softmax(-1) for f in (baseline, quantized))
    kl = (p.exp() * (p - q)).sum(-1)
    nll = [-x[:, :-1].gather(2, windows[:, 1:, None]).mean() for x in (p, q)]
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "baseline": float(nll[0].exp()),
        "quantized": float(nll[1].exp()),
        "tokens": kl.numel(),
    }


def check_against_whole(result: ValidationResult, expected: dict[str, float]) -> None:
    row = result.texts[0]
    found = {
        "kl_mean": row.divergence.kl_mean,
        "kl_max": row.divergence.kl_max,
        "top1": row.divergence.top1_agreement,
        "baseline": row.perplexity.baseline,
        "quantized": row.perplexity.quantized,
        "tokens": row.divergence.tokens,
    }
    assert found == pytest.approx(expected, rel=2e-4)
    assert row.tokens == row.perplexity.tokens == row.windows * (WINDOW - 1)
    for interval, estimate in ((row.kl_mean, found["kl_mean"]), (row.top1_agreement, found["top1"])):
        assert interval.low <= interval.estimate <= interval.high
        assert interval.estimate == pytest.approx(estimate)
    assert row.perplexity_ratio.estimate == pytest.approx(found["quantized"] / found["baseline"])
    assert sum(mean for _, mean in row.kl_by_position) / len(row.kl_by_position) == pytest.approx(found["kl_mean"])
    assert expected["kl_mean"] > 1e-3, "the two models are too alike to show anything"


def test_streams_agree_with_whole_models(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    result = compare(qwen2_folder, artifact, text)
    check_against_whole(result, whole_model(qwen2_folder, artifact, text))
    assert result.baseline_bytes > result.quantized_bytes > 0
    assert result.peak_memory_bytes > 0 and result.seconds > 0
    row = result.texts[0]
    assert (row.dataset, row.dataset_sha256) == (str(text), hashlib.sha256(text.read_bytes()).hexdigest())
    hashes = (weights_sha256(qwen2_folder), weights_sha256(artifact))
    assert (result.baseline_sha256, result.quantized_sha256) == hashes and len(set(hashes)) == 2
    # The tokenizer of the test checkpoints has one token a byte.
    assert row.bits_per_byte_baseline == pytest.approx(math.log2(row.perplexity.baseline))
    assert (result.baseline_kind, result.quantized_kind) == ("16-bit", "gptq 4 bit")


def test_an_untied_sharded_qwen3_and_the_reverse_pair(qwen3_folder: Path, tmp_path: Path, text: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "qwen3", tied=False, seed=1)
    check_against_whole(compare(qwen3_folder, other, text), whole_model(qwen3_folder, other, text))


def test_the_baseline_may_be_the_quantized_one(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    check_against_whole(compare(artifact, qwen2_folder, text), whole_model(artifact, qwen2_folder, text))


def test_a_model_is_at_distance_zero_of_itself(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    for folder in (qwen2_folder, artifact):
        row = compare(folder, folder, text, max_windows=2).texts[0]
        assert (row.divergence.kl_max, row.divergence.kl_mean) == (0.0, 0.0)
        assert (row.divergence.top1_agreement, row.perplexity.ratio, row.windows) == (1.0, 1.0, 2)


def test_unusual_pairs_are_warned_about(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    usual = compare(qwen2_folder, artifact, text, max_windows=1)
    assert usual.warnings == ("the smoke prompts were not run",)
    odd = compare(artifact, qwen2_folder, text, max_windows=1)
    assert "is itself quantized (gptq 4 bit)" in odd.warnings[0] and "is not quantized" in odd.warnings[1]


def test_sliding_windows_agree_with_whole_models(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    """Every token once, in the first window that holds it; computed here token by token."""
    row = compare(qwen2_folder, artifact, text, stride_tokens=16, max_windows=3).texts[0]
    ids = torch.tensor(validate.load_tokenizer(qwen2_folder).encode(text.read_text()))[: WINDOW + 32]
    with torch.no_grad():
        logits = [
            load_model(f, dtype=torch.float64)(ids.unfold(0, WINDOW, 16)).logits for f in (qwen2_folder, artifact)
        ]
    losses: list[list[float]] = [[], []]
    for token in range(1, len(ids)):
        window = max(0, -(-(token + 1 - WINDOW) // 16))
        for values, model in zip(losses, logits, strict=True):
            log_probs = model[window, token - 1 - 16 * window].log_softmax(-1)
            values.append(-float(log_probs[ids[token]]))
    expected = [math.exp(sum(values) / len(values)) for values in losses]
    assert [row.perplexity.baseline, row.perplexity.quantized] == pytest.approx(expected, rel=1e-4)
    assert (row.tokens, row.windows, row.stride_tokens) == (WINDOW + 31, 3, 16)


def test_long_context_table(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    result = compare(qwen2_folder, artifact, text, lengths=(16, 32, 96, 100_000))
    assert [(row.window_tokens, row.windows) for row in result.by_length] == [(16, 24), (32, 12), (96, 4)]
    assert any("no row for 100000" in warning for warning in result.warnings)
    alone = compare(qwen2_folder, artifact, text, window_tokens=32, max_windows=12).texts[0]
    assert result.by_length[1].quantized == pytest.approx(alone.perplexity.quantized, rel=1e-5)


def test_a_length_beyond_the_model_is_measured_and_said(qwen2_folder: Path, tmp_path: Path, text: Path) -> None:
    shutil.copytree(qwen2_folder, tmp_path / "short")
    change_config(tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(InputError, match="a window of 48 tokens is longer .*: its config.json says 32"):
        compare(tmp_path / "short", tmp_path / "short", text)
    result = compare(tmp_path / "short", tmp_path / "short", text, window_tokens=32, lengths=(64,), max_windows=2)
    assert result.by_length[0].windows == 2
    assert any("64 tokens are beyond the 32" in warning for warning in result.warnings)


def test_a_killed_run_continues(
    qwen2_folder: Path, artifact: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "ROUND_TOKENS", 2 * WINDOW)
    expected, work = compare(qwen2_folder, artifact, text), tmp_path / "work"

    def killed(label: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate_pair(qwen2_folder, artifact, settings_for(text), killed, work=work)
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(kept) == 2
    with pytest.raises(InputError, match="window_tokens was 48, is now 24"):
        validate_pair(qwen2_folder, artifact, settings_for(text, window_tokens=24), no_progress, work=work)
    again = validate_pair(qwen2_folder, artifact, settings_for(text), no_progress, work=work)
    assert {name: (work / name).stat().st_mtime_ns for name in kept} == kept
    assert again.texts == expected.texts


def test_chunks_tiles_batches_and_rounds_change_nothing(
    qwen2_folder: Path, artifact: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compare(qwen2_folder, artifact, text)
    monkeypatch.setattr(pair, "CHUNK_POSITIONS", 7)
    monkeypatch.setattr(pair, "ROUND_TOKENS", 3 * WINDOW)
    monkeypatch.setattr(streaming, "HEAD_TILE_BYTES", 4 * 128 * 50)
    monkeypatch.setattr(streaming, "batch_rows", lambda tokens, widest: 2)
    found = compare(qwen2_folder, artifact, text)
    for part in ("divergence", "perplexity"):
        left, right = (dataclasses.asdict(getattr(r.texts[0], part)) for r in (expected, found))
        assert left == pytest.approx(right, rel=1e-4, abs=1e-7)


def test_no_more_than_one_chunk_of_logits_exists(
    qwen2_folder: Path, artifact: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = streaming.Head.logits

    def counted(self: streaming.Head, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        return original(self, hidden)

    monkeypatch.setattr(pair, "CHUNK_POSITIONS", 16)
    monkeypatch.setattr(streaming.Head, "logits", counted)
    compare(qwen2_folder, artifact, text, max_windows=1)
    assert sizes == [16] * 6


def test_progress_ends_complete(qwen2_folder: Path, artifact: Path, text: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    validate_pair(qwen2_folder, artifact, settings_for(text, max_windows=2), lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == [*range(1, 7), 6]  # 2 blocks of 2 models, 2 windows, and the end
    assert {total for _, _, total in seen} == {6}


def test_equal_heads_are_held_once(qwen2_folder: Path, artifact: Path) -> None:
    sources = [streaming.WeightSource(folder) for folder in (qwen2_folder, artifact)]
    skeletons = [streaming.Skeleton(s.spec, torch.device("cpu"), torch.float32) for s in sources]
    first = streaming.Head(sources[0], skeletons[0])
    assert streaming.Head(sources[1], skeletons[1], first.weight).weight is first.weight
    assert streaming.Head(sources[1], skeletons[1], first.weight + 1).weight is not first.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 321}, "vocab_size is 320 and 321"),
        ({"model_type": "qwen3"}, "model_type is 'qwen2' and 'qwen3'"),
    ],
)
def test_models_that_do_not_belong_together(
    qwen2_folder: Path, tmp_path: Path, text: Path, change: dict, message: str
) -> None:
    shutil.copytree(qwen2_folder, tmp_path / "other")
    change_config(tmp_path / "other", **change)
    with pytest.raises(InputError, match=message):
        compare(qwen2_folder, tmp_path / "other", text)


def test_tokenizers_that_differ(qwen2_folder: Path, tmp_path: Path, text: Path) -> None:
    shutil.copytree(qwen2_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    swapped = path.read_text().replace('"q": ', '"Q_": ').replace('"Q": ', '"q": ').replace('"Q_": ', '"Q": ')
    path.write_text(swapped)
    with pytest.raises(InputError, match=f"tokenizers of .* differ: token {text.read_text().index('q')} "):
        compare(qwen2_folder, tmp_path / "other", text)
    path.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        compare(qwen2_folder, tmp_path / "other", text)


def test_states_that_are_not_finite_name_the_block(qwen2_folder: Path, tmp_path: Path, text: Path) -> None:
    shutil.copytree(qwen2_folder, tmp_path / "other")
    edit_tensors(tmp_path / "other", model__layers__1__mlp__down_proj__weight=torch.full((128, 224), torch.inf))
    with pytest.raises(InputError, match="after block 1 are not finite"):
        compare(qwen2_folder, tmp_path / "other", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b" \n", "is empty"),
        (b"short", "less than one window"),
    ],
)
def test_texts_that_cannot_be_used(qwen2_folder: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        compare(qwen2_folder, qwen2_folder, path)


def test_the_bundled_texts_are_the_default(qwen2_folder: Path) -> None:
    config = ValidationConfig(window_tokens=16, max_windows=1, device="cpu", smoke=False)
    result = validate_pair(qwen2_folder, qwen2_folder, config, no_progress)
    assert [row.dataset for row in result.texts] == ["bundled:en", "bundled:zh"]


def test_stores_in_fp32_keep_every_bit(tmp_path: Path) -> None:
    values = torch.randn(3, 4, 5)
    for path in (None, tmp_path / "store.bin"):
        store = ActivationStore((3, 4, 5), path, torch.float32)
        store.save(0, values[:2])
        store.save(2, values[2:])
        assert torch.equal(store.load(0, 3), values) and store.nbytes == 240
        store.close()
