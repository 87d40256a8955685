"""`push` as a real process against the loopback Hub: one commit, once, of exactly what the manifest names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_quant import cli
from qwen_quant.errors import InputError, NetworkError
from qwen_quant.hub import push_checks
from qwen_quant.hub.huggingface import check_storage
from tests.loophub import Fault, FaultPlan, Hub, serve_hub
from tests.support.pushable import FAILED, make_pushable, seal_again, write_report_for
from tests.support.zygote import Running, Zygote

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


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@dataclass(frozen=True)
class Pusher:
    """Pushes of one artifact."""

    zygote: Zygote
    artifact: Path

    def start(self, hub: Hub, *options: str, repo: str = REPO, **variables: str) -> Running:
        environment = {**hub.environment(self.artifact.parent / "home"), "HF_HUB_OFFLINE": "0", **variables}
        environment = {key: value for key, value in environment.items() if value}
        arguments = ["push", str(self.artifact), repo, "--json", *options]
        return self.zygote.start(arguments, environment, self.artifact.parent)

    def __call__(
        self, hub: Hub, *options: str, code: int = 0, repo: str = REPO, **variables: str
    ) -> tuple[dict[str, Any], str]:
        """Run to the end; (the JSON document, stderr)."""
        ended, out, err = self.start(hub, *options, repo=repo, **variables).communicate()
        assert ended == code, err
        assert "Traceback" not in err and hub.token not in out + err
        return json.loads(out), err


@pytest.fixture
def push(zygote: Zygote, artifact: Path) -> Pusher:
    return Pusher(zygote, artifact)


def assert_pushed(hub: Hub, artifact: Path, revision: str = "main", repo: str = REPO) -> None:
    """Every file of the artifact is there byte for byte, and nothing else but .gitattributes."""
    commit = hub.commits(repo, revision)[0]
    assert set(commit.files) - {".gitattributes"} == {path.name for path in artifact.iterdir()}
    for path in artifact.iterdir():
        assert hub.file_bytes(repo, revision, path.name) == path.read_bytes(), path.name


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_one_commit_of_exactly_the_artifact_and_a_second_push_is_none(
    push: Pusher, artifact: Path, tmp_path: Path, mode
) -> None:
    with serve_hub(tmp_path / "hub", mode=mode, part_bytes=1 << 16) as hub:
        document, _ = push(hub, "--private", "--tag", "v1")
        assert document["outcome"] == "committed" and document["created"]
        assert {path.name for path in artifact.iterdir()} == FILES
        assert_pushed(hub, artifact)
        commits = hub.commits(REPO)
        assert len(commits) == 2 and commits[0].oid == document["commit"]
        assert commits[0].title == "gptq 4 bit of Qwen/Qwen2-tiny@ab12ab12ab12"
        assert "qwen-quant-push: " in commits[0].message
        assert hub.repository(REPO).private and hub.repository(REPO).tags == {"v1": document["commit"]}
        again, _ = push(hub, "--private", "--tag", "v1")
        assert (again["outcome"], again["commit"]) == ("unchanged", document["commit"])
        assert len(hub.commits(REPO)) == 2
    assert [p.name for p in artifact.parent.iterdir() if p.name.endswith(".push.json")] == []


def test_a_branch_a_pull_request_and_a_dry_run(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        before = {path.name: path.read_bytes() for path in artifact.iterdir()}
        document, _ = push(hub, "--dry-run", HF_TOKEN="")
        assert document["outcome"] == "dry run" and document["commit"] is None and not hub.exists(REPO)
        assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
        push(hub, "--revision", "next")
        assert_pushed(hub, artifact, "next")
        assert set(hub.commits(REPO)[0].files) == {".gitattributes"}
        document, _ = push(hub, "--create-pr")
        assert document["pull_request"].endswith(f"/{REPO}/discussions/1")
        assert_pushed(hub, artifact, "refs/pr/1")
        again, _ = push(hub, "--create-pr")
        assert (again["outcome"], again["commit"]) == ("found", document["commit"])
        assert len(hub.repository(REPO).pulls) == 1


@pytest.mark.parametrize("create_pr", [False, True])
@pytest.mark.parametrize("kind", ["close-after", "503", "close", "429"])
def test_a_lost_or_refused_commit_reply_makes_one_commit(
    push: Pusher, artifact: Path, tmp_path: Path, kind: str, create_pr: bool
) -> None:
    faults = FaultPlan((Fault(kind, r"POST .*/commit/"),))
    options = ("--create-pr",) if create_pr else ()
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        document, _ = push(hub, *options)
        assert hub.clock.happened() == 1
        revision = "refs/pr/1" if create_pr else "main"
        assert_pushed(hub, artifact, revision)
        assert len(hub.commits(REPO, revision)) == 2 and len(hub.repository(REPO).pulls) == create_pr
        assert hub.commits(REPO, revision)[0].oid == document["commit"]


def test_every_other_request_may_fail_once(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    routes = (r"POST /api/repos/create", r"GET .*/refs", r"GET .*/tree/", r"POST .*/preupload", r"objects/batch",
              r"PUT /storage", r"POST .*/validate-yaml", r"GET /api/models/[^/]+/[^/?]+(\?|$)",
              r"POST .*/tag/", r"objects/verify")  # fmt: skip
    faults = FaultPlan(tuple(Fault(kind, route) for route in routes for kind in ("503", "close")))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        push(hub, "--tag", "v1")
        assert hub.clock.happened() >= 2 * (len(routes) - 1)
        assert_pushed(hub, artifact)
        assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("create_pr", [False, True])
def test_killed_after_the_commit_was_made(push: Pusher, artifact: Path, tmp_path: Path, create_pr: bool) -> None:
    """The reply is lost, and the process killed before it asks what became of the commit: the next one finds it."""
    options = ("--create-pr",) if create_pr else ()
    lost = FaultPlan((Fault("close-after", r"POST .*/commit/"),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=lost) as hub:
        process = push.start(hub, *options)
        revision = "refs/pr/1" if create_pr else "main"
        wait_for(lambda: hub.exists(REPO) and commits_on(hub, revision) > 1)
        process.kill(signal.SIGKILL)
        assert process.communicate()[0] == -signal.SIGKILL
        assert (artifact.parent / ".tiny-Int4.push.json").is_file()
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = push(hub, *options)
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


def test_killed_while_uploading_continues_with_what_is_missing(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    slow = FaultPlan((Fault("slow", r"PUT /storage", bytes_per_second=40000, times=99, skip=1),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=slow, part_bytes=1 << 17) as hub:
        process = push.start(hub)
        wait_for(lambda: sum(served.fault == "slow" or served.method == "PUT" for served in hub.log) > 0)
        process.kill(signal.SIGTERM)
        code, _, err = process.communicate()
        assert code == 130, err
        assert "run the same command again" in err and "Traceback" not in err
        assert set(hub.commits(REPO)[0].files) == {".gitattributes"}
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        push(hub)
        assert_pushed(hub, artifact)
        assert len(hub.commits(REPO)) == 2


def test_damaged_on_the_way_is_sent_again(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    faults = FaultPlan((Fault("flip", r"PUT /storage"),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        push(hub)
        assert hub.clock.happened() == 1
        assert_pushed(hub, artifact)


def test_somebody_elses_commit_meanwhile_is_explained(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    slow = FaultPlan((Fault("slow", r"PUT /storage", bytes_per_second=200000),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=slow) as hub:
        hub.add_repo(REPO, {".gitattributes": b""})
        process = push.start(hub)
        wait_for(lambda: any("/objects/batch" in path for _, path in hub.requests))
        hub.add_commit(REPO, {"other.txt": b"mine"})
        code, out, _ = process.communicate()
        assert code == 5
        error = json.loads(out)["error"]
        assert "somebody committed" in error["why"] and "run the same command again" in error["next_step"]
        assert len(hub.commits(REPO)) == 2
        push(hub)
        assert hub.file_bytes(REPO, "main", "other.txt") == b"mine"
        assert len(hub.commits(REPO)) == 3


def test_an_earlier_push_is_replaced_and_strange_weights_are_not(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        push(hub)
        manifest = json.loads((artifact / "qwen-quant.json").read_text())
        (artifact / "chat_template.jinja").unlink(missing_ok=True)
        (artifact / "LICENSE").rename(artifact / "LICENSE.txt")
        hashes = manifest["output"]["sha256"]
        hashes["LICENSE.txt"] = hashes.pop("LICENSE")
        (artifact / "qwen-quant.json").write_text(json.dumps(manifest))
        document, _ = push(hub)
        assert document["deleted"] == ["LICENSE"]
        assert_pushed(hub, artifact)
        hub.add_commit(REPO, {"model-00002-of-00002.safetensors": b"x"})
        refused, _ = push(hub, code=3)
        assert "model-00002-of-00002.safetensors" in refused["error"]["what"]


def test_refused_by_the_hub(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo("loop/taken", {"README.md": b"# x"})
        for changes, word in (
            ({"HF_TOKEN": ""}, "there is no token"),
            ({"HF_TOKEN": hub.expired_token}, "expired"),
            ({"HF_TOKEN": hub.read_token}, "rights"),
            ({"repo": f"{hub.foreign_namespace}/x"}, "rights"),
            ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ):
            document, err = push(hub, code=5, **changes)
            assert word in err, err
            assert not set(changes.values()) & {hub.expired_token, hub.read_token} or changes["HF_TOKEN"] not in err
        _, err = push(hub, "--private", code=3, repo="loop/taken")
        assert "is public" in err
        assert not hub.exists(REPO)


def test_a_tag_on_an_earlier_commit_with_the_same_files_is_fine(push: Pusher, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = push(hub, "--tag", "v1")
        hub.add_commit(REPO, {"note.txt": b"somebody else's"})
        again, _ = push(hub, "--tag", "v1")
        assert (again["outcome"], again["commit"]) == ("unchanged", document["commit"])


def test_a_tag_is_not_moved(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        push(hub, "--tag", "v1")
        write_report_for(artifact, seconds=2.0)
        _, err = push(hub, code=3)
        assert "report.json" in err and "changed after the manifest" in err
        run_card(push)
        _, err = push(hub, "--tag", "v1", code=3)
        assert "has the tag 'v1' already" in err
        assert len(hub.commits(REPO)) == 2


def run_card(push: Pusher) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    running = push.zygote.start(["card", str(push.artifact)], environment, push.artifact.parent)
    assert running.communicate()[0] == 0


def test_gates(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        write_report_for(artifact, gates=(FAILED,))
        document, _ = push(hub, code=4)
        assert "max_kl on text" in document["error"]["why"] and hub.requests == []
        write_report_for(artifact, gates=())
        document, _ = push(hub, code=4)
        assert "no gates" in document["error"]["what"]
        write_report_for(artifact, gates=(FAILED,))
        document, _ = push(hub, "--override-gates", "only a preview")
        assert document["override_reason"] == "only a preview"
        assert b"only a preview" in hub.file_bytes(REPO, "main", "README.md")


def test_a_server_names_local_storage() -> None:
    with pytest.raises(NetworkError, match="local://"):
        check_storage("local:///tmp/x", "https://hub.example")
    check_storage("local:///tmp/x", "http://127.0.0.1:80")


def test_client_log_and_debug_show_no_token(push: Pusher, artifact: Path, tmp_path: Path) -> None:
    faults = FaultPlan((Fault("503", r"PUT /storage"),))
    with serve_hub(tmp_path / "hub", mode="lfs", faults=faults) as hub:
        _, err = push(hub, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
        assert "Signature" not in err and "HF_DEBUG is ignored" in err


def test_what_must_not_be_sent(push: Pusher, tmp_path: Path) -> None:
    """Before any request: strangers, links, changed files, another artifact's report, no licence, a token."""
    artifact, other = push.artifact, push.artifact / "extra"
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        for name in (".env", "weights.bin", "note.txt"):
            (artifact / name).write_text("x")
            assert name in push(hub, code=3)[1]
            (artifact / name).unlink()
        other.symlink_to(tmp_path)
        assert "symbolic link" in push(hub, code=3)[1]
        other.unlink()
        report = (artifact / "report.json").read_text()
        write_report_for(artifact, quantized_sha256="ab" * 32)
        assert "is the report of another artifact" in push(hub, code=3)[1]
        (artifact / "report.json").unlink()
        assert "has no report.json" in push(hub, code=3)[1]
        (artifact / "report.json").write_text(report.replace("one file", f"hf_{'a' * 34}"))
        assert "looks like a token" in push(hub, code=3)[1]
        (artifact / "report.json").write_text(report)
        (artifact / "README.md").unlink()  # written by the push before; it remembers the source
        seal_again(artifact, source={"id": "no such id", "revision": None, "sha256": {}})
        assert "--base-model" in push(hub, code=3)[1]
        config = (artifact / "config.json").read_bytes()
        (artifact / "config.json").write_bytes(config + b"\n")
        assert "changed after the manifest" in push(hub, code=3)[1]
        assert hub.requests == []


def test_names_that_are_never_sent(artifact: Path) -> None:
    for names, word in (
        (["a.pkl"], "never pushed"),
        (["a.gguf"], "never pushed"),
        ([".env"], "never pushed"),
        (["A.txt", "a.TXT"], "only in case"),
    ):
        with pytest.raises(InputError, match=word):
            push_checks.check_names(names)


def test_the_cards_languages(push: Pusher, tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        document, _ = push(hub, "--card-language", "both")
        card = hub.file_bytes(REPO, "main", "README.md").decode()
        assert f"{REPO}" in card and "## 中文" in card
        again, _ = push(hub)  # the card keeps its languages
        assert (again["outcome"], again["commit"]) == ("unchanged", document["commit"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nonsense",), "is not a repository"),
        (("a/b@main",), "is not a repository"),
        (("a/b", "--create-pr", "--tag", "v1"), "--create-pr"),
        (("a/b", "--tag", "../x"), "no name of a branch or tag"),
    ],
)
def test_usage(artifact: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], word: str) -> None:
    assert cli.run(["push", str(artifact), *arguments]) == 2
    assert word in capsys.readouterr().err
