"""Sections of the card about quality: perplexity and divergence, benchmarks, context lengths, gates."""

from __future__ import annotations

from pathlib import PurePath

from qwen_quant.hub.card_facts import Described
from qwen_quant.hub.card_markdown import code, escape, interval, number, percent, percent_interval, signed, table
from qwen_quant.hub.card_words import say, verdict_key
from qwen_quant.results import GateOutcome, TaskResult, TextResult, ValidationResult, Verdict

WIDE_TASKS = 6  # more benchmarks than this stand in rows and not in columns
_TASK_NAMES = {
    "mmlu": "MMLU",
    "ceval-valid": "C-Eval (val)",
    "cmmlu": "CMMLU",
    "gsm8k": "GSM8K",
    "qq_humaneval": "HumanEval",
    "qq_mbpp": "MBPP",
    "bbh_cot_fewshot": "BBH",
    "qq_vcsum": "VCSUM",
}


def dataset_name(dataset: str) -> str:
    """A text's name for readers: files by their name alone, so that the card says nothing of somebody's folders."""
    return dataset if dataset.startswith(("bundled:", "hub:")) else PurePath(dataset).name or dataset


def quality_section(facts: Described, language: str) -> list[str]:
    """Every table of the report; nothing where there is no report."""
    report = facts.report
    if report is None:
        return []
    parts = [f"## {say(language, 'quality')}"]
    confidence = _confidence(report)
    if confidence:
        parts.append(say(language, "quality_protocol", confidence=confidence))
    parts += _texts(facts, report, language) if report.texts else []
    parts += _lengths(facts, report, language) if report.by_length else []
    parts += _tasks(facts, report, language) if report.tasks else []
    if report.smoke:
        passed = sum(not case.failures for case in report.smoke)
        parts.append(say(language, "smoke", passed=passed, count=len(report.smoke)))
    if report.kv_cache:
        parts.append(say(language, "kv_used", kv_cache=code(report.kv_cache)))
    return parts


def _confidence(report: ValidationResult) -> str:
    """The confidence of the report's intervals as a percentage ("" where it has none)."""
    intervals = [text.perplexity_ratio for text in report.texts] + [task.difference for task in report.tasks]
    return percent(intervals[0].confidence, 0) if intervals else ""


def _texts(facts: Described, report: ValidationResult, language: str) -> list[str]:
    to = say(language, "to")
    columns = [say(language, "text"), facts.baseline_label, facts.label]
    columns += [say(language, key) for key in ("ratio", "kl", "top1")]
    rows = [
        (
            code(dataset_name(text.dataset)),
            number(text.perplexity.baseline, 2),
            number(text.perplexity.quantized, 2),
            interval(text.perplexity_ratio, 4, to=to),
            interval(text.kl_mean, 4, to=to),
            percent_interval(text.top1_agreement, to=to),
        )
        for text in report.texts
    ]
    notes = "\n".join(f"- {_text_note(text, language)}" for text in report.texts)
    bundled = any(text.dataset.startswith("bundled:") for text in report.texts)
    told = [say(language, "bundled_texts")] if bundled else []
    return [f"### {say(language, 'perplexity')}", table(columns, rows), notes, *told]


def _text_note(text: TextResult, language: str) -> str:
    verdict = _verdict(text.verdict, language)
    counts = {"windows": text.windows, "window": text.window_tokens, "stride": text.stride_tokens}
    key = "text_protocol_disjoint" if text.stride_tokens == text.window_tokens else "text_protocol"
    name = code(dataset_name(text.dataset))
    return say(language, key, text=name, tokens=text.tokens, verdict=verdict, **counts)


def _verdict(verdict: Verdict, language: str) -> str:
    """The verdict as a sentence; what could have been seen belongs to "no loss detected" only."""
    key = verdict_key(verdict.word)
    smallest = verdict.smallest_detectable
    end = say(language, "end")
    if key == "verdict_no_loss" and smallest is not None:
        end = say(language, "detectable", smallest=percent(smallest))
    return say(language, key) + end


