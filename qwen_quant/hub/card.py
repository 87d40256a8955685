"""The model card (README.md) of an artifact: written from its evidence, and checked against it.

A card is a function of the evidence, of what is kept in its comment `<!-- qwen-quant:card {...} -->` (language, target,
what the source's own card said, an override's reason) and of the text that people wrote between the marks. So writing
it again changes nothing unless one of those changed, and `card_problems` can say what in an existing card is not true.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen_quant.checkpoint.identity import weights_sha256_of
from qwen_quant.checkpoint.manifest import SEALABLE, read_manifest, seal
from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.errors import InputError
from qwen_quant.evaluation.report import JSON_FILE, read_report
from qwen_quant.hub.card_facts import (
    PROFILE_FILE,
    CardFacts,
    Made,
    Manifest,
    Told,
    check_report,
    gather_facts,
    read_made,
)
from qwen_quant.hub.card_made import (
    glance_section,
    how_section,
    intro_section,
    limits_section,
    links_section,
    provenance_section,
    what_section,
)
from qwen_quant.hub.card_markdown import escape
from qwen_quant.hub.card_marks import PLACES, kept_texts, place, read_text
from qwen_quant.hub.card_metadata import metadata_yaml
from qwen_quant.hub.card_names import name_evidence
from qwen_quant.hub.card_profile import read_card_profile
from qwen_quant.hub.card_quality import failed_gates_notice, quality_section
from qwen_quant.hub.card_run import use_section
from qwen_quant.hub.card_source import SourceCard, cached_readme, read_source_card, with_licence
from qwen_quant.hub.card_speed import speed_sections
from qwen_quant.hub.card_state import (
    BOTH,
    CARD_FILE,
    CardRequest,
    CardState,
    check_request,
    parse_state,
    read_state,
    state_json,
)
from qwen_quant.hub.card_words import LANGUAGE_NAMES, LANGUAGES
from qwen_quant.hub.download import HUB_ID
from qwen_quant.hub.export_card import EXPORT_AFTER, EXPORT_BEFORE, export_metadata
from qwen_quant.hub.export_facts import ExportFacts, gather_export_facts
from qwen_quant.hub.reencoded import Reencoded, is_reencoded, read_reencoded

_FRONT = re.compile(r"\A\ufeff?---\r?\n.*?^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
Facts = CardFacts | ExportFacts
BEFORE: tuple[Callable[[CardFacts, str], list[str]], ...] = (failed_gates_notice, intro_section)
AFTER: tuple[Callable[[CardFacts, str], list[str]], ...] = (
    glance_section,
    use_section,
    links_section,
    quality_section,
    speed_sections,
    what_section,
    how_section,
    limits_section,
    provenance_section,
)


def write_card(folder: Path, *, repo_id: str | None, language: str, override_reason: str = "") -> Path:
    """Write README.md of an artifact from the evidence in it, and seal card and evidence into its manifest.

    Args:
        folder: the artifact; report.json and profile.json in it are used where they are.
        repo_id: "ORG/NAME" that commands shall load; None: what the card that is there says, else the folder.
        language: "en", "zh" or "both".
        override_reason: why it is published although a gate failed ("": what the report says).

    Returns the path of README.md. Text between the marks survives byte for byte.

    Errors: InputError when the folder is no artifact, its evidence is damaged or of other weights, or README.md was not
    written by this tool.
    """
    return make_card(folder, CardRequest(language, repo_id, override_reason=override_reason))


def make_card(folder: Path, request: CardRequest) -> Path:
    """`write_card` with everything that can be asked for."""
    check_request(request)
    path = folder / CARD_FILE
    made = read_any(folder)
    earlier, kept = _earlier(path, request)
    state = _state(folder, made, earlier, request)
    name_evidence(folder)
    facts = gather(folder, state.told)
    override = facts.override_reason if facts.failed_gates else ""
    text = card_text(facts, replace(state, override=override), kept)
    _replace(path, text.encode("utf-8", "surrogateescape"))
    seal(folder, [name for name in SEALABLE if (folder / name).is_file()])
    return path


def read_any(folder: Path) -> Made | Reencoded:
    """The manifest of any folder that can have a card. Errors: InputError when it is none, or damaged."""
    return read_reencoded(folder) if is_reencoded(read_manifest(folder)) else read_made(folder)


def gather(folder: Path, told: Told) -> Facts:
    """What the card of `folder` is written from (InputError as `gather_facts` and `gather_export_facts`)."""
    if is_reencoded(read_manifest(folder)):
        return gather_export_facts(folder, told)
    return gather_facts(folder, told)


def add_evidence(folder: Path, *, report: Path | None = None, profile: Path | None = None) -> tuple[str, ...]:
    """Copy a report.json or profile.json into an artifact after checking that it is of these weights.

    Returns the names that were written. Errors: InputError when one is damaged or of another artifact; nothing is
    copied then.
    """
    made = read_any(folder)
    if report is not None:
        check_report(report, read_report(report), made)
    if profile is not None:
        if isinstance(made, Reencoded):
            why = "a profile measures one runtime with one format"
            raise InputError(f"{folder} takes no profile", why, "put it into the artifact that was measured")
        read_card_profile(profile, weights_sha256_of(made.output_sha256), weights_sha256_of(made.source_sha256))
    given = {name: path for name, path in ((JSON_FILE, report), (PROFILE_FILE, profile)) if path is not None}
    for name, path in given.items():
        if path.resolve() != (folder / name).resolve():
            _replace(folder / name, path.read_bytes())
    return tuple(given)


def card_text(facts: Facts, state: CardState, kept: dict[str, str]) -> str:
    """The whole README.md; lone surrogates in it are bytes of kept text that are not UTF-8.

    Errors: InputError when `kept` holds a place that a card in this language does not have.
    """
    languages = LANGUAGES if state.language == BOTH else (state.language,)
    homeless = [name for name in kept if name not in {f"{p}-{language}" for p in PLACES for language in languages}]
    if homeless:
        raise InputError(
            f"the card has hand-written text in '{homeless[0]}'",
            f"a card in the language '{state.language}' has no such place",
            f"use --card-language {BOTH}, or move the text to another marked place of README.md",
        )
    several = len(languages) > 1
    metadata = export_metadata(facts) if isinstance(facts, ExportFacts) else metadata_yaml(facts)
    parts = [f"---\n{metadata}\n---", f"<!-- qwen-quant:card {state_json(state)} -->"]
    parts.append(f"# {escape(facts.name)}")
    if several:
        parts.append(" | ".join(f"[{LANGUAGE_NAMES[one]}](#{LANGUAGE_NAMES[one].lower()})" for one in languages))
    for language in languages:
        parts += [f"## {LANGUAGE_NAMES[language]}"] if several else []
        body = _body(facts, language, kept)
        parts += [_deeper(part) for part in body] if several else body
    return "\n\n".join(parts) + "\n"


def card_problems(folder: Path) -> list[str]:
    """What is missing or untrue in an artifact's card, one line each; [] where it can be published.

    The card is written again in memory from the evidence and compared. That the weights still are what the manifest
    says is not looked at here (`qwen-quant verify`).
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return ["there is no README.md: run qwen-quant card"]
    text = read_text(path)
    try:
        state = parse_state(text)
        if state is None:
            return ["README.md was not written by qwen-quant card"]
        kept = kept_texts(path, text)
        facts = gather(folder, state.told)
        problems = _differences(card_text(facts, state, kept), text)
        recorded = read_manifest(folder)["output"]["sha256"]
    except InputError as error:
        return [str(error)]
    stale = [
        f"{name} is not the file that the manifest records: run qwen-quant card"
        for name in (CARD_FILE, JSON_FILE, PROFILE_FILE)
        if (folder / name).is_file() and recorded.get(name) != file_sha256(folder / name)
    ]
    return [*problems, *stale, *_missing(facts)]


