"""Large files into Xet storage, which sends only chunks that are not there yet: a repeated upload costs reading.

The storage's address comes from the hub (`casUrl` in the reply of its token route). It is looked at once and then
pinned for the whole upload: later replies of that route renew the token and cannot lead elsewhere (tried: hf_xet 1.8).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from qwen_quant.errors import InputError, NetworkError
from qwen_quant.hub.failures import redact
from qwen_quant.hub.huggingface import check_storage
from qwen_quant.hub.session import TIMEOUT_SECONDS, Session, ask
from qwen_quant.hub.target import UploadFile
from qwen_quant.hub.transport import RetryPolicy, pause, wait_seconds
from qwen_quant.progress import ProgressFn

_MIB = 1 << 20
_POLICY = RetryPolicy(attempts=3, first_wait_seconds=1.0)
_XET_ERRORS = (RuntimeError, ValueError, OSError)
# Blocks of up to 64 MB are in memory while they are sent; hf_xet would let their number grow to 64.
_BOUNDS = {"client.ac_max_upload_concurrency": 2, "data.max_concurrent_file_ingestion": 2}


def upload_xet(session: Session, files: Sequence[UploadFile], progress: ProgressFn) -> None:
    """Bring the content of `files` into Xet storage.

    Errors: NetworkError when the storage does not take them or its address is not allowed, InputError for a file that
    changed meanwhile.
    """
    failures = 0
    while True:
        try:
            return _upload_once(session, files, progress)
        except _XET_ERRORS as error:
            failures += 1
            if "os error 28" in str(error):
                raise
            if failures >= _POLICY.attempts:
                raise NetworkError(
                    f"cannot push to '{session.repo_id}'",
                    f"Xet storage failed: {redact(str(error).splitlines()[0])}",
                    "run the same command again: it continues; HF_HUB_DISABLE_XET=1 uses LFS instead",
                ) from error
            pause(wait_seconds(error, failures, _POLICY), threading.Event())


def _upload_once(session: Session, files: Sequence[UploadFile], progress: ProgressFn) -> None:
    import hf_xet

    total = sum(file.size for file in files)

    def report(group: Any, items: Any) -> None:
        progress("uploading to Xet (MiB)", min(group.total_bytes_completed, total) // _MIB, max(1, total // _MIB))

    xet = hf_xet.XetSession(config=hf_xet.XetConfig().with_config(_BOUNDS))
    try:
        with xet.new_upload_commit(**_connection(session), progress_callback=report) as commit:
            # Hashed again on the way: what is stored is then known to be what was checked before.
            handles = [commit.start_upload_file(str(file.path), sha256=hf_xet.COMPUTE_SHA256) for file in files]
    except KeyboardInterrupt:
        xet.sigint_abort()
        raise
    for file, handle in zip(files, handles, strict=True):
        if handle.result().xet_info.sha256 != file.sha256:
            raise InputError(
                f"{file.path} changed while it was uploaded", "nothing was committed", "leave it alone and run again"
            )


def _connection(session: Session) -> dict[str, Any]:
    """Arguments of a Xet upload: the storage's checked address, its token, and how the token is renewed."""
    from huggingface_hub import get_session, hf_raise_for_status

    revision = "None?create_pr=1" if session.create_pr else session.quoted_branch
    url = f"{session.api_url}/xet-write-token/{revision}"

    def once() -> Any:
        reply = get_session().get(url, headers=session.headers, timeout=TIMEOUT_SECONDS)
        hf_raise_for_status(reply)
        return reply.json()

    grant = ask(once)
    check_storage(str(grant["casUrl"]), session.endpoint)
    return {
        "endpoint": grant["casUrl"],
        "token": grant["accessToken"],
        "token_expiry_unix_secs": int(grant["exp"]),
        "token_refresh_url": url,
        "token_refresh_headers": session.headers,
        "custom_headers": {key: value for key, value in session.headers.items() if key.lower() != "authorization"},
    }
