"""`qwen-quant card`: the model card of an artifact, from its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, show

Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="folder that gptq, bnb, export or convert wrote")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="report.json of validate, to copy into ARTIFACT")
]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", metavar="FILE", help="profile.json of profile, to copy into ARTIFACT")
]
Repo = Annotated[
    str | None, typer.Option("--repo", metavar="ORG/NAME", help="repository that the card's commands load (the folder)")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ORG/NAME", help="hub id of the source, where it was a local folder"),
]
Language = Annotated[
    Literal["en", "zh", "both"] | None, typer.Option("--card-language", help="language of the card (en)")
]


def card(
    artifact: Artifact,
    report: ReportFile = None,
    profile: ProfileFile = None,
    repo: Repo = None,
    base_model: BaseModel = None,
    card_language: Language = None,
    force: Annotated[
        bool, typer.Option("--force", help="keep the text of a README.md that is no card in its marked place")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the model card (README.md) of an artifact or export, every number from its report, profile and manifest.

    The report and the profile must be of these very weights (an export takes the report of the artifact whose codes it
    has); they are copied into ARTIFACT, and the manifest is given the hashes of all three. What is not measured is left
    out. Text between the marked comments of README.md survives, and options that are not given stay as the card that is
    there has them. docs/card.md says what comes from where.

    \b
    Examples:
      qwen-quant card ./Qwen2.5-7B-Int4 --report report/report.json --profile profile/profile.json
      qwen-quant card ./Qwen2.5-7B-Int4 --repo me/Qwen2.5-7B-Int4 --base-model Qwen/Qwen2.5-7B --card-language both
      qwen-quant card ./Qwen2.5-7B-gguf --report ./Qwen2.5-7B-Int4/report.json --repo me/Qwen2.5-7B-GGUF
      qwen-quant card ./out --json
    """
    output = Output(json=json, quiet=quiet)
    from qwen_quant.hub.card import add_evidence, card_problems, make_card
    from qwen_quant.hub.card_state import CardRequest

    copied = add_evidence(artifact, report=report, profile=profile)
    request = CardRequest(card_language, repo_id=repo, base_model=base_model, force=force)
    path = make_card(artifact, request)
    problems = card_problems(artifact)
    data = {"card": path, "copied": copied, "problems": problems}
    parts = [f"card: {path}", *(f"copied: {artifact / name}" for name in copied)]
    parts += [f"not ready to publish: {problem}" for problem in problems]
    show(Report("card", data, tuple(parts)), output)
