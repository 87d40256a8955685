"""The loopback Hub, proved with huggingface_hub itself: each client is a process of its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.loophub import Fault, FaultPlan, Hub, serve_hub, serve_modelscope

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


@MODES
def test_commits_guard_their_parent_and_land_on_branches_tags_and_pull_requests(tmp_path: Path, mode: Mode) -> None:
    with serve_hub(tmp_path / "hub", mode=mode) as hub:
        first = hub.add_repo("org/name", FILES).oid
        hub.add_commit("org/name", {"README.md": b"other"}, title="Behind")
        printed = client(
            hub,
            tmp_path,
            f"""
            from huggingface_hub.errors import HfHubHTTPError
            def add(**more):
                operation = CommitOperationAdd("new.safetensors", bytes(3000))
                return api.create_commit("org/name", [operation], commit_message="Mine", **more)
            try:
                add(parent_commit={first!r})
            except HfHubHTTPError as error:
                print(error.response.status_code)
            api.create_branch("org/name", branch="side", revision={first!r})
            print(add(revision="side", parent_commit={first!r}).oid)
            print(add(create_pr=True).pr_revision)
            api.create_tag("org/name", tag="v1", revision="side")
            refs = api.list_repo_refs("org/name", include_pull_requests=True)
            print([b.name for b in refs.branches], [t.name for t in refs.tags], [p.ref for p in refs.pull_requests])
            print([c.title for c in api.list_repo_commits("org/name", revision="side")])
            print(sorted(f.path for f in api.list_repo_tree("org/name", revision="refs/pr/1", recursive=True)))
            api.delete_files("org/name", ["config.json"], revision="side")
            print([f.path for f in api.get_paths_info("org/name", ["config.json", "sub"], revision="side")])
            api.delete_tag("org/name", tag="v1"); api.delete_branch("org/name", branch="side")
            print(api.list_repo_refs("org/name").branches[0].target_commit)
            """,
        ).splitlines()
        side = printed[1]
        assert printed[0] == "412" and printed[2] == "refs/pr/1"
        assert printed[3] == "['main', 'side'] ['v1'] ['refs/pr/1']"
        assert printed[4] == "['Mine', 'initial commit']"
        assert "new.safetensors" in printed[5] and "README.md" in printed[5]
        assert printed[6] == "['sub']"
        assert printed[7] == hub.commits("org/name")[0].oid
        assert [commit.title for commit in hub.commits("org/name")] == ["Behind", "initial commit"]
        assert hub.file_bytes("org/name", side, "new.safetensors") == bytes(3000)


def test_who_may_read_what(hub_of_doors: Hub, tmp_path: Path) -> None:
    cases = [
        ("org/absent", "main", Hub.token, "RepositoryNotFoundError"),
        ("org/absent", "main", False, "RepositoryNotFoundError"),
        ("org/open", "absent", Hub.token, "RevisionNotFoundError"),
        ("org/open", "main", "hf_" + "x" * 34, "Invalid credentials"),
        ("org/open", "main", Hub.expired_token, "is expired"),
        ("org/private", "main", Hub.token, "/config.json"),
        ("org/private", "main", False, "RepositoryNotFoundError"),
        ("org/private", "main", Hub.stranger_token, "RepositoryNotFoundError"),
        ("org/gated", "main", False, "GatedRepoError"),
        ("org/gated", "main", Hub.token, "GatedRepoError"),
        ("org/granted", "main", Hub.token, "/config.json"),
    ]
    code = f"""
        for repo, revision, token, _ in {cases!r}:
            try:
                folder = f"down{{len(repo)}}{{token}}"
                print(hf_hub_download(repo, "config.json", revision=revision, token=token, local_dir=folder))
            except Exception as error:
                print(type(error).__name__, str(error.server_message), str(error).replace(chr(10), " "))
    """
    printed = client(hub_of_doors, tmp_path, code).splitlines()
    for case, line in zip(cases, printed, strict=True):
        assert case[3] in line, case


@pytest.fixture(scope="module")
def hub_of_doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with an open, a private, a gated repository, and a gated one whose terms were accepted."""
    with serve_hub(tmp_path_factory.mktemp("doors"), mode="lfs") as hub:
        hub.add_repo("org/open", FILES)
        hub.add_repo("org/private", FILES, private=True)
        hub.add_repo("org/gated", FILES, gated=True)
        hub.add_repo("org/granted", FILES, gated=True)
        hub.grant("org/granted")
        yield hub


