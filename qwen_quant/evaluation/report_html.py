"""report.html: one self-contained page. It loads nothing, runs no script, and every text in it is escaped.

The page's own security policy forbids every request, so that a browser enforces what this file promises. Sections
without data are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from qwen_quant.evaluation.report_numbers import (
    cache_words,
    escaped,
    number,
    percent,
    percent_span,
    points,
    points_span,
    span,
    whole,
)
from qwen_quant.evaluation.report_plots import (
    Chart,
    ForestRow,
    Series,
    forest_plot,
    legend,
    line_chart,
    linear_ticks,
    value_range,
)
from qwen_quant.evaluation.report_style import STYLE
from qwen_quant.results import GateOutcome, LayerStats, SmokeCase, TaskResult, TextResult, ValidationResult
from qwen_quant.units import format_bytes, format_seconds

SMOKE_WORD = "smoke prompts"  # in the name of the gate that every validation has
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")


def render_html(result: ValidationResult, layers: Sequence[LayerStats]) -> str:
    """The whole page as text; `layers` are the artifact's statistics (none: no such plot)."""
    sections = (
        _header(result),
        _verdict(result),
        _warnings(result.warnings),
        *(_text_section(text) for text in result.texts),
        _length_section(result),
        _task_section(result.tasks),
        _layer_section(layers),
        _smoke_section(result.smoke),
        _run_section(result),
    )
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Validation of {escaped(_last(result.quantized))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _last(name: str) -> str:
    """The last part of a folder or hub id."""
    return name.rstrip("/").rpartition("/")[2] or name


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    marks: Sequence[str] = (),
    *,
    kinds: str = "t",
    style: str = "",
) -> str:
    """A table of plain texts.

    Args:
        marks: a class for each row ((): none).
        kinds: a letter for each column: t for text, n for figures; columns beyond it are figures.
        style: the table's class; "stack" puts the cells of a row one below the other where the screen is narrow.
    """
    texts = [kind == "t" for kind in kinds.ljust(len(headings), "n")]

    def cells(tag: str, row: Sequence[str]) -> str:
        sides = [' class="text"' if text else "" for text in texts]
        labels = [f' data-label="{escaped(name)}"' if tag == "td" and style and name else "" for name in headings]
        parts = zip(sides, labels, row, strict=True)
        return "".join(f"<{tag}{side}{label}>{escaped(cell)}</{tag}>" for side, label, cell in parts)

    classes = [f' class="{mark}"' if mark else "" for mark in marks] or [""] * len(rows)
    lines = "".join(f"<tr{mark}>{cells('td', row)}</tr>\n" for mark, row in zip(classes, rows, strict=True))
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    named = f' class="{style}"' if style else ""
    return f'<div class="scroll" tabindex="0"><table{named}>{head}\n<tbody>\n{lines}</tbody></table></div>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def _header(result: ValidationResult) -> str:
    cache = escaped(cache_words(result))
    share = f" ({percent(result.quantized_bytes / result.baseline_bytes)} of it)" if result.baseline_bytes else ""
    return (
        f"<h1>Validation of {escaped(_last(result.quantized))}</h1>\n"
        f'<p class="soft">{escaped(result.quantized)}: {escaped(result.quantized_kind)}, '
        f"{format_bytes(result.quantized_bytes)}{share}<br>\n"
        f"compared with {escaped(result.baseline)}: {escaped(result.baseline_kind)}, "
        f"{format_bytes(result.baseline_bytes)}{f'<br>{chr(10)}{cache}' if cache else ''}</p>"
    )


def _verdict(result: ValidationResult) -> str:
    """The answer first: gates in words, then what each text, the tasks and the smoke prompts say."""
    style, headline = _headline(result)
    reason = (
        f"<p>Reason given for the override: {escaped(result.override_reason)}</p>" if result.override_reason else ""
    )
    said = "".join(f"<li>{escaped(line)}</li>" for line in _findings(result))
    listed = f"<ul>{said}</ul>" if said else ""
    return f'<div class="verdict {style}"><p>{escaped(headline)}</p>{reason}{_gate_table(result.gates)}{listed}</div>'


