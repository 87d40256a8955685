"""`qwen-quant sign`: an OpenSSF signature over an artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qwen_quant.commands import options
from qwen_quant.console import Output, Report, running, show
from qwen_quant.errors import UsageError

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder of an artifact")]
PrivateKey = Annotated[
    Path | None, typer.Option("--key", metavar="KEY", help="PEM private key (P-256, P-384 or P-521, not encrypted)")
]


def sign(folder: Folder, key: PrivateKey = None, json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Sign every file of an artifact: writes DIR/model.sig, which verify --key and model_signing check.

    The artifact is verified first: what is not as its manifest says is not signed. Needs the extra `sign`.

    \b
    Examples:
      openssl ecparam -name prime256v1 -genkey -noout -out key.pem
      qwen-quant sign ./Qwen2.5-0.5B-Int4 --key key.pem
    """
    output = Output(json=json, quiet=quiet)
    if key is None:
        raise UsageError("--key is missing", next_step="give the PEM private key to sign with: --key KEY")

    from qwen_quant.signing import sign_folder
    from qwen_quant.verify import check_verified, verify_folder

    with running(output) as progress:
        found = verify_folder(folder, progress)
        result = replace(found, problems=tuple(row for row in found.problems if row.kind != "signature"))
        check_verified(result)
        place = sign_folder(folder, key)
    data = {"folder": str(folder), "signature": str(place), "files": len(result.sha256) + 1}
    show(Report("sign", data, (f"{place} signs {len(result.sha256) + 1} files",)), output)
