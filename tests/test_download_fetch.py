"""One file at a time: continuing, waiting, refetching, links and places, over a source in memory. No network."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub import constants

from qwen_quant.errors import InputError, NetworkError
from qwen_quant.hub import download as download_module
from qwen_quant.hub import huggingface
from qwen_quant.hub.download import DownloadJob, download_repo, resolve_model
from qwen_quant.hub.fetch import Meter, Transfer, fetch_file
from qwen_quant.hub.plan_files import Listing, RemoteFile
from qwen_quant.hub.store import Verified, cache_store, folder_store, guard, is_complete
from qwen_quant.hub.transport import Body, Broken, RetryPolicy, StoppedError, http_body, is_passing, wait_seconds

COMMIT, LATER = "a" * 40, "b" * 40
CONTENT = bytes(range(256)) * 20_000  # 5 MB
QUICK = RetryPolicy(attempts=4, first_wait_seconds=0.001)


def remote(path: str, content: bytes) -> RemoteFile:
    return RemoteFile(path, len(content), hashlib.sha256(content).hexdigest())


@dataclass
class Memory:
    """A source in memory. `ends`: after how many bytes each body breaks; `flips`: how many bodies have a wrong byte."""

    files: dict[str, bytes] = field(default_factory=lambda: {"model.safetensors": CONTENT, "config.json": b"{}"})
    commit: str = COMMIT
    ends: list[int] = field(default_factory=list)
    flips: int = 0
    ignores_range: bool = False
    opened: list[tuple[str, int, bool]] = field(default_factory=list)
    name: str = "hf"

    def listing(self, repo: str, revision: str | None) -> Listing:
        files = tuple(remote(path, content) for path, content in self.files.items())
        return Listing(self.name, repo, revision, self.commit, files)

    @contextmanager
    def open(self, listing: Listing, file: RemoteFile, start: int, *, plain: bool) -> Iterator[Body]:
        self.opened.append((file.path, start, plain))
        start = 0 if self.ignores_range else start
        content = bytearray(self.files[file.path][start:])
        if self.flips and content:
            self.flips -= 1
            content[len(content) // 2] ^= 1
        end = self.ends.pop(0) if self.ends else len(content)
        yield Body(start, self._chunks(bytes(content), end))

    def _chunks(self, content: bytes, end: int) -> Iterator[bytes]:
        for place in range(0, min(end, len(content)), 1 << 20):
            yield content[place : min(place + (1 << 20), end)]
        if end < len(content):
            raise Broken("cut")

    def failure(self, name: str, error: BaseException) -> NetworkError:
        return NetworkError(f"cannot fetch '{name}'", str(error))

    def close(self) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a client that may use the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache" / "models--org--name"


def use(monkeypatch: pytest.MonkeyPatch, source: Memory) -> Memory:
    monkeypatch.setitem(download_module.SOURCES, "hf", lambda: source)
    monkeypatch.setattr(download_module, "RetryPolicy", lambda: QUICK)
    return source


def transfer(source: Memory, folder: Path) -> Transfer:
    store = folder_store(folder)
    meter = Meter(lambda label, done, total: None, "", len(CONTENT))
    return Transfer(source, source.listing("org/name", None), store, Verified(store), meter, QUICK)


def fetch(source: Memory, folder: Path) -> tuple[str, int]:
    done = fetch_file(transfer(source, folder), remote("model.safetensors", CONTENT))
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    return done.how, done.bytes_fetched


def test_a_body_that_breaks_is_continued_where_it_ended(tmp_path: Path) -> None:
    source = Memory(ends=[2_000_000, 1_500_000])
    assert fetch(source, tmp_path) == ("fetched", len(CONTENT))
    assert [start for _, start, _ in source.opened] == [0, 2_000_000, 3_500_000]
    assert not list((tmp_path / ".qwen-quant").glob("*.incomplete"))


def test_a_partial_file_of_an_earlier_run_is_continued(tmp_path: Path) -> None:
    file, run = remote("model.safetensors", CONTENT), transfer(Memory(), tmp_path)
    partial = run.store.partial(file)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:3_000_000])
    assert fetch(Memory(), tmp_path) == ("resumed", len(CONTENT) - 3_000_000)


def test_a_server_that_ignores_range_starts_over_without_damage(tmp_path: Path) -> None:
    source = Memory(ends=[2_000_000], ignores_range=True)
    how, received = fetch(source, tmp_path)
    assert how == "fetched" and received >= len(CONTENT)
    assert [start for _, start, _ in source.opened] == [0, 2_000_000]


@pytest.mark.parametrize("partial", [b"x" * 3_000_000, b"x" * (len(CONTENT) + 5), b"x" * len(CONTENT)])
def test_a_damaged_partial_file_costs_one_fetch_more(tmp_path: Path, partial: bytes) -> None:
    path = transfer(Memory(), tmp_path).store.partial(remote("model.safetensors", CONTENT))
    path.parent.mkdir(parents=True)
    path.write_bytes(partial)
    source = Memory()
    fetch(source, tmp_path)
    assert source.opened[-1][1] == 0 and len(source.opened) <= 2


def test_a_flipped_byte_is_fetched_again_once(tmp_path: Path) -> None:
    source = Memory(flips=1)
    assert fetch(source, tmp_path) == ("fetched twice", 2 * len(CONTENT))
    assert [plain for _, _, plain in source.opened] == [False, True], "the second time over plain HTTP"


def test_two_wrong_copies_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"model\.safetensors.* arrived damaged twice"):
        fetch(Memory(flips=2), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_retries_end(tmp_path: Path) -> None:
    source = Memory(ends=[0] * 100)
    with pytest.raises(Broken):
        fetch(source, tmp_path)
    assert len(source.opened) == QUICK.attempts
    assert [plain for _, _, plain in source.opened] == [False, False, True, True], "Xet is given up after two failures"


def test_progress_made_starts_the_count_anew(tmp_path: Path) -> None:
    source = Memory(ends=[1_100_000, 0, 0, 1_100_000, 0, 0])
    fetch(source, tmp_path)
    assert len(source.opened) == 7


def test_more_than_the_listed_size_is_refused(tmp_path: Path) -> None:
    source = Memory()
    file = RemoteFile("model.safetensors", 1_000_000, hashlib.sha256(CONTENT[:1_000_000]).hexdigest())
    with pytest.raises(Broken, match="more than the listed"):
        fetch_file(transfer(source, tmp_path), file)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_empty_file_needs_no_request(tmp_path: Path) -> None:
    source = Memory(files={"empty.json": b""})
    fetch_file(transfer(source, tmp_path), remote("empty.json", b""))
    assert (tmp_path / "empty.json").read_bytes() == b"" and source.opened == []


def test_a_stopped_run_keeps_what_it_has(tmp_path: Path) -> None:
    run = transfer(Memory(ends=[2_000_000]), tmp_path)
    threading.Timer(0.05, run.stop.set).start()
    slow = Transfer(run.source, run.listing, run.store, run.verified, run.meter, RetryPolicy(9, 30.0), run.stop)
    with pytest.raises(StoppedError):
        fetch_file(slow, remote("model.safetensors", CONTENT))
    assert run.store.partial(remote("model.safetensors", CONTENT)).stat().st_size == 2_000_000


def test_progress_is_in_mib_and_never_passes_its_end(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    meter = Meter(lambda *call: calls.append(call), "fetching, MiB", 3 << 20)
    for count in (1 << 19, 1 << 19, 1 << 20, -(1 << 20), 5 << 20):
        meter.add(count)
    assert calls == [("fetching, MiB", done, 3) for done in (0, 1, 2, 1, 3)]


def test_retry_after_is_obeyed_and_waits_double() -> None:
    class Refused(Exception):
        response = type("Reply", (), {"headers": {"retry-after": "7"}, "status_code": 429})()

    assert wait_seconds(Refused(), 1, QUICK) == 7.0 and is_passing(Refused())
    waits = [wait_seconds(Broken(), n, RetryPolicy(9, 1.0)) for n in (1, 2, 3, 4)]
    assert all(0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits))
    assert not is_passing(FileNotFoundError("x")) and not is_passing(PermissionError("x"))


@pytest.mark.parametrize(("code", "passing"), [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)])
def test_a_host_that_is_not_there_is_not_asked_again(code: int, passing: bool) -> None:
    error = ConnectionError("the client's own words")
    error.__cause__ = ConnectionError()
    error.__cause__.__cause__ = socket.gaierror(code, "what the resolver said")
    assert is_passing(error) == passing


@pytest.mark.parametrize("honours", [True, False])
def test_http_continues_where_the_server_can(monkeypatch: pytest.MonkeyPatch, honours: bool) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int(self.headers["Range"][6:-1]) if honours and "Range" in self.headers else 0
            assert self.headers["Accept-Encoding"] == "identity"
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-9/10")
            self.send_header("Content-Length", str(10 - start))
            self.end_headers()
            self.wfile.write(b"0123456789"[start:])

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with http_body(f"http://127.0.0.1:{server.server_port}/x", {}, 4) as body:
            assert (body.start, b"".join(body.chunks)) == ((4, b"456789") if honours else (0, b"0123456789"))
        server.shutdown()


def test_the_cache_shares_one_blob_among_equal_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.safetensors": CONTENT, "a.json": b"{}", "b.json": b"{}"}
    source = use(monkeypatch, Memory(files=files))
    result = download_repo(DownloadJob("org/name", "main"))
    assert len([path for path, _, _ in source.opened if path.endswith(".json")]) == 1
    assert {path: (result.path / path).read_bytes() for path in files} == files
    assert sorted(file.how for file in result.files) == ["fetched", "fetched", "reused"]
    assert (cache / "refs/main").read_text() == COMMIT


def test_a_full_disk_is_found_before_the_first_byte(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = use(monkeypatch, Memory())
    monkeypatch.setattr(download_module, "free_disk_bytes", lambda path: 60 << 20)
    with pytest.raises(InputError, match=r"no room .* 60\.0 MiB free"):
        download_repo(DownloadJob("org/name"))
    assert source.opened == []


def test_one_files_failure_stops_the_others_and_names_the_repository(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Memory(ends=[0] * 100))
    with pytest.raises(NetworkError, match="org/name@v1"):
        download_repo(DownloadJob("org/name", "v1"))


@pytest.mark.parametrize("revision", ["../up", "a//b", "."])
def test_a_revision_is_no_way_out_of_the_cache(cache: Path, revision: str) -> None:
    with pytest.raises(InputError, match="not a revision"):
        download_repo(DownloadJob("org/name", revision))


def test_a_folder_keeps_its_origin_until_somebody_changes_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Memory())
    folder = tmp_path / "here"
    download_repo(DownloadJob("org/name", local_dir=folder))
    assert resolve_model(str(folder)).source_id == "org/name" and resolve_model(str(folder)).revision == COMMIT
    (folder / "config.json").write_text("{ }")
    assert resolve_model(str(folder)).source_id == "here" and resolve_model(str(folder)).revision is None


def test_a_later_commit_replaces_a_folder_only_by_force(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    use(monkeypatch, Memory(files={"model-1.safetensors": b"old", "config.json": b"{}", "old.json": b"1"}))
    job = DownloadJob("org/name", local_dir=folder)
    download_repo(job)
    (folder / "notes.txt").write_text("mine")
    source = use(monkeypatch, Memory(files={"model.safetensors": b"new", "config.json": b"{}"}, commit=LATER))
    for other in (job, DownloadJob("org/other", local_dir=folder)):
        with pytest.raises(InputError, match=f"'org/name' at commit {COMMIT}"):
            download_repo(other)
    assert source.opened == [] and (folder / "old.json").exists()
    download_repo(DownloadJob("org/name", local_dir=folder, force=True))
    kept = {path.name for path in folder.iterdir()}
    assert kept == {".qwen-quant", "model.safetensors", "config.json", "notes.txt"}, "ours go, the user's own stay"


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_a_foreign_file_in_the_folder_is_not_overwritten(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("precious")
    place = folder / "config.json"
    place.write_text("mine") if kind == "file" else place.symlink_to(elsewhere)
    use(monkeypatch, Memory())
    with pytest.raises(InputError, match="nothing is overwritten"):
        download_repo(DownloadJob("org/name", local_dir=folder))
    download_repo(DownloadJob("org/name", local_dir=folder, force=True))
    assert place.read_bytes() == b"{}" and not place.is_symlink() and elsewhere.read_text() == "precious"


def test_an_equal_file_in_the_folder_is_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(CONTENT)
    source = use(monkeypatch, Memory())
    download_repo(DownloadJob("org/name", local_dir=folder))
    assert [path for path, _, _ in source.opened] == ["config.json"]


@pytest.mark.parametrize("name", ["sub", ".qwen-quant"])
def test_no_symlink_is_followed_out_of_the_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, outside = tmp_path / "here", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / name).symlink_to(outside)
    use(monkeypatch, Memory(files={"model.safetensors": CONTENT, "sub/a.json": b"{}"}))
    with pytest.raises(InputError, match="lies outside"):
        download_repo(DownloadJob("org/name", local_dir=folder, include=("*",), force=True))
    assert list(outside.iterdir()) == []


def test_guard_knows_dangling_links_and_dots(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "here")
    store.root.mkdir()
    (store.root / "sub").symlink_to(tmp_path / "nowhere")
    guard(store, store.root / "new" / "deep" / "file")
    for path in (store.root / "sub" / "file", store.root / ".." / "file"):
        with pytest.raises(InputError, match="lies outside"):
            guard(store, path)


def test_a_checked_file_is_not_read_again_until_it_changes(cache: Path) -> None:
    store = cache_store("org/name", COMMIT)
    file, verified = remote("config.json", b"{}"), Verified(store)
    store.home(file).parent.mkdir(parents=True)
    store.home(file).write_bytes(b"{}")
    assert is_complete(store, file, verified, recheck=False)
    before = store.home(file).stat()
    store.home(file).write_bytes(b"[]")
    os.utime(store.home(file), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_complete(store, file, Verified(store), recheck=False), "same size and time: taken from the record"
    assert not is_complete(store, file, Verified(store), recheck=True), "--recheck reads it"
    os.utime(store.home(file))
    assert not is_complete(store, file, Verified(store), recheck=False)


def test_a_read_only_cache_serves_what_it_has(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = use(monkeypatch, Memory())
    download_repo(DownloadJob("org/name"))
    asked = len(source.opened)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qwen_quant.hub.store.write_json_atomically", refuse)
    assert {file.how for file in download_repo(DownloadJob("org/name")).files} == {"reused"}
    assert len(source.opened) == asked


@dataclass(frozen=True)
class Streams:
    """Stands in for hf_xet's group of streams: gives `content` and then fails."""

    content: bytes

    def download_stream(self, info: object, start: int) -> Streams:
        return Streams(self.content[start:])

    def __iter__(self) -> Iterator[bytes]:
        yield self.content
        raise RuntimeError("Previous task error")

    def cancel(self) -> None:
        pass

    abort = cancel


