"""`push` as a real process against the loopback Hub: one commit, once, of exactly what the manifest names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.loophub import Fault, FaultPlan, Hub, serve_hub
from tests.support.pushable import FAILED, make_pushable, write_report_for

REPO = "loop/tiny-Int4"
FILES = {
    "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors", "quantize_config.json",
    "qwen-quant.json", "report.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_pushable(tmp_path_factory.mktemp("pushable") / "tiny-Int4")


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny-Int4"))


def start(hub: Hub, artifact: Path, *options: str, repo: str = REPO, **variables: str) -> subprocess.Popen[str]:
    environment = {**hub.environment(artifact.parent / "home"), "HF_HUB_OFFLINE": "0", **variables}
    environment = {key: value for key, value in environment.items() if value}
    command = [sys.executable, "-m", "qwen_quant", "push", str(artifact), repo, "--json", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=artifact.parent)


def push(
    hub: Hub, artifact: Path, *options: str, code: int = 0, repo: str = REPO, **variables: str
) -> tuple[dict, str]:
    """Run to the end; (the JSON document, stderr)."""
    process = start(hub, artifact, *options, repo=repo, **variables)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err and hub.token not in out + err
    return json.loads(out), err


def assert_pushed(hub: Hub, artifact: Path, revision: str = "main", repo: str = REPO) -> None:
    """Every file of the artifact is there byte for byte, and nothing else but .gitattributes."""
    commit = hub.commits(repo, revision)[0]
    assert set(commit.files) - {".gitattributes"} == {path.name for path in artifact.iterdir()}
    for path in artifact.iterdir():
        assert hub.file_bytes(repo, revision, path.name) == path.read_bytes(), path.name


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_one_commit_of_exactly_the_artifact_and_a_second_push_is_none(artifact: Path, tmp_path: Path, mode) -> None:
    with serve_hub(tmp_path / "hub", mode=mode, part_bytes=1 << 16) as hub:
        document, _ = push(hub, artifact, "--private", "--tag", "v1")
        assert document["outcome"] == "committed" and document["created"]
        assert {path.name for path in artifact.iterdir()} == FILES
        assert_pushed(hub, artifact)
        commits = hub.commits(REPO)
        assert len(commits) == 2 and commits[0].oid == document["commit"]
        assert commits[0].title == "gptq 4 bit of Qwen/Qwen2-tiny@ab12ab12ab12"
        assert "qwen-quant-push: " in commits[0].message
        assert hub.repository(REPO).private and hub.repository(REPO).tags == {"v1": document["commit"]}
        again, _ = push(hub, artifact, "--private", "--tag", "v1")
        assert (again["outcome"], again["commit"]) == ("unchanged", document["commit"])
        assert len(hub.commits(REPO)) == 2
    assert [p.name for p in artifact.parent.iterdir() if p.name.endswith(".push.json")] == []


def test_a_branch_a_pull_request_and_a_dry_run(artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        before = {path.name: path.read_bytes() for path in artifact.iterdir()}
        document, _ = push(hub, artifact, "--dry-run", HF_TOKEN="")
        assert document["outcome"] == "dry run" and document["commit"] is None and not hub.exists(REPO)
        assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
        push(hub, artifact, "--revision", "next")
        assert_pushed(hub, artifact, "next")
        assert set(hub.commits(REPO)[0].files) == {".gitattributes"}
        document, _ = push(hub, artifact, "--create-pr")
        assert document["pull_request"].endswith(f"/{REPO}/discussions/1")
        assert_pushed(hub, artifact, "refs/pr/1")
        again, _ = push(hub, artifact, "--create-pr")
        assert (again["outcome"], again["commit"]) == ("found", document["commit"])
        assert len(hub.repository(REPO).pulls) == 1


@pytest.mark.parametrize("create_pr", [False, True])
@pytest.mark.parametrize("kind", ["close-after", "503", "close", "429"])
def test_a_lost_or_refused_commit_reply_makes_one_commit(
    artifact: Path, tmp_path: Path, kind: str, create_pr: bool
) -> None:
    faults = FaultPlan((Fault(kind, r"POST .*/commit/"),))
    options = ("--create-pr",) if create_pr else ()
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        document, _ = push(hub, artifact, *options)
        assert hub.clock.happened() == 1
        revision = "refs/pr/1" if create_pr else "main"
        assert_pushed(hub, artifact, revision)
        assert len(hub.commits(REPO, revision)) == 2 and len(hub.repository(REPO).pulls) == create_pr
        assert hub.commits(REPO, revision)[0].oid == document["commit"]


def test_every_other_request_may_fail_once(artifact: Path, tmp_path: Path) -> None:
    routes = (r"POST /api/repos/create", r"GET .*/refs", r"GET .*/tree/", r"POST .*/preupload", r"objects/batch",
              r"PUT /storage", r"POST .*/validate-yaml", r"GET /api/models/[^/]+/[^/?]+(\?|$)",
              r"POST .*/tag/", r"objects/verify")  # fmt: skip
    faults = FaultPlan(tuple(Fault(kind, route) for route in routes for kind in ("503", "close")))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        push(hub, artifact, "--tag", "v1")
        assert hub.clock.happened() >= 2 * (len(routes) - 1)
        assert_pushed(hub, artifact)
        assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("create_pr", [False, True])
def test_killed_after_the_commit_was_made(artifact: Path, tmp_path: Path, create_pr: bool) -> None:
    """The reply never comes, the process is killed; the next one finds the commit."""
    options = ("--create-pr",) if create_pr else ()
    slow = FaultPlan((Fault("slow", r"POST .*/commit/", bytes_per_second=20),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=slow) as hub:
        process = start(hub, artifact, *options)
        revision = "refs/pr/1" if create_pr else "main"
        wait_for(lambda: hub.exists(REPO) and commits_on(hub, revision) > 1)
        process.kill()
        process.communicate()
        assert (artifact.parent / ".tiny-Int4.push.json").is_file()
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = push(hub, artifact, *options)
        assert document["outcome"] == "found"
        assert_pushed(hub, artifact, revision)
        assert commits_on(hub, revision) == 2 and len(hub.repository(REPO).pulls) == create_pr


def commits_on(hub: Hub, revision: str) -> int:
    try:
        return len(hub.commits(REPO, revision))
    except KeyError:
        return 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_while_uploading_continues_with_what_is_missing(artifact: Path, tmp_path: Path) -> None:
    slow = FaultPlan((Fault("slow", r"PUT /storage", bytes_per_second=40000, times=99, skip=1),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=slow, part_bytes=1 << 17) as hub:
        process = start(hub, artifact)
        wait_for(lambda: sum(served.fault == "slow" or served.method == "PUT" for served in hub.log) > 0)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "run the same command again" in err and "Traceback" not in err
        assert set(hub.commits(REPO)[0].files) == {".gitattributes"}
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        push(hub, artifact)
        assert_pushed(hub, artifact)
        assert len(hub.commits(REPO)) == 2


def test_damaged_on_the_way_is_sent_again(artifact: Path, tmp_path: Path) -> None:
    faults = FaultPlan((Fault("flip", r"PUT /storage"),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        push(hub, artifact)
        assert hub.clock.happened() == 1
        assert_pushed(hub, artifact)


def test_somebody_elses_commit_meanwhile_is_explained(artifact: Path, tmp_path: Path) -> None:
    slow = FaultPlan((Fault("slow", r"PUT /storage", bytes_per_second=200000),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=slow) as hub:
        hub.add_repo(REPO, {".gitattributes": b""})
        process = start(hub, artifact)
        wait_for(lambda: any("/objects/batch" in path for _, path in hub.requests))
        hub.add_commit(REPO, {"other.txt": b"mine"})
        out, err = process.communicate(timeout=60)
        assert process.returncode == 5
        error = json.loads(out)["error"]
        assert "somebody committed" in error["why"] and "run the same command again" in error["next_step"]
        assert len(hub.commits(REPO)) == 2
        push(hub, artifact)
        assert hub.file_bytes(REPO, "main", "other.txt") == b"mine"
        assert len(hub.commits(REPO)) == 3


def test_an_earlier_push_is_replaced_and_strange_weights_are_not(artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        push(hub, artifact)
        manifest = json.loads((artifact / "qwen-quant.json").read_text())
        (artifact / "chat_template.jinja").unlink(missing_ok=True)
        (artifact / "LICENSE").rename(artifact / "LICENSE.txt")
        hashes = manifest["output"]["sha256"]
        hashes["LICENSE.txt"] = hashes.pop("LICENSE")
        (artifact / "qwen-quant.json").write_text(json.dumps(manifest))
        document, _ = push(hub, artifact)
        assert document["deleted"] == ["LICENSE"]
        assert_pushed(hub, artifact)
        hub.add_commit(REPO, {"model-00002-of-00002.safetensors": b"x"})
        refused, _ = push(hub, artifact, code=3)
        assert "model-00002-of-00002.safetensors" in refused["error"]["what"]


def test_refused_by_the_hub(artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo("loop/taken", {"README.md": b"# x"})
        for changes, word in (
            ({"HF_TOKEN": ""}, "there is no token"),
            ({"HF_TOKEN": hub.expired_token}, "expired"),
            ({"HF_TOKEN": hub.read_token}, "write token"),
            ({"repo": f"{hub.foreign_namespace}/x"}, "rights"),
            ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ):
            document, err = push(hub, artifact, code=5, **changes)
            assert word in err, err
            assert not set(changes.values()) & {hub.expired_token, hub.read_token} or changes["HF_TOKEN"] not in err
        _, err = push(hub, artifact, "--private", code=3, repo="loop/taken")
        assert "is public" in err
        assert not hub.exists(REPO)


def test_a_tag_is_not_moved(artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        push(hub, artifact, "--tag", "v1")
        write_report_for(artifact, seconds=2.0)
        _, err = push(hub, artifact, code=3)
        assert "report.json" in err and "changed after the manifest" in err
        run_card(artifact)
        _, err = push(hub, artifact, "--tag", "v1", code=3)
        assert "has the tag 'v1' already" in err
        assert len(hub.commits(REPO)) == 2


def run_card(artifact: Path) -> None:
    command = [sys.executable, "-m", "qwen_quant", "card", str(artifact)]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        cwd=artifact.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def test_gates(artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        write_report_for(artifact, gates=(FAILED,))
        document, _ = push(hub, artifact, code=4)
        assert "max_kl on text" in document["error"]["why"] and hub.requests == []
        write_report_for(artifact, gates=())
        document, _ = push(hub, artifact, code=4)
        assert "no gates" in document["error"]["what"]
        write_report_for(artifact, gates=(FAILED,))
        document, _ = push(hub, artifact, "--override-gates", "only a preview")
        assert document["override_reason"] == "only a preview"
        assert b"only a preview" in hub.file_bytes(REPO, "main", "README.md")


def test_a_server_names_local_storage(artifact: Path, tmp_path: Path) -> None:
    from qwen_quant.errors import NetworkError
    from qwen_quant.hub.huggingface import check_storage

    with pytest.raises(NetworkError, match="local://"):
        check_storage("local:///tmp/x", "https://hub.example")
    check_storage("local:///tmp/x", "http://127.0.0.1:80")


def test_client_log_and_debug_show_no_token(artifact: Path, tmp_path: Path) -> None:
    faults = FaultPlan((Fault("503", r"PUT /storage"),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        _, err = push(hub, artifact, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
        assert "Signature" not in err and "HF_DEBUG is ignored" in err
