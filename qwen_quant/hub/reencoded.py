"""The manifest of an export or a conversion, typed: the same numbers as another folder's, in another form.

Such a folder has no figures of its own. Its quality is that of the artifact whose codes it holds, so a report counts
for it that measured these weights, or those that they were re-encoded from, however many steps back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from qwen_quant.checkpoint.families import read_config
from qwen_quant.checkpoint.identity import EXPORT_SUFFIXES, weights_sha256_of
from qwen_quant.checkpoint.manifest import MANIFEST_FILE, read_manifest
from qwen_quant.errors import InputError
from qwen_quant.hub.card_facts import METHODS, Made, typed_manifest
from qwen_quant.hub.export_table import HUB_FORMATS

EXPORT, CONVERT = "export", "convert"
REENCODED = (EXPORT, CONVERT)


@dataclass(frozen=True)
class Difference:
    """What reading back found: how much was compared and by which library, and the largest difference."""

    linears: int
    weights: int
    largest: float
    kept_tensors: int
    kept_largest: float
    read_with: str


@dataclass(frozen=True)
class Reencoded:
    """The manifest.

    Attributes:
        method: EXPORT or CONVERT. format: of `export`; "" for a conversion.
        source_id, revision: of the folder that it was made from.
        bits, group_size, sym, act_order: of the codes; bits 16 and the rest 0 or False for a 16-bit conversion.
        exact: every number is the source's. inexact: (what, why) where it is not.
        compared: the proof of an export; logits: that of a conversion (tokens, largest difference).
        notes: what somebody who loads it should know, in the tool's words.
        weights_sha256: of these files. measured_sha256: of these and of all that they were re-encoded from.
        origin: how the weights were quantized; None where that was another tool, or they are not quantized.
        max_shard_size_bytes: of files, None where not known; split_bytes: of a GGUF that was split, None for one file.
        files: names of all files. source_files_sha256: see `manifest.files_sha256` ("" for a source without manifest).
    """

    method: str
    format: str
    source_id: str
    revision: str | None
    bits: int
    group_size: int
    sym: bool
    act_order: bool
    exact: bool
    inexact: tuple[tuple[str, str], ...]
    compared: Difference | None
    logits: tuple[int, float] | None
    rest: str | None
    notes: tuple[str, ...]
    weights_sha256: str
    measured_sha256: tuple[str, ...]
    origin: Made | None
    versions: dict[str, str]
    files: tuple[str, ...]
    source_files_sha256: str
    max_shard_size_bytes: int | None
    split_bytes: int | None

    @property
    def quantized(self) -> bool:
        """Whether there are codes at all."""
        return self.bits < 16

    @property
    def label(self) -> str:
        """The codes in a table: "Int4", or "16-bit"."""
        return f"Int{self.bits}" if self.quantized else "16-bit"

    @property
    def base_id(self) -> str:
        """Id of what was quantized first, as far back as is known."""
        return self.origin.source_id if self.origin else self.source_id

    @property
    def base_revision(self) -> str | None:
        """Its commit."""
        return self.origin.revision if self.origin else self.revision

    @property
    def base_sha256(self) -> str:
        """`weights_sha256` of it ("" where it is not known)."""
        return weights_sha256_of(self.origin.source_sha256) if self.origin else ""


def own_data_files(folder: Path) -> tuple[str, ...]:
    """Files that the manifest names and that are its format's own: OpenVINO's .bin holds numbers and is no pickle."""
    manifest = read_manifest(folder)
    row = HUB_FORMATS.get(str(manifest.get("format"))) if manifest.get("method") == EXPORT else None
    patterns = row.own if row is not None else ()
    return tuple(
        name for name in manifest["output"]["sha256"] if any(PurePath(name).match(pattern) for pattern in patterns)
    )


def is_reencoded(manifest: dict[str, Any]) -> bool:
    """Whether the manifest is of an export or a conversion."""
    return manifest.get("method") in REENCODED


def read_reencoded(folder: Path) -> Reencoded:
    """The manifest of an export or a conversion (InputError when it is of something else, or damaged)."""
    manifest = read_manifest(folder)
    if not is_reencoded(manifest):
        raise InputError(
            f"{folder} is neither an export nor a conversion", next_step="give what qwen-quant export wrote"
        )
    name = manifest.get("format", "")
    if manifest["method"] == EXPORT and name not in HUB_FORMATS:
        step = "use the version of qwen-quant that wrote it"
        raise InputError(f"{folder / MANIFEST_FILE} names the format {name!r}", "this version does not know it", step)
    try:
        return _export(manifest) if manifest["method"] == EXPORT else _conversion(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder / MANIFEST_FILE} is damaged", why, "make the folder again") from error


def _export(manifest: dict[str, Any]) -> Reencoded:
    source, proof, grid = manifest["source"], manifest["proof"], manifest["quantization"]
    hashes: dict[str, str] = manifest["output"]["sha256"]
    own = weights_sha256_of(hashes, EXPORT_SUFFIXES)
    compared = Difference(
        int(proof["linears"]),
        int(proof["weights"]),
        float(proof["max_abs_difference"]),
        int(proof["kept_tensors"]),
        float(proof["kept_max_abs_difference"]),
        str(manifest["read_with"]),
    )
    return Reencoded(
        method=EXPORT,
        format=str(manifest["format"]),
        source_id=str(source["id"]),
        revision=source["revision"],
        bits=int(grid["bits"]),
        group_size=int(grid["group_size"]),
        sym=bool(grid["sym"]),
        act_order=bool(grid["act_order"]),
        exact=bool(manifest["exact"]),
        inexact=tuple((str(row["what"]), str(row["why"])) for row in manifest["inexact"]),
        compared=compared,
        logits=None,
        rest=manifest.get("rest"),
        notes=tuple(str(note) for note in manifest["notes"]),
        weights_sha256=own,
        measured_sha256=tuple(dict.fromkeys((own, *_measured(source)))),
        origin=_origin(source.get("manifest")),
        versions={str(name): str(version) for name, version in manifest["versions"].items()},
        files=tuple(hashes),
        source_files_sha256=str(source.get("files_sha256", "")),
        max_shard_size_bytes=manifest.get("max_shard_size_bytes"),
        split_bytes=manifest.get("split_bytes"),
    )


def _measured(source: dict[str, Any]) -> list[str]:
    """Hashes of the weights that a re-encoded folder came from, nearest first."""
    found, at = [], source
    while at:
        found.append(str(at.get("weights_sha256") or weights_sha256_of(at.get("sha256", {}))))
        inner = at.get("manifest") or {}
        at = inner["source"] if is_reencoded(inner) else {}
    return [value for value in found if value]


def _origin(manifest: dict[str, Any] | None) -> Made | None:
    """How the weights were quantized: the first manifest, through exports of exports, that is of a quantization."""
    while manifest is not None and is_reencoded(manifest):
        manifest = manifest["source"].get("manifest")
    return typed_manifest(manifest) if manifest is not None and manifest.get("method") in METHODS else None


def _conversion(folder: Path, manifest: dict[str, Any]) -> Reencoded:
    """Of `convert`: the names of tensors changed, and no number."""
    source, hashes = manifest["source"], manifest["output"]["sha256"]
    settings = read_config(folder).get("quantization_config") or {}
    own, logits = weights_sha256_of(hashes), manifest["proof"]["logits"]
    return Reencoded(
        method=CONVERT,
        format="",
        source_id=str(source["id"]),
        revision=source["revision"],
        bits=int(settings.get("bits", 16)),
        group_size=int(settings.get("group_size", 0)),
        sym=bool(settings.get("sym", False)),
        act_order=bool(settings.get("desc_act", False)),
        exact=float(logits["largest_difference"]) <= float(logits["tolerance"]),
        inexact=(),
        compared=None,
        logits=(int(logits["tokens"]), float(logits["largest_difference"])),
        rest=None,
        notes=tuple(str(line) for line in manifest["warnings"]),
        weights_sha256=own,
        measured_sha256=tuple(dict.fromkeys((own, *_measured(source)))),
        origin=_origin(source.get("manifest")),
        versions={str(name): str(version) for name, version in manifest["versions"].items()},
        files=tuple(hashes),
        source_files_sha256="",
        max_shard_size_bytes=None,
        split_bytes=None,
    )
