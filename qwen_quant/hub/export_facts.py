"""Everything that the card of an export or a conversion says, read from the folder and checked to belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint.families import read_config
from qwen_quant.errors import InputError
from qwen_quant.evaluation.report import JSON_FILE, read_report
from qwen_quant.hub.card_facts import Told, baseline_label, check_report, has_chat_template
from qwen_quant.hub.card_source import SourceCard, licence_file
from qwen_quant.hub.gguf_head import gguf_files, read_head
from qwen_quant.hub.reencoded import Reencoded, read_reencoded
from qwen_quant.results import ValidationResult

EXACTNESS = "exactness"


@dataclass(frozen=True)
class ExportFacts:
    """What one such card is written from (fields as in `CardFacts`).

    Attributes:
        made: the manifest. label: the codes in the report's tables ("Int4").
        has_tokenizer: whether text can be given to it at all.
    """

    name: str
    target: str
    repo_id: str | None
    label: str
    baseline_label: str
    made: Reencoded
    model_type: str
    report: ValidationResult | None
    source: SourceCard
    override_reason: str
    has_chat_template: bool
    has_tokenizer: bool
    licence_file: str
    links: tuple[tuple[str, str], ...]

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """Names of the gates that failed; an export that is not exact fails that of being so."""
        failed = [gate.name for gate in self.report.gates if not gate.passed] if self.report else []
        return tuple(failed if self.made.exact else [*failed, EXACTNESS])


def gather_export_facts(folder: Path, told: Told) -> ExportFacts:
    """Read an export or a conversion and the report in it.

    Errors: InputError when it is neither, when a file is damaged, or the report measured other weights.
    """
    made = read_reencoded(folder)
    report = None
    if (folder / JSON_FILE).exists():
        report = read_report(folder / JSON_FILE)
        check_report(folder / JSON_FILE, report, made)
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    name = told.repo_id.split("/")[-1] if told.repo_id else folder.resolve().name
    chat, tokenizer, model_type = _text_facts(folder, made, config)
    return ExportFacts(
        name=name,
        target=told.repo_id or f"./{name}",
        repo_id=told.repo_id,
        label=made.label,
        baseline_label=baseline_label(report, config),
        made=made,
        model_type=model_type,
        report=report,
        source=told.source,
        override_reason=told.override_reason or (report.override_reason if report else ""),
        has_chat_template=chat,
        has_tokenizer=tokenizer,
        licence_file=licence_file(folder),
        links=told.links,
    )


def _text_facts(folder: Path, made: Reencoded, config: dict[str, Any]) -> tuple[bool, bool, str]:
    """(has a chat template, has a tokenizer, model type); a GGUF file holds all three in its head."""
    if made.format == "gguf":
        files = [name for name in gguf_files(made.files) if (folder / name).is_file()]
        if not files:
            raise InputError(f"{folder} has no GGUF file", "its manifest says that it is a GGUF export", "export again")
        values = read_head(folder / files[0]).values
        tokenizer = values.get("tokenizer.ggml.model", "no_vocab") != "no_vocab"
        return "tokenizer.chat_template" in values, tokenizer, str(values.get("general.architecture", ""))
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "qwen.tiktoken"))
    return has_chat_template(folder, config), tokenizer, str(config.get("model_type", ""))