def test_who_may_write_where(hub_of_doors: Hub, tmp_path: Path) -> None:
    code = f"""
        for token in ({Hub.token!r}, {Hub.read_token!r}):
            for repo in ("org/open", "foreign/new", "stranger/new"):
                try:
                    api.create_repo(repo, exist_ok=True, token=token)
                    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo, token=token)
                    print("written")
                except Exception as error:
                    print(error.response.status_code)
    """
    assert client(hub_of_doors, tmp_path, code).split() == ["written", "403", "written", "403", "403", "403"]
    assert not hub_of_doors.exists("foreign/new")


def other_weights(number: int) -> bytes:
    """Large contents that differ, so that each has a storage address of its own."""
    return WEIGHTS + bytes([number])


def test_faults_of_downloads(tmp_path: Path) -> None:
    """What huggingface_hub itself makes of each; a flipped byte it does not notice."""
    outcomes = {"503": "503", "429": "whole", "close": "whole", "cut": "whole", "slow": "whole", "flip": "other"}
    places = [hashlib.sha256(other_weights(number)).hexdigest() for number in range(len(outcomes))]
    faults = [Fault(kind, f"GET /storage/{at}") for kind, at in zip(outcomes, places, strict=True)]  # type: ignore[arg-type]
    with serve_hub(tmp_path / "hub", mode="lfs", faults=FaultPlan(tuple(faults))) as hub:
        hub.add_repo("org/name", {f"{n}.safetensors": other_weights(n) for n in range(len(outcomes))})
        code = f"""
            for n in range({len(outcomes)}):
                try:
                    content = pathlib.Path(hf_hub_download("org/name", f"{{n}}.safetensors")).read_bytes()
                    print("whole" if content == bytes(range(256)) * 400 + bytes([n]) else "other")
                except Exception as error:
                    print(error.response.status_code)
        """
        assert client(hub, tmp_path, code).split() == list(outcomes.values())
        assert hub.clock.happened() == len(outcomes)


def test_faults_of_uploads(tmp_path: Path) -> None:
    """The work is done, or not, as the kind says; bytes that are not those of their name are never stored."""
    cases = [
        ("503", "POST .*/NAME/commit/main", 1),
        ("412", "POST .*/NAME/commit/main", 1),
        ("close", "POST .*/NAME/commit/main", 1),
        ("close-after", "POST .*/NAME/commit/main", 2),
        ("cut", r"PUT .*/SHA256/parts/\d+/2", 2),
        ("close-after", "POST /api/complete_multipart.*SHA256", 2),
        ("flip", r"PUT .*/SHA256/parts/\d+/2", 1),
    ]
    faults = []
    for number, (kind, match, _) in enumerate(cases):
        sha256 = hashlib.sha256(other_weights(number)).hexdigest()
        faults.append(Fault(kind, match.replace("NAME", f"r{number}").replace("SHA256", sha256)))  # type: ignore[arg-type]
    with serve_hub(tmp_path / "hub", mode="lfs", faults=FaultPlan(tuple(faults)), part_bytes=1 << 15) as hub:
        for number in range(len(cases)):
            hub.add_repo(f"org/r{number}", {"config.json": b"{}"})
        code = f"""
            for n in range({len(cases)}):
                add = CommitOperationAdd("model.safetensors", bytes(range(256)) * 400 + bytes([n]))
                try:
                    api.create_commit(f"org/r{{n}}", [add], commit_message="Mine")
                except Exception as error:
                    print(n, type(error).__name__)
        """
        client(hub, tmp_path, code)
        assert hub.clock.happened() == len(cases)
        for number, (kind, match, commits) in enumerate(cases):
            assert len(hub.commits(f"org/r{number}")) == commits, (kind, match)
            if commits == 2:
                assert hub.file_bytes(f"org/r{number}", "main", "model.safetensors") == other_weights(number)


