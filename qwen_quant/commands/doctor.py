"""`qwen-quant doctor`: what this machine and this installation can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, Table, running, show
from qwen_quant.environment import Environment, inspect_environment
from qwen_quant.results import to_json
from qwen_quant.units import format_bytes

Folder = Annotated[Path, typer.Option("--folder", help="whose free disk space to show")]


def doctor(folder: Folder = Path("."), json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show versions, devices, CPU features, free memory and disk, which extras work, and what is missing.

    \b
    Examples:
      qwen-quant doctor
      qwen-quant doctor --folder /data
      qwen-quant doctor --json
    """
    output = Output(json=json, quiet=quiet)
    with running(output):
        facts = inspect_environment(folder)
    show(Report("doctor", to_json(facts), report_parts(facts)), output)


def report_parts(facts: Environment) -> tuple[str | Table, ...]:
    """The facts as tables, and what is missing as a list."""
    machine = (
        ("system", facts.platform),
        ("CPU", f"{facts.cpu_name}, {facts.cpu_count} usable"),
        *((f"  {name}", "yes" if has else "no") for name, has in facts.cpu_features.items()),
        ("memory free", f"{format_bytes(facts.free_memory_bytes)} of {format_bytes(facts.total_memory_bytes)}"),
        ("disk free", f"{format_bytes(facts.free_disk_bytes)} at {facts.folder}"),
        ("peak memory of this process", format_bytes(facts.peak_memory_bytes)),
    )
    devices = tuple(
        (d.device, d.name, format_bytes(d.free_memory_bytes), "yes" if d.native_bf16 else "no") for d in facts.devices
    )
    versions = (("python", facts.python), *facts.versions.items())
    extras = tuple((e.extra, ", ".join(e.packages), "works" if e.works else e.problem) for e in facts.extras)
    missing = (
        "\n".join(("missing:", *(f"  - {line}" for line in facts.missing))) if facts.missing else "nothing is missing"
    )
    return (
        Table("machine", ("", ""), machine, text_columns=2),
        Table("devices", ("device", "name", "memory free", "native BF16"), devices, text_columns=2),
        Table("versions", ("package", "version"), tuple(versions), text_columns=2),
        Table("extras", ("extra", "packages", "state"), extras, text_columns=3),
        missing,
    )
