"""Names in place of paths, in evidence that is to be published: a report says what was compared, not where it lay.

report.json and profile.json are rewritten in the artifact's folder when its card is written; what they measured is
unchanged, and a report whose texts are known by their sha256 is still compared with any other.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from qwen_quant.evaluation.report import HTML_FILE, JSON_FILE, layers_of, read_report, report_text, write_report
from qwen_quant.hub.card_quality import dataset_name
from qwen_quant.profiling.page import JSON_FILE as PROFILE_FILE
from qwen_quant.profiling.page import PAGE_FILE
from qwen_quant.results import GateOutcome, ValidationResult
from qwen_quant.resume import write_json_atomically

_PATH = re.compile(r"(?<![\w./:])(?:~|\.\.?)?/(?:[^\s/'\"]+/)+([^\s/'\"]+)")


def without_folders(text: str) -> str:
    """`text` with every absolute, home or dotted path in it as its last name; hub ids and URLs are none."""
    return _PATH.sub(lambda found: found[1], text)


def _model(value: str) -> str:
    return PurePath(value).name or value if value.startswith(("/", "~", ".")) else value


def _gate(gate: GateOutcome) -> GateOutcome:
    limit, on, subject = gate.name.partition(" on ")
    return dataclasses.replace(gate, name=f"{limit}{on}{dataset_name(subject)}" if on else limit)


def named(result: ValidationResult) -> ValidationResult:
    """The same result without folders of the machine that measured it."""
    return dataclasses.replace(
        result,
        baseline=_model(result.baseline),
        quantized=_model(result.quantized),
        texts=tuple(dataclasses.replace(text, dataset=dataset_name(text.dataset)) for text in result.texts),
        gates=tuple(_gate(gate) for gate in result.gates),
        warnings=tuple(without_folders(line) for line in result.warnings),
    )


def name_evidence(folder: Path) -> None:
    """Rewrite report and profile of an artifact where they hold paths (InputError for a report that is damaged)."""
    report = folder / JSON_FILE
    if report.is_file():
        result = named(read_report(report))
        if report_text(result).encode() != report.read_bytes():
            _write(folder, result)
    profile = folder / PROFILE_FILE
    if profile.is_file():
        _name_profile(profile)


def _write(folder: Path, result: ValidationResult) -> None:
    """report.json, and the page where there is one."""
    if (folder / HTML_FILE).is_file():
        write_report(result, folder, layers_of(folder))
        return
    temporary = folder / f".{JSON_FILE}.tmp"
    temporary.write_text(report_text(result), encoding="utf-8")
    temporary.replace(folder / JSON_FILE)


def _name_profile(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    folders = {model["folder"]: _model(model["folder"]) for model in document["models"]}
    changed = {old: new for old, new in folders.items() if old != new}
    if not changed:
        return
    models = [{**model, "folder": folders[model["folder"]]} for model in document["models"]]
    write_json_atomically(path, {**document, "models": models})
    page = path.with_name(PAGE_FILE)
    if page.is_file():
        page.write_text(_replaced(page.read_text(encoding="utf-8"), changed.items()), encoding="utf-8")


def _replaced(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(html.escape(old), html.escape(new)).replace(old, new)
    return text