def _missing(facts: Facts) -> list[str]:
    """What a card for publication should have and this one cannot."""
    found = []
    if facts.report is None and not (isinstance(facts, ExportFacts) and not facts.made.quantized):
        found.append("there is no report.json: run qwen-quant validate, then qwen-quant card --report FILE")
    if not facts.source.base_model:
        found.append("the source's id on the Hub is not known: qwen-quant card --base-model ORG/NAME")
    if not facts.source.license:
        found.append("the licence is not known: put the source's LICENSE into the folder and run qwen-quant card again")
    if facts.failed_gates and not facts.override_reason:
        found.append(f"the gate '{facts.failed_gates[0]}' failed and no reason is given for publishing all the same")
    return found


def _body(facts: Facts, language: str, kept: dict[str, str]) -> list[str]:
    """Every section of the card in one language, with its two marked places."""
    before: list[str] = []
    after: list[str] = []
    if isinstance(facts, ExportFacts):
        before = [part for export in EXPORT_BEFORE for part in export(facts, language)]
        after = [part for export in EXPORT_AFTER for part in export(facts, language)]
    else:
        before = [part for section in BEFORE for part in section(facts, language)]
        after = [part for section in AFTER for part in section(facts, language)]
    return [*before, place(f"{PLACES[0]}-{language}", kept), *after, place(f"{PLACES[1]}-{language}", kept)]


