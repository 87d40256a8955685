"""Everything that a model card says, read from the artifact and its evidence and checked to belong together.

The evidence is qwen-quant.json (what was made, from what, how), report.json (how good), profile.json (how fast) and
the headers of the weights. A report or profile names the weights it measured by `weights_sha256`; the manifest holds
the hashes of the very files, so that the comparison reads no weight. Whether the files still are what the manifest
says is the affair of `qwen-quant verify`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from qwen_quant.checkpoint.families import read_config
from qwen_quant.checkpoint.identity import weights_sha256_of
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, read_manifest
from qwen_quant.errors import InputError
from qwen_quant.evaluation.report import JSON_FILE, read_report
from qwen_quant.hub.card_profile import CardProfile, read_card_profile
from qwen_quant.hub.card_source import SourceCard, licence_file
from qwen_quant.inspection import InspectResult, inspect_path
from qwen_quant.recipe import BnbConfig, GPTQConfig
from qwen_quant.results import ValidationResult

PROFILE_FILE = "profile.json"
METHODS = ("gptq", "rounding", "bitsandbytes")
_PLACE_IN_BLOCK = re.compile(r"^.*?\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_WIDTHS = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}


@dataclass(frozen=True)
class Calibration:
    """What the solver saw: `source` as given, the sha256 of its token ids, rows of `seq_len` tokens, the seed."""

    source: str
    sha256: str
    rows: int
    seq_len: int
    tokens: int
    seed: int


@dataclass(frozen=True)
class Made:
    """The manifest, typed.

    Attributes:
        method: of METHODS. config: its settings. calibration: None where the method needs no text.
        source_id, revision: hub id (or folder name) and commit. source_sha256: file -> sha256 of the source.
        output_sha256: the same of the artifact. quantized: linears. kept: parameter -> why it stays 16-bit.
        kinds: (name in a block, how many), experts without their number, in order of appearance.
        worst: (linear, its relative error, that of plain rounding) of the linear that lost most; None where not kept.
        experts: what calibrated them -> how many; () where there are none. fewest_tokens: that an expert was sent.
        compute: (device, dtype) or None. max_shard_size_bytes: None in manifests of earlier versions.
        versions: package -> version. seconds, peak_memory_bytes: of the run.
    """

    method: str
    config: GPTQConfig | BnbConfig
    calibration: Calibration | None
    source_id: str
    revision: str | None
    source_sha256: dict[str, str]
    output_sha256: dict[str, str]
    quantized: int
    kept: dict[str, str]
    kinds: tuple[tuple[str, int], ...]
    worst: tuple[str, float, float] | None
    experts: tuple[tuple[str, int], ...]
    fewest_tokens: int
    compute: tuple[str, str] | None
    max_shard_size_bytes: int | None
    versions: dict[str, str]
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int

    @property
    def tool_version(self) -> str:
        """The version of qwen-quant that made it."""
        return self.versions.get("qwen-quant", "")

    @property
    def base_id(self) -> str:
        """Id of the source; base_revision: its commit; base_sha256: the `weights_sha256` of it."""
        return self.source_id

    @property
    def base_revision(self) -> str | None:
        """See `base_id`."""
        return self.revision

    @property
    def base_sha256(self) -> str:
        """See `base_id`."""
        return weights_sha256_of(self.source_sha256)

    @property
    def measured_sha256(self) -> tuple[str, ...]:
        """`weights_sha256` of the weights that a report must have measured."""
        return (weights_sha256_of(self.output_sha256),)


class Manifest(Protocol):
    """What every manifest says of what was quantized, and of which weights a report counts."""

    @property
    def base_id(self) -> str: ...  # noqa: D102
    @property
    def base_revision(self) -> str | None: ...  # noqa: D102
    @property
    def base_sha256(self) -> str: ...  # noqa: D102
    @property
    def measured_sha256(self) -> tuple[str, ...]: ...  # noqa: D102


class Described(Protocol):
    """What the parts that every card shares are written from (fields as in `CardFacts`)."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def repo_id(self) -> str | None: ...  # noqa: D102
    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def baseline_label(self) -> str: ...  # noqa: D102
    @property
    def report(self) -> ValidationResult | None: ...  # noqa: D102
    @property
    def source(self) -> SourceCard: ...  # noqa: D102
    @property
    def override_reason(self) -> str: ...  # noqa: D102
    @property
    def failed_gates(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def links(self) -> tuple[tuple[str, str], ...]: ...  # noqa: D102
    @property
    def licence_file(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class CardFacts:
    """What one card is written from.

    Attributes:
        name: the title: the repository's name, or the folder's. target: what commands load: "ORG/NAME" or "./NAME".
        label: the artifact in tables ("Int4", "NF4"); baseline_label: the source ("BF16").
        licence_file: its name in the artifact, or "".
        links: (format, repository) of the same weights elsewhere.
    """

    name: str
    target: str
    repo_id: str | None
    label: str
    baseline_label: str
    made: Made
    config: dict[str, Any]
    inspected: InspectResult
    report: ValidationResult | None
    profile: CardProfile | None
    source: SourceCard
    override_reason: str
    has_chat_template: bool
    licence_file: str
    links: tuple[tuple[str, str], ...] = ()

    @property
    def model_type(self) -> str:
        """`model_type` of config.json."""
        return str(self.config.get("model_type", ""))

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """Names of the gates of the report that failed."""
        return tuple(gate.name for gate in self.report.gates if not gate.passed) if self.report else ()


@dataclass(frozen=True)
class Told:
    """What a card is told rather than finds: the source's metadata, the target, an override, other repositories."""

    source: SourceCard
    repo_id: str | None = None
    override_reason: str = ""
    links: tuple[tuple[str, str], ...] = ()


def gather_facts(folder: Path, told: Told) -> CardFacts:
    """Read an artifact and the evidence in it.

    Errors: InputError when it is no artifact of `gptq` or `bnb`, when any of the files is damaged, or when a report or
    profile measured other weights.
    """
    made = read_made(folder)
    report, profile = read_evidence(folder, made)
    config = read_config(folder)
    name = told.repo_id.split("/")[-1] if told.repo_id else folder.resolve().name
    return CardFacts(
        name=name,
        target=told.repo_id or f"./{name}",
        repo_id=told.repo_id,
        label=_label(made),
        baseline_label=baseline_label(report, config),
        made=made,
        config=config,
        inspected=inspect_path(folder),
        report=report,
        profile=profile,
        source=told.source,
        override_reason=told.override_reason or (report.override_reason if report else ""),
        has_chat_template=has_chat_template(folder, config),
        licence_file=licence_file(folder),
        links=told.links,
    )


def baseline_label(report: ValidationResult | None, config: dict[str, Any]) -> str:
    """What the source is called in tables: its width, or what the report's baseline was."""
    if report is not None and report.baseline_kind != "16-bit":
        return report.baseline_kind
    return _WIDTHS.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), "16-bit")


