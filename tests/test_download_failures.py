"""Every refusal of the hub becomes one message with a next step, and no message holds a secret. No network."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status

from qwen_quant.errors import InputError, NetworkError, UsageError
from qwen_quant.hub import failures
from qwen_quant.hub.failures import client_errors, hub_failure, redact

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


def refused(status: int, *, token: bool = False, body: str = "", **headers: str) -> BaseException:
    """The exception that the hub client itself makes of such a reply."""
    sent = {"authorization": f"Bearer {TOKEN}"} if token else {}
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/name", headers=sent)
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    try:
        hf_raise_for_status(httpx2.Response(status, request=request, headers=names, text=body))
    except client_errors() as error:
        return error
    raise AssertionError(f"HTTP {status} is no error")


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that knows a few names and refs."""
    ids = ["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B", "org/other"]
    refs = SimpleNamespace(branches=[SimpleNamespace(name="main")], tags=[SimpleNamespace(name="v1.0")])
    api = SimpleNamespace(
        list_models=lambda **query: [SimpleNamespace(id=name) for name in ids], list_repo_refs=lambda repo: refs
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize(
    ("error", "why", "step"),
    [
        (refused(404, X_Error_Code="RepoNotFound"), "no such repository", "HF_TOKEN"),
        (refused(401), "no such repository", "HF_TOKEN"),
        (refused(401, token=True), "wrong, revoked or expired", "settings/tokens"),
        (refused(403, X_Error_Code="GatedRepo"), "accept terms", "https://huggingface.co/org/name"),
        (refused(403, token=True, X_Error_Message="no write"), "no write", "permissions"),
        (refused(403, X_Error_Message="Access to this resource is disabled."), "disabled", "org/name"),
        (refused(404, X_Error_Code="RevisionNotFound"), "'v1'", "v1.0, main"),
        (refused(404, X_Error_Code="EntryNotFound"), "404", "run again"),
        (refused(412), "somebody committed", "commits"),
        (refused(429, retry_after="7"), "429", "wait 7 s"),
        (refused(429), "429", "few minutes"),
        (refused(503), "503", "continues"),
        (refused(422, body="bad metadata"), "bad metadata", "run again"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE", "unset"),
        (LocalEntryNotFoundError("not cached"), "local cache", "unset"),
        (ConnectionError("reset by peer"), "reset by peer", "HF_ENDPOINT"),
        (httpx2.ReadTimeout("slow"), "slow", "HF_ENDPOINT"),
        (httpx2.RemoteProtocolError("closed"), "closed", "same command again"),
    ],
)
def test_each_refusal_says_why_and_what_next(error: BaseException, why: str, step: str) -> None:
    ours = hub_failure("fetch", "org/name@v1", error)
    assert isinstance(ours, NetworkError) and ours.exit_code == 5
    assert "'org/name@v1'" in ours.what and why in ours.why and step in ours.next_step


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "disk full at /data/x"),
        (RuntimeError("Data error: IO Error: No space left on device (os error 28)"), "disk full"),
        (HFValidationError("Repo id must be in the form"), "not a hub id"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied"),
    ],
)
def test_what_the_user_can_mend_here_is_bad_input(error: BaseException, word: str) -> None:
    ours = hub_failure("fetch", "org/name", error)
    assert isinstance(ours, InputError) and word in str(ours)


def test_a_misspelt_name_gets_the_nearest_ones() -> None:
    ours = hub_failure("fetch", "qwen/Qwen2.5-7B-Instrct", refused(404, X_Error_Code="RepoNotFound"))
    assert "did you mean Qwen/Qwen2.5-7B-Instruct, Qwen/Qwen2.5-7B?" in ours.next_step


def test_a_search_that_fails_leaves_the_message_without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**query: object) -> None:
        raise ConnectionError("closed")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(list_models=fail))
    assert "check the name" in hub_failure("fetch", "org/name", refused(401)).next_step


def test_our_own_errors_pass_through() -> None:
    error = UsageError("what", "why")
    assert hub_failure("fetch", "org/name", error) is error


@pytest.mark.parametrize(
    "text",
    [
        f"token {TOKEN} refused",
        f"authorization: Bearer {TOKEN}",
        "Bearer sesame-open",
        "https://user:sesame@proxy:3128/x failed",
        "GET https://cdn/file?X-Amz-Signature=sesame&x=1 failed",
        "MODELSCOPE sesame",
    ],
)
def test_no_secret_survives(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "sesame")
    assert TOKEN not in redact(text) and "sesame" not in redact(text)
    for part in (failures.hub_failure("fetch", "org/name", ConnectionError(text)), refused(403, body=text)):
        shown = hub_failure("fetch", "org/name", part)
        assert TOKEN not in f"{shown} {shown.next_step}" and "sesame" not in f"{shown} {shown.next_step}"


def test_plain_text_is_left_alone() -> None:
    text = "cannot fetch 'Qwen/Qwen3-8B@main' from https://huggingface.co/Qwen/Qwen3-8B: HTTP 503"
    assert redact(text) == text
