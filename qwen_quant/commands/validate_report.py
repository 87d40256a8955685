"""A ValidationResult as people read it on a terminal."""

from __future__ import annotations

from qwen_quant.console import Table
from qwen_quant.evaluation.report_numbers import cache_words
from qwen_quant.results import Interval, TextResult, ValidationResult
from qwen_quant.units import format_bytes, format_seconds


def report_parts(result: ValidationResult) -> tuple[str | Table, ...]:
    """Every section of the report that has something in it."""
    parts: list[str | Table] = [cache_words(result)] if result.kv_cache else []
    for text in result.texts:
        parts += [protocol(text), comparison_table(result, text), text.verdict.text]
    if result.by_length:
        rows = tuple(
            (f"{r.window_tokens}", f"{r.windows}", f"{r.baseline:.3f}", f"{r.quantized:.3f}", f"{r.ratio:.4f}")
            for r in result.by_length
        )
        parts.append(Table("perplexity by length", ("tokens", "windows", "baseline", "quantized", "ratio"), rows))
    if result.tasks:
        parts.append(_task_table(result))
    parts += _smoke_lines(result)
    parts += [
        f"gate {gate.name}: {gate.value:.4g}, limit {gate.limit:g}: {'passed' if gate.passed else 'FAILED'}"
        for gate in result.gates
    ]
    if result.override_reason:
        parts.append(f"failed gates are overridden: {result.override_reason}")
    parts += [f"note: {warning}" for warning in result.warnings]
    parts.append(f"{format_seconds(result.seconds)}, peak {format_bytes(result.peak_memory_bytes)}")
    return tuple(parts)


def protocol(text: TextResult) -> str:
    """How the windows were cut, in one sentence."""
    disjoint = text.stride_tokens == text.window_tokens
    cut = "disjoint" if disjoint else f"one every {text.stride_tokens} tokens, each token scored once"
    return (
        f"{text.dataset} (sha256 {text.dataset_sha256[:16]}, {text.joining}): {text.windows} windows of "
        f"{text.window_tokens} tokens, {cut}; {text.tokens} tokens scored"
    )


def interval(value: Interval, digits: int = 4) -> str:
    """ "0.0833 (0.0801 to 0.0866)"."""
    return f"{value.estimate:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def comparison_table(result: ValidationResult, text: TextResult) -> Table:
    """Baseline and quantized side by side, with 95% intervals."""
    pair, divergence = text.perplexity, text.divergence
    top1 = text.top1_agreement
    agreement = f"{100 * top1.estimate:.2f}% ({100 * top1.low:.2f} to {100 * top1.high:.2f})"
    tail = f"{divergence.kl_median:.4g} / {divergence.kl_p90:.4g} / {divergence.kl_p99:.4g} / {divergence.kl_max:.4g}"
    rows = (
        ("size", format_bytes(result.baseline_bytes), format_bytes(result.quantized_bytes)),
        ("perplexity", f"{pair.baseline:.3f}", f"{pair.quantized:.3f}"),
        ("perplexity ratio", "1", interval(text.perplexity_ratio)),
        ("bits per byte", f"{text.bits_per_byte_baseline:.4f}", f"{text.bits_per_byte_quantized:.4f}"),
        ("KL divergence", "0", interval(text.kl_mean)),
        ("KL median / p90 / p99 / max", "", tail),
        ("top-1 agreement", "100%", agreement),
    )
    return Table("", ("", "baseline", "quantized"), rows)


def _task_table(result: ValidationResult) -> Table:
    rows = []
    for task in result.tasks:
        gap = task.difference
        rows.append(
            (
                f"{task.task} ({task.shots}-shot, {task.metric})",
                f"{task.items}",
                f"{100 * task.baseline:.1f}",
                f"{100 * task.quantized:.1f}",
                f"{100 * gap.estimate:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})",
                f"{task.p_holm:.3g}",
                task.verdict.text,
            )
        )
    return Table(
        "tasks (percent)", ("task", "items", "baseline", "quantized", "difference", "p (Holm)", "verdict"), tuple(rows)
    )


def _smoke_lines(result: ValidationResult) -> list[str]:
    if not result.smoke:
        return []
    failed = [case for case in result.smoke if case.failures]
    lines = [f"smoke prompts: {len(result.smoke) - len(failed)} of {len(result.smoke)} pass"]
    return lines + [
        f"  {case.name} ({case.language}): {', '.join(case.failures)}: {case.text[:80]!r}" for case in failed
    ]
