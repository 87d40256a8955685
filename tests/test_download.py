"""A model argument: folder, hub id or neither; what is asked of the hub, and its errors as ours. No network."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from qwen_quant.errors import InputError, NetworkError
from qwen_quant.hub import download as module
from qwen_quant.hub.download import ModelSource, download, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for HfApi and snapshot_download; remembers what it was asked."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error = folder / COMMIT, error
        self.asked: list[tuple[str, str | None]] = []
        self.options: dict[str, object] = {}

    def model_info(self, repo: str, *, revision: str | None) -> SimpleNamespace:
        self.asked.append((repo, revision))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(sha=COMMIT)

    def snapshot(self, repo: str, *, revision: str | None, **options: object) -> str:
        self.asked.append((repo, revision))
        self.options = options
        return str(self.folder)


def install(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot)
    return hub


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == ModelSource(Path("org/name"), "name", None)
    assert resolve_model("./org/name/").source_id == "name"


def test_a_revision_is_resolved_to_its_commit_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, FakeHub(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = resolve_model("org/name@v1.0")
    assert source == ModelSource(tmp_path / COMMIT, "org/name", COMMIT)
    assert hub.asked == [("org/name", "v1.0"), ("org/name", COMMIT)]


def test_only_weights_configs_tokenizer_and_licences_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = install(monkeypatch, FakeHub(tmp_path))
    download("org/name", None)
    allow, ignore = hub.options["allow_patterns"], hub.options["ignore_patterns"]

    def fetched(name: str) -> bool:
        matches = [any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for patterns in (allow, ignore)]
        return matches[0] and not matches[1]

    wanted = ("model-00001-of-00002.safetensors", "config.json", "merges.txt", "LICENSE", "qwen.tiktoken", "chat.jinja")
    refused = ("modeling_qwen.py", "pytorch_model.bin", "x.pt", "model.gguf", "weights.pkl", "run.sh")
    assert all(map(fetched, wanted)) and not any(map(fetched, refused))


def test_offline_uses_the_cached_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, FakeHub(tmp_path, OfflineModeIsEnabled("offline")))
    assert download("org/name", None) == ModelSource(tmp_path / COMMIT, "org/name", COMMIT)
    assert hub.options["local_files_only"] is True


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (ConnectionError("reset"), "HF_ENDPOINT"),
        (TimeoutError("slow"), "HF_ENDPOINT"),
        (LocalEntryNotFoundError("not cached"), "HF_HUB_OFFLINE"),
    ],
)
def test_hub_errors_name_the_repository_and_a_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, step: str
) -> None:
    install(monkeypatch, FakeHub(tmp_path, error))
    with pytest.raises(NetworkError, match="org/name@dev") as caught:
        download("org/name", "dev")
    assert caught.value.exit_code == 5
    assert step in caught.value.next_step


@pytest.mark.parametrize("name", ["GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"])
def test_each_refusal_of_the_hub_has_its_own_next_step(name: str) -> None:
    error_class = getattr(huggingface_hub.errors, name)
    error = error_class.__new__(error_class)
    assert module._network_error("org/name", error).next_step == module._NEXT_STEPS[name]


@pytest.mark.parametrize("model", ["name", "../up", "/abs/no", "a/b/c", "org/name@", ".hidden/x", "org /name"])
def test_what_is_neither_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not a checkpoint"):
        resolve_model(model)