def xet_listing() -> tuple[Listing, RemoteFile]:
    file = RemoteFile("model.safetensors", 10, "a" * 64, None, "b" * 64)
    return Listing("hf", "org/name", None, COMMIT, (file,)), file


def test_xet_that_fails_in_the_middle_leaves_the_file_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    listing, file = xet_listing()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(huggingface, "_connect", lambda url: Streams(b"01234"))
    hub = huggingface.HuggingFace()
    received = bytearray()
    with pytest.raises(Broken, match="Previous task error"), hub.open(listing, file, 2, plain=False) as body:
        for chunk in body.chunks:
            received += chunk
    assert (body.start, bytes(received)) == (2, b"234")
    asked: list[int] = []

    @contextmanager
    def http(url: str, headers: dict[str, str], start: int) -> Iterator[Body]:
        asked.append(start)
        yield Body(start, iter([b"56789"]))

    monkeypatch.setattr(huggingface, "http_body", http)
    with hub.open(listing, file, 5, plain=False) as body:
        assert b"".join(body.chunks) == b"56789" and asked == [5]


@pytest.mark.parametrize("error", [RuntimeError("handshake"), KeyError("casUrl"), ValueError("no JSON")])
def test_xet_that_does_not_connect_leaves_the_file_to_http(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(url: str) -> None:
        raise error

    listing, file = xet_listing()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(huggingface, "_connect", fail)
    with pytest.raises(Broken), huggingface.HuggingFace().open(listing, file, 0, plain=False):
        pass


@pytest.mark.parametrize(
    ("storage", "hub", "allowed"),
    [
        ("local:///data", "http://127.0.0.1:8000/api", True),
        ("local:///data", "http://localhost/api", True),
        ("local:///data", "http://[::1]:80/api", True),
        ("https://cas.example", "https://huggingface.co/api", True),
        ("local:///data", "https://huggingface.co/api", False),
        ("local:///data", "http://127.0.0.1.example/api", False),
        ("file:///data", "https://10.0.0.1/api", False),
    ],
)
def test_storage_on_this_disk_is_for_loopback_only(storage: str, hub: str, allowed: bool) -> None:
    if allowed:
        huggingface.check_storage(storage, hub)
        return
    with pytest.raises(NetworkError, match="storage"):
        huggingface.check_storage(storage, hub)
