"""The loopback Hub, proved with huggingface_hub itself: each client is a process of its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest

from tests.loophub import Hub, serve_hub

Mode = Literal["lfs", "xet"]
WEIGHTS = bytes(range(256)) * 400  # 100 KiB with zero bytes: large by its suffix
FILES: dict[str, bytes] = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "sub/notes.txt": b"hello"}


def client(hub: Hub, home: Path, code: str, *, token: str | None = Hub.token, check: bool = True) -> str:
    """Run `code` with an HfApi called `api` in a process of its own; what it printed."""
    prelude = "import sys, json, pathlib\nfrom huggingface_hub import *\napi = HfApi()\n"
    ran = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        env=hub.environment(home, token=token),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if check and ran.returncode:
        raise AssertionError(ran.stderr[-3000:])
    return ran.stdout if check else ran.stdout + ran.stderr


MODES = pytest.mark.parametrize("mode", ["lfs", "xet"])


@MODES
def test_a_folder_goes_up_and_comes_back(tmp_path: Path, mode: Mode) -> None:
    folder = tmp_path / "up"
    (folder / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    with serve_hub(tmp_path / "hub", mode=mode, part_bytes=1 << 15) as hub:
        printed = client(
            hub,
            tmp_path,
            f"""
            api.create_repo("org/name", exist_ok=True)
            api.create_repo("org/name", exist_ok=True)
            print(api.upload_folder(repo_id="org/name", folder_path={str(folder)!r}, commit_message="All").oid)
            print(snapshot_download("org/name", local_dir="down"))
            print(snapshot_download("org/name"))
            """,
        ).split()
        for place in printed[1:]:
            assert {name: (Path(place) / name).read_bytes() for name in FILES} == FILES
        assert [commit.title for commit in hub.commits("org/name")] == ["All", "initial commit"]
        assert hub.commits("org/name")[0].oid == printed[0]
        assert hub.file_bytes("org/name", "main", "model.safetensors") == WEIGHTS
    with serve_hub(tmp_path / "hub", mode=mode) as hub:  # a restart
        assert hub.file_bytes("org/name", printed[0], "model.safetensors") == WEIGHTS
        again = client(hub, tmp_path, f'print(api.upload_folder(repo_id="org/name", folder_path={str(folder)!r}).oid)')
        assert again.strip() == printed[0]  # nothing changed: no commit


@MODES
def test_what_a_test_puts_there_is_downloaded(tmp_path: Path, mode: Mode) -> None:
    """And storage gets no token of the Hub; with Xet the large file skips HTTP, without it is had by range too."""
    with serve_hub(tmp_path / "hub", mode=mode) as hub:
        made = hub.add_repo("org/name", FILES)
        client(hub, tmp_path, 'snapshot_download("org/name", local_dir="down", revision="main")')
        assert {name: (tmp_path / "down" / name).read_bytes() for name in FILES} == FILES
        stored = [line for line in hub.log if line.path.startswith("/storage/")]
        assert len(stored) == (1 if mode == "lfs" else 0) and not any(line.authorized for line in stored)
        assert any("xet-read-token" in path for _, path in hub.requests) == (mode == "xet")
        plain = """
            from huggingface_hub.utils import get_session
            r = get_session().get(hf_hub_url("org/name", "model.safetensors"), headers={"Range": "bytes=1000-1009"})
            print(r.status_code, r.headers["content-range"], r.content.hex())
            info = api.model_info("org/name", files_metadata=True)
            print(info.sha, [s.lfs.sha256 for s in info.siblings if s.lfs], [s.blob_id for s in info.siblings][0])
        """
        printed = client(hub, tmp_path, plain).splitlines()
    assert printed[0] == f"206 bytes 1000-1009/{len(WEIGHTS)} {WEIGHTS[1000:1010].hex()}"
    sha256, blob_id = hashlib.sha256(WEIGHTS).hexdigest(), hashlib.sha1(b"blob 8\0" + b'{"a": 1}').hexdigest()
    assert printed[1] == f"{made.oid} ['{sha256}'] {blob_id}"