def _headline(result: ValidationResult) -> tuple[str, str]:
    """(class, the verdict in one sentence): a page without limits on its metrics never says that they passed."""
    failed = [gate for gate in result.gates if not gate.passed]
    if failed:
        count = f"{len(failed)} of {len(result.gates)} gates"
        names = ", ".join(gate.name for gate in failed)
        if result.override_reason:
            return "warn", f"Overridden: {count} failed ({names})."
        return "bad", f"Failed: {count} ({names})."
    if all(SMOKE_WORD in gate.name for gate in result.gates):
        smoke = "The smoke prompts pass. " if result.gates else ""
        return "", f"{smoke}No limit was set for any metric: this page measures and does not decide."
    words = [text.verdict.word for text in result.texts] + [task.verdict.word for task in result.tasks]
    note = " A loss was detected, within the limits." if "loss" in words else ""
    return "good", f"Passed: {_all(len(result.gates), 'gate')} held.{note}"


def _all(count: int, noun: str) -> str:
    return f"the one {noun}" if count == 1 else f"all {count} {noun}s"


def _gate_table(gates: Sequence[GateOutcome]) -> str:
    if not gates:
        return ""
    rows = [(g.name, f"{g.limit:g}", number(g.value), "passed" if g.passed else "FAILED") for g in gates]
    note = '<p class="note">A gate compares the unfavourable end of the interval with its limit.</p>'
    return _table(("gate", "limit", "value", ""), rows, ["good" if g.passed else "bad" for g in gates]) + note


def _findings(result: ValidationResult) -> list[str]:
    """One line a text, one for all tasks, one for the smoke prompts."""
    lines = [f"{text.dataset}: {text.verdict.text}" for text in result.texts]
    words = list(dict.fromkeys(task.verdict.word for task in result.tasks))
    if words:
        groups = [f"{word}: {', '.join(t.task for t in result.tasks if t.verdict.word == word)}" for word in words]
        lines.append(f"Tasks. {'; '.join(groups)}")
    if result.smoke:
        failing = [case.name for case in result.smoke if case.failures]
        names = f" (failing: {', '.join(failing)})" if failing else ""
        lines.append(f"Smoke prompts: {len(result.smoke) - len(failing)} of {len(result.smoke)} pass{names}")
    return lines


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    listed = "".join(f"<li>{escaped(text)}</li>" for text in warnings)
    return f'<h2>Warnings</h2>\n<ul class="warnings">{listed}</ul>'


def _text_section(text: TextResult) -> str:
    """One text: its verdict, the table of both models, the protocol, and KL by position."""
    pair, ratio, kl = text.perplexity, text.perplexity_ratio, text.divergence
    rows = [
        ("perplexity", number(pair.baseline), number(pair.quantized), ""),
        ("perplexity ratio", "1", f"{ratio.estimate:.4f}", f"{ratio.low:.4f} to {ratio.high:.4f}"),
        ("bits per byte", f"{text.bits_per_byte_baseline:.4f}", f"{text.bits_per_byte_quantized:.4f}", ""),
        ("KL mean", "0", number(text.kl_mean.estimate), span(text.kl_mean)),
        ("KL median", "0", number(kl.kl_median), ""),
        ("KL p90", "0", number(kl.kl_p90), ""),
        ("KL p99", "0", number(kl.kl_p99), ""),
        ("KL max", "0", number(kl.kl_max), ""),
        ("top-1 agreement", "100%", percent(text.top1_agreement.estimate), percent_span(text.top1_agreement)),
    ]
    heading = f"{percent(text.kl_mean.confidence).replace('.00', '')} interval"
    chart = Chart(
        "KL divergence by position in the window",
        "first position of the stretch",
        "mean KL divergence, nats per token",
        (Series("quantized", "quantized", tuple((float(at), mean) for at, mean in text.kl_by_position)),),
    )
    places = [(str(at), number(mean)) for at, mean in text.kl_by_position]
    listed = _details("KL divergence by position, as figures", _table(("first position", "mean KL"), places))
    return (
        f"<h2>Text: {escaped(text.dataset)}</h2>\n<p><strong>{escaped(text.verdict.text)}</strong></p>\n"
        f'<div class="plots">{_table(("", "baseline", "quantized", heading), rows)}{line_chart(chart)}</div>\n'
        f'<p class="note">{escaped(protocol(text))}</p>\n{listed if places else ""}'
    )


