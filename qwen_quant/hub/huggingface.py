"""The Hugging Face hub as a source: its listing has a hash for every file; large files come through Xet storage.

Xet's own client (hf_xet) reads many parts of a file at once and can begin anywhere in it, so that a partial file is
continued as over HTTP. Where it fails, is absent or is switched off (HF_HUB_DISABLE_XET=1), plain HTTP serves.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from qwen_quant.errors import NetworkError, QwenQuantError
from qwen_quant.hub.failures import hub_failure, redact
from qwen_quant.hub.plan_files import Listing, RemoteFile
from qwen_quant.hub.transport import Body, Broken, http_body

_LOG = logging.getLogger(__name__)
# Bytes of received parts that wait for their turn: of all files, of one, at most; and what is asked for ahead.
_XET_SETTINGS = {
    "reconstruction.download_buffer_size": 96_000_000,
    "reconstruction.download_buffer_perfile_size": 24_000_000,
    "reconstruction.download_buffer_limit": 192_000_000,
    "reconstruction.min_prefetch_buffer": 64_000_000,
    "reconstruction.min_reconstruction_fetch_size": 64_000_000,
    "reconstruction.max_reconstruction_fetch_size": 256_000_000,
}
_XET_ERRORS = (RuntimeError, ValueError, OSError)


class HuggingFace:
    """The hub at HF_ENDPOINT, with one Xet session per run."""

    name = "hf"

    def __init__(self) -> None:
        self._xet: Any = None
        self._failed: set[str] = set()
        self._lock = threading.Lock()

    def listing(self, repo: str, revision: str | None) -> Listing:
        """The revision's commit, then the files of that commit."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        commit = str(api.model_info(repo, revision=revision).sha)
        entries = api.list_repo_tree(repo, recursive=True, revision=commit)
        files = tuple(_remote(entry) for entry in entries if isinstance(entry, RepoFile))
        return Listing(self.name, repo, revision, commit, files)

    @contextmanager
    def open(self, listing: Listing, file: RemoteFile, start: int, *, plain: bool) -> Iterator[Body]:
        """The file's bytes from `start` on, through Xet where it is there and has not failed for this file."""
        group = None if plain or not file.xet_hash or file.path in self._failed else self._xet_group(listing, file)
        if group is not None:
            yield from self._xet_body(group, file, start)
            return
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(listing.repo, file.path, revision=listing.commit)
        with http_body(url, build_hf_headers(), start) as body:
            yield body

    def failure(self, name: str, error: BaseException) -> QwenQuantError:
        """The client's exception as ours."""
        return hub_failure("fetch", name, error)

    def close(self) -> None:
        """Stop the Xet streams; their readers see an end."""
        group, self._xet = self._xet, None
        if group is not None:
            group.abort()

    def _xet_group(self, listing: Listing, file: RemoteFile) -> Any:
        """The run's Xet connection, None without hf_xet."""
        from huggingface_hub import constants

        if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
            return None
        try:
            with self._lock:
                if self._xet is None:
                    grants = f"{constants.ENDPOINT}/api/models/{listing.repo}/xet-read-token/{listing.commit}"
                    self._xet = _connect(grants)
                return self._xet
        except (RuntimeError, ValueError, KeyError) as error:
            # What the hub refuses is another class and goes up; this is storage that does not answer, or nonsense.
            raise self._without_xet(file, error) from error

    def _xet_body(self, group: Any, file: RemoteFile, start: int) -> Iterator[Body]:
        """One Body from Xet storage. Its client's errors become Broken, and HTTP takes over for this file."""
        import hf_xet

        try:
            stream = group.download_stream(hf_xet.XetFileInfo(file.xet_hash, file.size), start=start)
        except _XET_ERRORS as error:
            raise self._without_xet(file, error) from error
        yield Body(start, self._chunks(stream, file))

    def _chunks(self, stream: Any, file: RemoteFile) -> Iterator[bytes]:
        try:
            yield from stream
        except _XET_ERRORS as error:
            raise self._without_xet(file, error) from error
        finally:
            stream.cancel()

    def _without_xet(self, file: RemoteFile, error: Exception) -> Broken:
        """Note that Xet failed for a file. A connection that failed once fails always: the next file makes its own."""
        _LOG.warning("Xet storage failed for %s (%s): fetching it over HTTP", file.path, redact(str(error)))
        with self._lock:
            self._failed.add(file.path)
            self._xet = None
        return Broken(f"Xet storage: {error}")


def _remote(entry: Any) -> RemoteFile:
    """huggingface_hub's RepoFile as ours."""
    sha256 = entry.lfs.sha256 if entry.lfs else None
    return RemoteFile(entry.path, entry.lfs.size if entry.lfs else entry.size, sha256, entry.blob_id, entry.xet_hash)


def _connect(token_url: str) -> Any:
    """A group of Xet streams for one repository and commit."""
    import hf_xet
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers()
    reply = get_session().get(token_url, headers=headers, timeout=30.0)
    hf_raise_for_status(reply)
    grant = reply.json()
    check_storage(str(grant["casUrl"]), token_url)
    return hf_xet.XetSession(_bounded(hf_xet.XetConfig())).new_download_stream_group(
        endpoint=grant["casUrl"],
        token=grant["accessToken"],
        token_expiry_unix_secs=int(grant["exp"]),
        token_refresh_url=token_url,
        token_refresh_headers=headers,
        custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
    )


def _bounded(config: Any) -> Any:
    """hf_xet's settings with small buffers: its own let one download take several GB of memory."""
    known = set(config.keys())
    return config.with_config({key: value for key, value in _XET_SETTINGS.items() if key in known})


def check_storage(storage: str, hub: str) -> None:
    """Storage on the local disk (`local://`) is for tests: only a hub on loopback may name it (else NetworkError)."""
    host = urlsplit(hub).hostname or ""
    if urlsplit(storage).scheme in ("http", "https") or _is_loopback(host):
        return
    raise NetworkError(
        f"the hub at {host} names '{urlsplit(storage).scheme}://' storage",
        "that would read and write this machine's own disk",
        "check HF_ENDPOINT; HF_HUB_DISABLE_XET=1 does without that storage",
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
