"""Will those who load this artifact load it, and compute the same numbers? Checked from its files, before a push.

A rule is a small function in `consumer_rules.py` or `consumer_tensors.py`; what a consumer does with an artifact that
breaks it is in docs/consumers.md, with the version that was run or read. An "error" stops a push: the artifact
contradicts itself, or a consumer would compute something else without saying so. A "warning" is told and pushed: a
consumer refuses such an artifact, or serves it with less.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_quant.checkpoint.families import ModelSpec, read_model_spec
from qwen_quant.checkpoint.manifest import read_manifest
from qwen_quant.checkpoint.reader import CheckpointReader
from qwen_quant.errors import InputError

VERSIONS = {"transformers": "5.23.0", "vLLM": "0.32.0", "SGLang": "0.5", "Hub": "huggingface_hub 2.4.0"}
"""What the rules were established on; docs/consumers.md says which were run, read, or taken from documentation."""

Consumer = Literal["transformers", "vLLM", "SGLang", "Hub"]
Severity = Literal["error", "warning"]
ALL: tuple[Consumer, ...] = ("transformers", "vLLM", "SGLang")
SERVERS: tuple[Consumer, ...] = ("vLLM", "SGLang")


@dataclass(frozen=True)
class Artifact:
    """A folder as the rules see it: configs parsed, tensors by name, nothing loaded.

    Attributes:
        quantization: config.json's quantization_config ({} for a 16-bit folder); method: its quant_method or "16-bit".
        generation: generation_config.json, None where it is absent. tokenizer_config: {} where it is absent.
        files: names of all files of the folder itself.
    """

    folder: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    generation: dict[str, Any] | None
    tokenizer_config: dict[str, Any]
    files: frozenset[str]
    spec: ModelSpec
    reader: CheckpointReader
    source_id: str

    @property
    def method(self) -> str:
        """quant_method of config.json, "16-bit" without one."""
        return str(self.quantization.get("quant_method", "16-bit"))

    @property
    def chat_template(self) -> str:
        """The default chat template's text, "" where there is none."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template") or ""
        named = {row.get("name"): row.get("template") for row in template} if isinstance(template, list) else {}
        return str(named.get("default") or "") if named else str(template)


Check = Callable[[Artifact], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """One rule: its name in docs/consumers.md, who cares and how much, and what is wrong (nothing when it holds).

    `method` limits it to artifacts of one quant_method; "" is all.
    """

    name: str
    severity: Severity
    consumers: tuple[Consumer, ...]
    check: Check
    method: str = ""


@dataclass(frozen=True)
class Finding:
    """A broken rule, once for all consumers that it concerns."""

    rule: str
    severity: Severity
    consumers: tuple[str, ...]
    message: str


def check_consumers(folder: Path) -> tuple[Finding, ...]:
    """Every broken rule of a folder, errors first.

    Errors: InputError when the folder is not a readable checkpoint of a known family.
    """
    from qwen_quant.hub.consumer_rules import RULES
    from qwen_quant.hub.consumer_tensors import TENSOR_RULES

    artifact = open_artifact(folder)
    rules = [rule for rule in (*RULES, *TENSOR_RULES) if rule.method in ("", artifact.method)]
    found = [finding for rule in rules for finding in _findings(rule, artifact)]
    return tuple(sorted(found, key=lambda finding: finding.severity != "error"))


def _findings(rule: Rule, artifact: Artifact) -> list[Finding]:
    """What one rule finds; a folder that it cannot read at all breaks it too."""
    found, severity = [], rule.severity
    try:
        found += list(rule.check(artifact))
    except InputError as error:
        found, severity = [*found, str(error)], "error"
    return [Finding(rule.name, severity, tuple(rule.consumers), message) for message in found]


def refuse_errors(folder: Path, findings: Iterable[Finding]) -> None:
    """Raise InputError naming the broken rules of severity "error" (nothing when there are none)."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        shown = "; ".join(f"{finding.message} [{finding.rule}]" for finding in errors[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        who = sorted({consumer for finding in errors for consumer in finding.consumers})
        raise InputError(
            f"{folder} is not what {', '.join(who)} expect",
            shown + more,
            "correct the source folder and quantize again; docs/consumers.md explains every rule",
        )


def open_artifact(folder: Path) -> Artifact:
    """Read the configs and headers of `folder` (InputError when something is absent or damaged)."""
    spec = read_model_spec(folder)
    quantization = spec.config.get("quantization_config")
    manifest = read_manifest(folder)
    return Artifact(
        folder=folder,
        config=spec.config,
        quantization=quantization if isinstance(quantization, dict) else {},
        generation=read_object(folder / "generation_config.json"),
        tokenizer_config=read_object(folder / "tokenizer_config.json") or {},
        files=frozenset(path.name for path in folder.iterdir() if path.is_file()),
        spec=spec,
        reader=CheckpointReader(folder),
        source_id=str(manifest.get("source", {}).get("id", "")),
    )


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None when the file is absent (InputError when it is damaged)."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", str(error), "restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object", next_step="restore the file")
    return value