def read_evidence(folder: Path, made: Made) -> tuple[ValidationResult | None, CardProfile | None]:
    """The report and the profile in an artifact, each None where there is none.

    Errors: InputError when one is damaged or is of other weights.
    """
    report = profile = None
    if (folder / JSON_FILE).exists():
        report = read_report(folder / JSON_FILE)
        check_report(folder / JSON_FILE, report, made)
    if (folder / PROFILE_FILE).exists():
        profile = read_card_profile(
            folder / PROFILE_FILE, weights_sha256_of(made.output_sha256), weights_sha256_of(made.source_sha256)
        )
    return report, profile


def check_report(path: Path, report: ValidationResult, made: Manifest) -> None:
    """InputError when `report` measured other weights, or compared them with another baseline than their source."""
    again = "qwen-quant validate ARTIFACT --baseline MODEL --report DIR"
    if report.quantized_sha256 not in made.measured_sha256:
        measured = report.quantized_sha256[:16] or "of which it does not say the hash"
        raise InputError(f"{path} is the report of another artifact", f"it measured weights {measured}", again)
    source = made.base_sha256
    if report.baseline_kind == "16-bit" and source and report.baseline_sha256 != source:
        raise InputError(
            f"{path} compares with another model than the source of this artifact",
            f"its baseline has the weights {report.baseline_sha256[:16]}, the source has {source[:16]}",
            again,
        )