def _deeper(part: str) -> str:
    """A heading one level down, under its language's own; anything else as it is."""
    return f"#{part}" if part.startswith("#") else part


def _earlier(path: Path, request: CardRequest) -> tuple[CardState | None, dict[str, str]]:
    """(what the card that is there keeps of itself, its hand-written text)."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} cannot be written", "it is a link or a folder", "move it away")
    if not path.is_file():
        return None, {}
    text = read_text(path)
    state = parse_state(text)
    if state is not None:
        return state, kept_texts(path, text)
    if not request.force:
        raise InputError(
            f"{path} was not written by qwen-quant",
            "its text would be lost",
            f"rename it, or run qwen-quant card {path.parent} --force: its text then goes into the marked place at the "
            "end, its metadata is dropped",
        )
    language = LANGUAGES[1] if request.language == LANGUAGES[1] else LANGUAGES[0]
    body = _FRONT.sub("", text, count=1)
    if kept_texts(path, body):
        raise InputError(
            f"{path} holds marks of a card", "but not the comment of one", "rename it and start a new card"
        )
    return None, {f"{PLACES[1]}-{language}": body} if body.strip() else {}


def _state(folder: Path, made: Manifest, earlier: CardState | None, request: CardRequest) -> CardState:
    """What the new card keeps of itself: what is asked for, else what the earlier one kept, else what is found."""
    like = read_state(request.like / CARD_FILE) if request.like is not None else None
    known = like or earlier
    found = _find_source(folder, made) or (known.source if known else SourceCard())
    base = request.base_model or (known.source.base_model if known else "")
    if not base and HUB_ID.fullmatch(made.base_id):
        base = made.base_id
    source = with_licence(replace(found, base_model=base), folder)
    return CardState(
        language=request.language or (earlier.language if earlier else LANGUAGES[0]),
        repo=request.repo_id or (earlier.repo if earlier else None),
        override=request.override_reason,  # never an earlier one: it was given for an earlier report
        source=source,
        links=(earlier.links if earlier else ()) if request.links is None else request.links,
    )


def _find_source(folder: Path, made: Manifest) -> SourceCard | None:
    """The source's own card: beside the baseline that the report measured, or in the Hub's cache."""
    places = []
    report = folder / JSON_FILE
    if report.is_file():
        measured = read_report(report)
        if measured.baseline_sha256 and measured.baseline_sha256 == made.base_sha256:
            places.append(Path(measured.baseline) / CARD_FILE)
    cached = cached_readme(made.base_id, made.base_revision) if HUB_ID.fullmatch(made.base_id) else None
    found = [read_source_card(path) for path in [*places, *([cached] if cached else [])]]
    return next((card for card in found if card is not None), None)


def _differences(expected: str, found: str) -> list[str]:
    """Which headings of the card hold lines that the evidence does not give."""
    if expected == found:
        return []
    wanted, had = _by_heading(expected), _by_heading(found)
    names = [name for name in dict.fromkeys([*wanted, *had]) if wanted.get(name) != had.get(name)]
    return [f"'{name}' of README.md is not what the evidence says: run qwen-quant card" for name in names] or [
        "README.md is not what the evidence says: run qwen-quant card"
    ]


def _by_heading(text: str) -> dict[str, list[str]]:
    """Heading -> the lines under it; what stands before the first is "the metadata"."""
    found: dict[str, list[str]] = {}
    name = "the metadata"
    for line in text.splitlines():
        if re.match(r"#{1,4} ", line):
            name = line.lstrip("# ")
        found.setdefault(name, []).append(line)
    return found


def _replace(path: Path, data: bytes) -> None:
    """Write beside `path`, make it durable, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