def test_a_lost_reply_in_xet_mode_makes_the_client_commit_twice(tmp_path: Path) -> None:
    """The duplicate that a push has to look for."""
    folder = tmp_path / "up"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    plan = FaultPlan((Fault("close-after", "POST .*/commit/main"),))
    with serve_hub(tmp_path / "hub", mode="xet", faults=plan) as hub:
        hub.add_repo("org/name", {"config.json": b"{}"})
        client(
            hub, tmp_path, f'api.upload_folder(repo_id="org/name", folder_path={str(folder)!r}, commit_message="Up")'
        )
        assert [commit.title for commit in hub.commits("org/name")] == ["Up", "Up", "initial commit"]


def test_cards_are_checked(tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo("org/name", FILES)
        code = """
            for relation in ("quantized", "squeezed"):
                card = f"---\\nlicense: mit\\nbase_model_relation: {relation}\\n---\\n# Card\\n".encode()
                try:
                    print(api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/name").oid)
                except ValueError as error:
                    print(error)
        """
        printed = client(hub, tmp_path, code)
        assert hub.commits("org/name")[0].oid in printed and '"base_model_relation" must be one of' in printed


def test_models_are_listed_and_a_stopped_server_comes_back_on_its_port(tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo("org/Qwen-small", FILES)
        hub.add_repo("other/else", FILES)
        listing = (
            'print([m.id for m in api.list_models(search="qwen")], [m.id for m in api.list_models(author="other")])'
        )
        assert client(hub, tmp_path, listing).strip() == "['org/Qwen-small'] ['other/else']"
        port = int(hub.endpoint.rsplit(":", 1)[1])
    with serve_hub(tmp_path / "hub", mode="lfs", port=port) as hub:
        assert (
            client(hub, tmp_path, "print(api.whoami()['name'], api.model_info('org/Qwen-small').sha[:1])").split()[0]
            == "loop"
        )


def test_modelscope(tmp_path: Path) -> None:
    """The two requests that a download makes; the token comes as a cookie or as a bearer."""
    plan = FaultPlan((Fault("503", "FilePath=config.json"),))
    with serve_modelscope(tmp_path / "ms", faults=plan) as server:
        server.add_repo("Qwen/small", FILES)
        server.add_repo("Qwen/closed", FILES, private=True)
        code = """
            import json, os, urllib.request, urllib.error
            def get(path, **headers):
                url = os.environ["MODELSCOPE_ENDPOINT"] + "/api/v1/models/" + path
                try:
                    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
                        return reply.status, reply.read()
                except urllib.error.HTTPError as error:
                    return error.code, error.read()
            status, body = get("Qwen/small/repo/files?Revision=master&Recursive=True")
            rows = [row for row in json.loads(body)["Data"]["Files"] if row["Type"] == "blob"]
            print({row["Path"]: (row["Size"], row["Sha256"]) for row in rows})
            name = "Qwen/small/repo?Revision=master&FilePath=config.json"
            print(get(name)[0], get(name), get(name, Range="bytes=2-"))
            closed = "Qwen/closed/repo/files?Revision=master&Recursive=True"
            token = os.environ["MODELSCOPE_API_TOKEN"]
            cookie = "m_session_id=" + token
            print(get(closed)[0], get(closed, Cookie=cookie)[0], get(closed, Authorization="Bearer x")[0])
            print(get("Qwen/absent/repo/files")[0], get("Qwen/small/repo?FilePath=../../closed.private")[0])
        """
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=server.environment(tmp_path), capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    listed, config, closed, absent = ran.stdout.splitlines()
    assert listed == str({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(FILES.items())})
    assert config == """503 (200, b'{"a": 1}') (206, b'a": 1}')"""
    assert closed == "404 200 401" and absent == "404 404"
