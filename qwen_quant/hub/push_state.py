"""What an interrupted push leaves for the next one: `.{DIR}.push.json` beside the artifact, never inside it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_quant.resume import write_json_atomically

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingPush:
    """A push that was about to commit: the hub's history after `parent` says whether it did.

    Attributes:
        ident: its push id, which stands for target and content.
        parent: head of the branch when the commit was tried.
    """

    ident: str
    parent: str | None


def state_path(folder: Path) -> Path:
    """Where the state of pushes of `folder` lies."""
    whole = folder.resolve()
    return whole.parent / f".{whole.name}.push.json"


def read_pending(folder: Path, ident: str) -> PendingPush | None:
    """The unfinished push with this id, None without one (a damaged state counts as none: the hub is asked)."""
    try:
        found = PendingPush(**json.loads(state_path(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.ident == ident else None


def write_pending(folder: Path, pending: PendingPush) -> None:
    """Record it durably; a place that cannot be written to costs only the shortcut."""
    try:
        write_json_atomically(state_path(folder), asdict(pending))
    except OSError as error:
        _LOG.warning("no record of this push beside %s: %s", folder, error.strerror)


def clear_pending(folder: Path) -> None:
    """The push is finished."""
    try:
        state_path(folder).unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("%s stays behind: %s", state_path(folder), error.strerror)