def protocol(text: TextResult) -> str:
    """How a text was scored, in sentences: source, joining, windows, stride, tokens, and what the divergence is."""
    cut = "they do not overlap"
    if text.stride_tokens != text.window_tokens:
        cut = f"one starts every {text.stride_tokens} tokens and each token is scored in the first window that holds it"
    return (
        f"Protocol: {text.dataset} (sha256 {text.dataset_sha256}); joining: {text.joining}; "
        f"{whole(text.windows)} windows of {text.window_tokens} tokens, {cut}; "
        f"{whole(text.tokens)} tokens scored by both models. Perplexity is exp of the mean negative log-likelihood "
        f"(natural logarithm); KL(baseline || quantized) in nats over the full vocabulary at "
        f"{whole(text.divergence.tokens)} positions."
    )


def _length_section(result: ValidationResult) -> str:
    rows = result.by_length
    if not rows:
        return ""
    cells = [
        (
            str(r.window_tokens),
            whole(r.windows),
            whole(r.tokens),
            number(r.baseline),
            number(r.quantized),
            f"{r.ratio:.4f}",
        )
        for r in rows
    ]
    lengths = tuple(float(row.window_tokens) for row in rows)
    chart = Chart(
        "Perplexity by context length",
        "context length, tokens",
        "perplexity",
        (
            Series("baseline", "baseline", tuple(zip(lengths, (row.baseline for row in rows), strict=True))),
            Series("quantized", "quantized", tuple(zip(lengths, (row.quantized for row in rows), strict=True))),
        ),
        log_x=True,
        log_y=True,
        x_ticks=lengths,
    )
    headings = ("window", "windows", "tokens", "baseline", "quantized", "ratio")
    return (
        f'<h2>Perplexity by context length</h2>\n<div class="plots"><div>{_table(headings, cells, kinds="n")}'
        '<p class="note">The same text, cut into windows of each length that do not overlap.</p></div>'
        f"{line_chart(chart)}</div>"
    )


def _task_section(tasks: Sequence[TaskResult]) -> str:
    if not tasks:
        return ""
    headings = ("task", "items", "baseline", "quantized", "difference", "discordant", "p", "p (Holm)", "verdict")
    rows, forest = [], []
    for task in tasks:
        change, lost, gained = task.difference, task.only_baseline_right, task.only_quantized_right
        scores = (percent(task.baseline), percent(task.quantized))
        moved = f"{points(change.estimate)} ({points_span(change)})"
        discordant = "" if lost is None or gained is None else f"{whole(lost)} / {whole(gained)}"
        name = f"{task.task} ({task.metric}, {task.shots} shots)"
        figures = (*scores, moved, discordant, number(task.p_value), number(task.p_holm))
        rows.append((name, whole(task.items), *figures, task.verdict.text))
        forest.append(_forest_row(task))
    plot = forest_plot("Accuracy difference by task, with intervals", "quantized - baseline, percentage points", forest)
    marks = ["loss" if task.verdict.word == "loss" else "" for task in tasks]
    return (
        f'<h2>Benchmark tasks</h2>\n<div class="plots">{plot}</div>\n'
        f"{_table(headings, rows, marks, kinds='tnnnnnnnt', style='stack')}\n"
        '<p class="note">Differences are quantized - baseline in percentage points, on the same items, '
        "with their interval; discordant: items that only the baseline / only the quantized model got right; p is from "
        "McNemar's exact test, or a sign-flip permutation test where the score is not 0 or 1; Holm's correction is "
        "over all tasks of this page.</p>"
    )


def _forest_row(task: TaskResult) -> ForestRow:
    change = task.difference
    style = {"loss": "bad-mark", "gain": "good-mark"}.get(task.verdict.word, "quantized")
    value = f"{points(change.estimate)} ({points_span(change)})"
    return ForestRow(task.task, value, 100 * change.estimate, 100 * change.low, 100 * change.high, style)


