"""What the source's own card says and a quantized model inherits: licence, languages, pipeline, tags.

Looked for offline, in this order: what an earlier card of the same folder recorded, the README.md beside the baseline
that the report measured, the Hub's cache. Where none of them names a licence, the LICENSE file in the artifact does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_quant.hub.card_markdown import plain

LICENCE_NAMES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md", "LICENCE.txt", "LICENCE.md")
# Title in the first lines of a licence text -> (license, license_name). The longer titles stand first.
_TITLES = (
    ("tongyi qianwen research license agreement", ("other", "tongyi-qianwen-research")),
    ("tongyi qianwen license agreement", ("other", "tongyi-qianwen")),
    ("qwen research license agreement", ("other", "qwen-research")),
    ("qwen license agreement", ("other", "qwen")),
    ("apache license version 2.0", ("apache-2.0", "")),
    ("mit license", ("mit", "")),
)
_TAG = re.compile(r"[\w .+/-]{1,60}")
_MOST_TAGS = 20


@dataclass(frozen=True)
class SourceCard:
    """Metadata of the source; "" or () is "not known".

    Attributes:
        base_model: the source's id on the Hub. license: as the Hub writes it ("apache-2.0", "other").
        license_name, license_link: of a licence that the Hub has no name for. language: ISO 639 codes.
    """

    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()
    pipeline_tag: str = ""
    tags: tuple[str, ...] = ()


def source_card(data: dict[str, Any]) -> SourceCard:
    """The inheritable part of a card's metadata, whatever else stands in it."""
    text = {key: _word(data.get(key)) for key in ("license", "license_name", "license_link", "pipeline_tag")}
    tags = tuple(tag for tag in _words(data.get("tags")) if _TAG.fullmatch(tag))[:_MOST_TAGS]
    return SourceCard("", language=_words(data.get("language")), tags=tags, **text)


def read_source_card(readme: Path) -> SourceCard | None:
    """The same of a README.md; None where there is none, or it has no metadata that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        data = metadata_load(readme) if readme.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None
    return None if data is None else source_card(data)


def cached_readme(source_id: str, revision: str | None) -> Path | None:
    """The source's README.md in the Hub's cache; None where it is not there or `source_id` is no repository."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source_id, "README.md", revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(found) if isinstance(found, str) else None


def licence_file(folder: Path) -> str:
    """Name of the artifact's licence text ("" where it has none)."""
    return next((name for name in LICENCE_NAMES if (folder / name).is_file()), "")


def with_licence(card: SourceCard, folder: Path) -> SourceCard:
    """`card` with the licence that the artifact's own LICENSE states, where the source's metadata named none."""
    name = licence_file(folder)
    if not name:
        return card
    known = card.license and (card.license != "other" or card.license_name)
    found, title = (card.license, card.license_name) if known else _identify((folder / name).read_bytes())
    link = card.license_link or (name if found == "other" else "")
    return replace(card, license=found, license_name=title, license_link=link)


def _identify(data: bytes) -> tuple[str, str]:
    """(license, license_name) of a licence text; an unknown one is "other", named by its first line."""
    text = data.decode("utf-8", "replace")
    head = re.sub(r"[^a-z0-9.]+", " ", text[:2000].lower())
    for title, names in _TITLES:
        if title in head:
            return names
    first = next((line for line in text.splitlines() if line.strip()), "licence")
    slug = re.sub(r"[^a-z0-9]+", "-", plain(first).lower()).strip("-")
    return "other", slug[:64].rstrip("-") or "see-licence-file"


def _word(value: Any) -> str:
    """One line of text, or the first of a list of them; "" for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    return plain(first) if isinstance(first, str) else ""


def _words(value: Any) -> tuple[str, ...]:
    """Text or a list of it as a tuple; what is no text (YAML's `no` is False) is left out."""
    items = value if isinstance(value, list) else [value]
    return tuple(plain(item) for item in items if isinstance(item, str) and plain(item))