def read_made(folder: Path) -> Made:
    """The manifest of an artifact, typed.

    Errors: InputError when the folder has none, it is damaged, or it is of something else than a quantized model.
    """
    manifest = read_manifest(folder)
    method = manifest.get("method")
    if method not in METHODS:
        step = "quantize first: qwen-quant gptq or qwen-quant bnb"
        raise InputError(f"{folder} is no quantized artifact", f"{MANIFEST_FILE} says method {method!r}", step)
    try:
        return typed_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder / MANIFEST_FILE} is damaged", why, "quantize the source again") from error


def typed_manifest(manifest: dict[str, Any]) -> Made:
    """The manifest of a quantization as `Made` (KeyError, TypeError or ValueError where it is damaged)."""
    method = str(manifest["method"])
    source, audit, measured = manifest["source"], manifest["audit"], manifest["measured"]
    linears = manifest["linears" if method == "bitsandbytes" else "layers"]
    compute = manifest.get("compute")
    experts = manifest.get("experts", {})
    return Made(
        method=method,
        config=_settings(BnbConfig if method == "bitsandbytes" else GPTQConfig, manifest["settings"]),
        calibration=_calibration(manifest["calibration"]) if "calibration" in manifest else None,
        source_id=str(source["id"]),
        revision=None if source["revision"] is None else str(source["revision"]),
        source_sha256={str(name): str(value) for name, value in source["sha256"].items()},
        output_sha256=dict(manifest["output"]["sha256"]),
        quantized=int(audit["quantized"]),
        kept={str(name): str(why) for name, why in audit["kept"].items()},
        kinds=_kinds([str(linear["name"]) for linear in linears]),
        worst=_worst(linears) if method != "bitsandbytes" else None,
        experts=tuple((str(how), int(count)) for how, count in experts.get("calibrated_by", {}).items()),
        fewest_tokens=int(experts.get("fewest_routed_tokens", 0)),
        compute=(str(compute["device"]), str(compute["dtype"])) if compute else None,
        max_shard_size_bytes=_optional_int(manifest.get("max_shard_size_bytes")),
        versions={str(name): str(version) for name, version in manifest["versions"].items()},
        warnings=tuple(str(line) for line in manifest["warnings"]),
        seconds=float(measured["wall_seconds"]),
        peak_memory_bytes=int(measured["peak_memory_bytes"]),
    )


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def _settings(cls: type, values: dict[str, Any]) -> Any:
    """The settings as their frozen config; keys of a later version are no reason to refuse."""
    known = {field.name for field in fields(cls)}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known}
    return cls(**given)


def _calibration(values: dict[str, Any]) -> Calibration:
    rows, seq_len = values["shape"]
    return Calibration(
        str(values["source"]),
        str(values["sha256"]),
        int(rows),
        int(seq_len),
        int(values["tokens"]),
        int(values["seed"]),
    )


def _kinds(names: list[str]) -> tuple[tuple[str, int], ...]:
    """Linears by their place in a block: "self_attn.q_proj", "mlp.experts.*.up_proj"."""
    found = Counter(_EXPERT.sub(".experts.*.", _PLACE_IN_BLOCK.sub("", name, count=1)) for name in names)
    return tuple(found.items())


def _worst(layers: list[dict[str, Any]]) -> tuple[str, float, float] | None:
    rows = [(str(row["name"]), float(row["relative_error"]), float(row["rounding_error"])) for row in layers]
    return max(rows, key=lambda row: row[1], default=None)


def _label(made: Made) -> str:
    if isinstance(made.config, GPTQConfig):
        return f"Int{made.config.bits}"
    return {"nf4": "NF4", "fp4": "FP4", "int8": "Int8"}[made.config.quant_type]


def has_chat_template(folder: Path, config: dict[str, Any]) -> bool:
    """Whether apply_chat_template works: a template file, one in tokenizer_config.json, or a first-generation model."""
    if (folder / "chat_template.jinja").is_file() or config.get("model_type") == "qwen":
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and b'"chat_template"' in settings.read_bytes()