def _layer_section(layers: Sequence[LayerStats]) -> str:
    """One small plot for each kind of linear, all on the same logarithmic axis; the figures below, worst first."""
    if not layers:
        return ""
    kinds: dict[str, list[tuple[float, LayerStats]]] = {}
    for layer in layers:
        found = _BLOCK.search(layer.name)
        block, kind = (int(found[1]), found[2]) if found else (0, layer.name)
        kinds.setdefault(kind, []).append((float(block), layer))
    errors = [e for layer in layers for e in (layer.relative_error, layer.rounding_error) if 0 < e < float("inf")]
    limits = value_range(errors, log=True) if errors else None
    last = max(block for members in kinds.values() for block, _ in members)
    ticks = tuple(tick for tick in linear_ticks(0, max(last, 1), 6) if tick == int(tick))
    plots, curves = [], (Series("plain rounding", "rounding", ()), Series("this artifact", "quantized", ()))
    for kind, members in kinds.items():
        members.sort(key=lambda member: member[0])
        plain = replace(curves[0], points=tuple((block, s.rounding_error) for block, s in members))
        ours = replace(curves[1], points=tuple((block, s.relative_error) for block, s in members))
        chart = Chart(kind, "block", "relative error", (plain, ours), log_y=True, y_range=limits, x_ticks=ticks)
        plots.append(line_chart(replace(chart, own_legend=False)))
    return (
        f'<h2>Error of each layer</h2>\n<p class="note">Relative error of the layer\'s output on the calibration text, '
        "sqrt(tr(dW H dW^T) / tr(W H W^T)), of this artifact and of plain min-max rounding on the same Hessian; "
        f'logarithmic axis, the same in every plot.</p>\n{legend(curves)}<div class="plots">{"".join(plots)}</div>\n'
        + _details(f"All {len(layers)} layers as figures, furthest off first", _layer_table(layers))
    )


def _layer_table(layers: Sequence[LayerStats]) -> str:
    rows = [
        (
            layer.name,
            f"{layer.out_features} x {layer.in_features}",
            number(layer.relative_error),
            number(layer.rounding_error),
            number(layer.damp_percent),
            str(layer.dead_columns),
            whole(layer.tokens),
        )
        for layer in sorted(layers, key=lambda layer: -layer.relative_error)
    ]
    headings = ("layer", "out x in", "relative error", "plain rounding", "damp_percent", "dead columns", "tokens")
    return _table(headings, rows)


def _smoke_section(cases: Sequence[SmokeCase]) -> str:
    if not cases:
        return ""
    return "<h2>Smoke prompts</h2>\n" + "\n".join(_smoke_case(case) for case in cases)


def _smoke_case(case: SmokeCase) -> str:
    """Prompt and answers as they are, one beside the other where there is room."""
    known = _LANGUAGE.fullmatch(case.language)
    lang = f' lang="{case.language}"' if known else ""

    def block(title: str, text: str) -> str:
        return f'<div><p class="soft">{title}</p><pre dir="auto"{lang}>{escaped(text) or "(empty)"}</pre></div>'

    ended = "a stop token ended it" if case.stopped else "no stop token"
    answer = block(f"quantized ({whole(case.tokens)} tokens, {ended})", case.text)
    other = block("baseline", case.baseline_text) if case.baseline_text else ""
    failures = "".join(f'<p class="failure">{escaped(text)}</p>' for text in case.failures)
    failures += "".join(f"<p>{escaped(text)}</p>" for text in case.notes)
    state, style = ("FAILED", "case bad") if case.failures else ("passed", "case")
    return (
        f'<div class="{style}"><h3>{escaped(case.name)} ({escaped(case.language)}): {state}</h3>'
        f'{failures}{block("prompt, as sent", case.prompt)}<div class="answers">{answer}{other}</div></div>'
    )


def _run_section(result: ValidationResult) -> str:
    facts = {
        "time": format_seconds(result.seconds),
        "peak memory": format_bytes(result.peak_memory_bytes),
        "seed": str(result.seed),
        "baseline": result.baseline,
        "baseline sha256": result.baseline_sha256,
        "quantized": result.quantized,
        "quantized sha256": result.quantized_sha256,
        **result.versions,
    }
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items() if value)
    return f"<h2>This run</h2>\n<dl>{listed}</dl>"
