"""release.json as Markdown, for the summary of a CI job: python scripts/release_summary.py release-work/release.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Rows = list[tuple[str, ...]]


def table(title: str, columns: tuple[str, ...], rows: Rows) -> str:
    """A titled Markdown table; "" where there is no row. A "|" in a cell is escaped."""
    if not rows:
        return ""
    lines = [columns, tuple("---" for _ in columns), *rows]
    cells = ("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
    return f"### {title}\n\n" + "\n".join(cells) + "\n"


def number(value: float | None, digits: int = 4) -> str:
    """A figure, or a dash where it is not a number."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(value: dict[str, float | None]) -> str:
    """The estimate with its 95% interval."""
    return f"{number(value['estimate'])} ({number(value['low'])} to {number(value['high'])})"


def stage_rows(stages: list[dict[str, Any]]) -> Rows:
    """One row a stage."""
    return [
        (s["name"], s["status"], "-" if s["seconds"] is None else f"{s['seconds']:.1f} s", s["summary"] or s["reason"])
        for s in stages
    ]


def quality_rows(figures: dict[str, Any]) -> Rows:
    """One row a text."""
    return [
        (name, interval(row["kl_mean"]), interval(row["perplexity_ratio"]), interval(row["top1_agreement"]))
        for name, row in figures.get("texts", {}).items()
    ]


def task_rows(figures: dict[str, Any]) -> Rows:
    """One row a task."""
    return [(name, number(pair[0], 3), number(pair[1], 3)) for name, pair in figures.get("tasks", {}).items()]


def gate_rows(figures: dict[str, Any]) -> Rows:
    """One row a gate."""
    return [
        (gate["name"], number(gate["value"]), f"{gate['limit']:g}", "passed" if gate["passed"] else "FAILED")
        for gate in figures.get("gates", [])
    ]


def speed_rows(figures: dict[str, Any]) -> Rows:
    """One row a model and cell."""
    return [
        (model, cell, f"{value:.2f}" if isinstance(value, float) else str(value))
        for model, cells in figures.get("tokens_per_second", {}).items()
        for cell, value in cells.items()
    ]


def repository_rows(figures: dict[str, Any]) -> Rows:
    """One row a repository: of the artifact, then of each format."""
    rows = [{"format": "", **figures}, *figures.get("formats", [])] if figures else []
    return [(row["format"] or "artifact", row["repo"], row["outcome"], row["commit"] or "-") for row in rows]


def summary(document: dict[str, Any]) -> str:
    """The whole page."""
    figures = {stage["name"]: stage["figures"] for stage in document["stages"]}
    error = document["error"]
    state = "complete" if document["complete"] else "stopped"
    parts = [f"## Release of {document['model']}: {state}\n"]
    if error:
        parts.append(f"**{error['what']}**: {error['why']}\n\nnext: {error['next_step']}\n")
    validate, gate, profile = (figures.get(name, {}) for name in ("validate", "gate", "profile"))
    parts += [
        table("Stages", ("stage", "status", "time", ""), stage_rows(document["stages"])),
        table("Repositories", ("", "repository", "", "commit"), repository_rows(figures.get("push", {}))),
        table("Gates", ("gate", "value", "limit", ""), gate_rows(gate)),
        table("Texts", ("text", "KL divergence", "perplexity ratio", "top-1 agreement"), quality_rows(validate)),
        table("Tasks", ("task", "source", "quantized"), task_rows(validate)),
        table("Speed", ("model", "context + new tokens", "tokens per second"), speed_rows(profile)),
    ]
    return "\n".join(part for part in parts if part)


def main() -> None:
    path = Path(sys.argv[1])
    if not path.is_file():
        print(f"there is no {path}: the release did not begin")
        return
    print(summary(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