def _lengths(facts: Described, report: ValidationResult, language: str) -> list[str]:
    columns = (say(language, "context_length"), facts.baseline_label, facts.label, say(language, "ratio"))
    rows = [
        (str(row.window_tokens), number(row.baseline, 2), number(row.quantized, 2), number(row.ratio, 4))
        for row in report.by_length
    ]
    return [f"### {say(language, 'by_length')}", table(columns, rows, 0)]


def _tasks(facts: Described, report: ValidationResult, language: str) -> list[str]:
    make = _wide_tasks if len(report.tasks) <= WIDE_TASKS else _long_tasks
    return [f"### {say(language, 'tasks')}", make(facts, report, language), say(language, "tasks_note")]


def _task_title(task: TaskResult, language: str) -> str:
    return say(language, "shots", task=escape(_TASK_NAMES.get(task.task, task.task)), shots=task.shots)


def _difference(task: TaskResult, language: str) -> tuple[str, str]:
    """(difference, its interval) in points."""
    change = task.difference
    ends = f"{signed(100 * change.low, 1)} {say(language, 'to')} {signed(100 * change.high, 1)}"
    return signed(100 * change.estimate, 1), ends


def _wide_tasks(facts: Described, report: ValidationResult, language: str) -> str:
    """The form of the published Qwen cards: one row a model, one column a benchmark."""
    tasks = report.tasks
    changes = [_difference(task, language) for task in tasks]
    confidence = say(language, "interval_row", confidence=_confidence(report))
    rows = [
        (facts.baseline_label, *(number(100 * task.baseline, 1) for task in tasks)),
        (facts.label, *(number(100 * task.quantized, 1) for task in tasks)),
        (say(language, "difference"), *(change for change, _ in changes)),
        (confidence, *(ends for _, ends in changes)),
        (say(language, "items"), *(str(task.items) for task in tasks)),
        (say(language, "verdict_row"), *(say(language, verdict_key(task.verdict.word)) for task in tasks)),
    ]
    return table((say(language, "quantization"), *(_task_title(task, language) for task in tasks)), rows)


def _long_tasks(facts: Described, report: ValidationResult, language: str) -> str:
    columns = [say(language, "task"), facts.baseline_label, facts.label, say(language, "difference")]
    columns += [say(language, key) for key in ("items", "verdict_row")]
    rows = []
    for task in report.tasks:
        change, ends = _difference(task, language)
        scores = (number(100 * task.baseline, 1), number(100 * task.quantized, 1), f"{change} ({ends})")
        rows.append(
            (_task_title(task, language), *scores, str(task.items), say(language, verdict_key(task.verdict.word)))
        )
    return table(columns, rows)


def gate_name(gate: GateOutcome) -> str:
    """ "max_kl on wiki.test.raw": the gate and what it was applied to, files by their name alone."""
    limit, on, subject = gate.name.partition(" on ")
    return escape(f"{limit}{on}{dataset_name(subject)}" if on else limit)


def gates_section(facts: Described, language: str) -> list[str]:
    """The table of gates; a sentence where the report has none."""
    if facts.report is None:
        return []
    if not facts.report.gates:
        return [say(language, "no_gates")]
    columns = [say(language, key) for key in ("gate", "limit", "measured", "result")]
    rows = [
        (
            gate_name(gate),
            number(gate.limit, 4),
            number(gate.value, 4),
            say(language, "passed") if gate.passed else f"**{say(language, 'not_passed')}**",
        )
        for gate in facts.report.gates
    ]
    return [f"### {say(language, 'gates')}", table(columns, rows)]


def failed_gates_notice(facts: Described, language: str) -> list[str]:
    """A quotation at the top of the card when a gate failed, with the reason why it is published all the same."""
    failed = [gate for gate in facts.report.gates if not gate.passed] if facts.report else []
    if not failed:
        return []
    lines = [f"**{say(language, 'failed_title')}**", ""]
    for gate in failed:
        values = {"limit": number(gate.limit, 4), "value": number(gate.value, 4)}
        lines.append("- " + say(language, "failed_gate", gate=gate_name(gate), **values))
    reason = facts.override_reason
    told = say(language, "failed_reason", reason=escape(reason)) if reason else say(language, "failed_no_reason")
    return ["\n".join(f"> {line}".rstrip() for line in [*lines, "", told])]
