"""What a card of ours keeps of itself, in one comment of README.md, and what can be asked of a new one."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_quant.errors import InputError
from qwen_quant.hub.card_facts import Told
from qwen_quant.hub.card_marks import read_text
from qwen_quant.hub.card_source import SourceCard
from qwen_quant.hub.card_words import LANGUAGES
from qwen_quant.hub.download import HUB_ID

CARD_FILE = "README.md"
BOTH = "both"
CHOICES = (*LANGUAGES, BOTH)
_OURS = re.compile(r"^<!-- qwen-quant:card (\{.*\}) -->\r?$", re.MULTILINE)


@dataclass(frozen=True)
class CardState:
    """What a card keeps of itself: language, repository, override, the source's metadata, the other repositories."""

    language: str
    repo: str | None
    override: str
    source: SourceCard
    links: tuple[tuple[str, str], ...] = ()

    @property
    def told(self) -> Told:
        """What the facts of the card are told."""
        return Told(self.source, self.repo, self.override, self.links)


@dataclass(frozen=True)
class CardRequest:
    """What is asked for; None: as the card that is there says, or the default.

    Attributes:
        language: "en", "zh" or "both". repo_id, base_model: "ORG/NAME".
        override_reason: why failed gates are overridden ("": what the report says).
        force: move a stranger's README.md into the marked place.
        links: (format, repository) of the same weights elsewhere.
        like: an artifact whose card knows the source's metadata, for an export of it.
    """

    language: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    override_reason: str = ""
    force: bool = False
    links: tuple[tuple[str, str], ...] | None = None
    like: Path | None = None


def check_request(request: CardRequest) -> None:
    """Refuse a language or repository that is none (InputError)."""
    if request.language is not None and request.language not in CHOICES:
        raise InputError(f"the card's language is {request.language!r}", next_step=f"use one of {', '.join(CHOICES)}")
    for option, value in (("--repo", request.repo_id), ("--base-model", request.base_model)):
        match = HUB_ID.fullmatch(value) if value is not None else None
        if value is not None and (match is None or match["revision"] is not None):
            raise InputError(f"{option} {value!r} is not a repository", next_step=f"write {option} ORG/NAME")


def read_state(path: Path) -> CardState | None:
    """What a card keeps of itself; None where there is no card of ours."""
    return parse_state(read_text(path)) if path.is_file() else None


def state_json(state: CardState) -> str:
    """The state in one line that cannot end an HTML comment: hyphens and angle brackets are escapes."""
    values = {**asdict(state), "source": asdict(state.source)}
    if not state.links:
        del values["links"]
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    return text.replace("-", "\\u002d").replace(">", "\\u003e").replace("<", "\\u003c")


def parse_state(text: str) -> CardState | None:
    """What a card of ours keeps of itself; None where the text is none.

    Errors: InputError when the comment is there and damaged.
    """
    match = _OURS.search(text)
    if match is None:
        return None
    try:
        values: dict[str, Any] = json.loads(match[1])
        source: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else str(v) for k, v in values["source"].items()}
        repo = None if values["repo"] is None else str(values["repo"])
        links = tuple((str(name), str(target)) for name, target in values.get("links", []))
        state = CardState(str(values["language"]), repo, str(values["override"]), SourceCard(**source), links)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        step = "rename README.md and run qwen-quant card again"
        raise InputError("the comment 'qwen-quant:card' of README.md is damaged", str(error), step) from error
    check_request(CardRequest(state.language, state.repo, state.source.base_model or None))
    return state
