"""A model named on the command line -> a local folder with exactly the files that are needed, every hash checked.

The order of a download: the revision becomes a commit; the files of that commit are listed with their hashes; names and
kinds are checked (`plan_files`); what is here already and right is kept; the disk is checked for the rest; the rest is
fetched in parallel, each file continued where an earlier run left it (`fetch`), hashed, and only then given its name
(`store`, which also says how the cache and a plain folder are laid out). Without network (HF_HUB_OFFLINE=1) the same
checks run over the listing that was kept, or over the names of the cache, which are hashes themselves.

Everything after the listing is the same for the Hugging Face hub and ModelScope (`transport.Source`).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwen_quant.environment import free_disk_bytes
from qwen_quant.errors import InputError
from qwen_quant.hub import offline
from qwen_quant.hub.failures import client_errors
from qwen_quant.hub.fetch import FetchedFile, Meter, Transfer, fetch_file
from qwen_quant.hub.folder import check_place, known_origin, record
from qwen_quant.hub.huggingface import HuggingFace
from qwen_quant.hub.modelscope import ModelScope, default_folder
from qwen_quant.hub.plan_files import Listing, RemoteFile, Selection, select
from qwen_quant.hub.store import Store, Verified, cache_store, folder_store, is_complete, link, locked
from qwen_quant.hub.transport import RetryPolicy, Source, StoppedError, patiently
from qwen_quant.progress import ProgressFn, no_progress
from qwen_quant.units import format_bytes

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SOURCES: dict[str, Callable[[], Source]] = {"hf": HuggingFace, "modelscope": ModelScope}
WORKERS = 6
# Room beside the files themselves: state, links, and what the file system needs to stay usable.
SPARE_BYTES = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint lies and what to call it.

    Attributes:
        path: the local folder.
        source_id: the hub id, or the folder's name.
        revision: the commit on the hub, None for a local folder of unknown origin.
    """

    path: Path
    source_id: str
    revision: str | None


@dataclass(frozen=True)
class DownloadJob:
    """What to fetch, and where to.

    Attributes:
        repo: org/name.
        revision: branch, tag or commit; None is the default branch.
        source: "hf" or "modelscope".
        local_dir: a plain folder; None is the hub's cache (ModelScope: a folder in its cache).
        include: shell patterns that replace the list of needed files (see `plan_files`).
        exclude: shell patterns of files to leave out.
        force: replace other content in `local_dir`.
        recheck: read and hash files again that were found right before.
        data_files: names that look like pickles and are known to be plain data (see `plan_files.select`).
    """

    repo: str
    revision: str | None = None
    source: str = "hf"
    local_dir: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    force: bool = False
    recheck: bool = False
    data_files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """org/name, with "@revision" where one was asked for."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class DownloadResult:
    """What a download left.

    Attributes:
        path: the folder with the files.
        commit: where every file comes from.
        files: every file with its hash and how it came.
        left_out: path -> why, for every other file of the repository.
        total_bytes: of all files.
        fetched_bytes: received in this run.
        seconds: wall time.
        offline: whether the network was not asked.
    """

    repo: str
    source: str
    revision: str | None
    commit: str
    path: Path
    files: tuple[FetchedFile, ...]
    left_out: dict[str, str]
    total_bytes: int
    fetched_bytes: int
    seconds: float
    offline: bool


def resolve_model(model: str, progress: ProgressFn = no_progress) -> ModelSource:
    """Find the folder of `model` ("path/to/folder" or "org/name[@revision]"); a local folder wins over the hub.

    Errors: InputError for what is neither, NetworkError when the hub does not give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        origin = known_origin(folder)
        return ModelSource(folder, *origin) if origin else ModelSource(folder, folder.resolve().name, None)
    match = HUB_ID.fullmatch(model)
    if folder.exists() or match is None:
        reason = "it is a file" if folder.exists() else "no such folder, and it is not a hub id"
        raise InputError(
            f"'{model}' is not a checkpoint", reason, "give a checkpoint folder or a hub id org/name[@revision]"
        )
    done = download_repo(DownloadJob(match["repo"], match["revision"]), progress)
    return ModelSource(done.path, done.repo, done.commit)


def parse_repo(text: str) -> tuple[str, str | None]:
    """(repo, revision) of "org/name[@revision]" (InputError for anything else)."""
    match = HUB_ID.fullmatch(text)
    if match is None:
        raise InputError(f"'{text}' is not a hub id", next_step="give org/name or org/name@revision")
    return match["repo"], match["revision"]


def download_repo(job: DownloadJob, progress: ProgressFn = no_progress) -> DownloadResult:
    """Bring the needed files of a repository here and check every one of them.

    Errors: InputError for names, kinds and places that are refused and for a full disk; NetworkError naming the
    repository (and the file) for what the hub does not give.
    """
    _check_job(job)
    started, source = time.monotonic(), SOURCES[job.source]()
    policy, stop = RetryPolicy(), threading.Event()
    try:
        listing = _listing(job, source, policy, stop)
        is_offline = listing is None
        if listing is None:
            listing = offline.listing(job.repo, job.revision, _folder(job))
        chosen = select(listing, job.include, job.exclude, job.data_files)
        store = _store(job, listing)
        with locked(store):
            verified = Verified(store)
            transfer = Transfer(source, listing, store, verified, Meter(no_progress, "", 0), policy, stop)
            files = _obtain(job, transfer, chosen, progress, is_offline)
    except client_errors() as error:
        raise source.failure(job.name, error) from error
    finally:
        source.close()
    fetched = sum(file.bytes_fetched for file in files)
    seconds = time.monotonic() - started
    return DownloadResult(
        job.repo, job.source, job.revision, listing.commit, store.folder, files, chosen.left_out, chosen.size, fetched,
        seconds, is_offline,
    )  # fmt: skip


def _check_job(job: DownloadJob) -> None:
    """A revision becomes part of a path in the cache, and a folder must be one."""
    if job.revision is not None and any(part in ("", ".", "..") for part in job.revision.split("/")):
        raise InputError(f"'{job.revision}' is not a revision", next_step="give a branch, tag or commit")
    folder = _folder(job)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file", next_step="give a folder with --local-dir")


def _folder(job: DownloadJob) -> Path | None:
    """The plain folder that the job writes to, None for the hub's cache."""
    if job.local_dir is None:
        return default_folder(job.repo) if job.source == ModelScope.name else None
    return job.local_dir.expanduser().absolute()


def _store(job: DownloadJob, listing: Listing) -> Store:
    folder = _folder(job)
    return cache_store(job.repo, listing.commit) if folder is None else folder_store(folder)


def _listing(job: DownloadJob, source: Source, policy: RetryPolicy, stop: threading.Event) -> Listing | None:
    """The revision's commit and files from the source; None when there is to be no network."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return None
    return patiently(lambda: source.listing(job.repo, job.revision), policy, stop)


def _obtain(
    job: DownloadJob, run: Transfer, chosen: Selection, progress: ProgressFn, is_offline: bool
) -> tuple[FetchedFile, ...]:
    """Every chosen file in its place: what is right stays, the rest is fetched (an error when offline)."""
    store, by_home = run.store, _by_home(run.store, chosen.files)
    firsts = [files[0] for files in by_home.values()]
    checking = Meter(progress, "checking what is here, MiB", chosen.size)
    here = _in_parallel(firsts, lambda file: _check(run, file, checking, recheck=job.recheck), run)
    missing = [file for file, complete in zip(firsts, here, strict=True) if not complete]
    if missing and is_offline:
        raise offline.incomplete(job.name, [file.path for file in missing])
    check_place(job.name, run, missing, force=job.force)
    _check_disk(run, missing)
    if not is_offline:
        record(run, complete=False)
    done: dict[Path, FetchedFile] = {}
    if missing:
        label = f"fetching {len(missing)} file{'s' if len(missing) > 1 else ''}, MiB"
        meter = Meter(progress, label, sum(file.size for file in missing))
        meter.add(sum(_partial_bytes(store, file) for file in missing))
        fetching = Transfer(run.source, run.listing, store, run.verified, meter, run.policy, run.stop)
        biggest_first = sorted(missing, key=lambda file: -file.size)
        fetched = _in_parallel(biggest_first, lambda file: fetch_file(fetching, file), run)
        done = {store.home(file): result for file, result in zip(biggest_first, fetched, strict=True)}
    for file in chosen.files:
        link(store, file)
    if not is_offline:
        record(run, complete=True)
    return tuple(_outcome(file, done.get(store.home(file))) for file in chosen.files)


def _by_home(store: Store, files: Iterable[RemoteFile]) -> dict[Path, list[RemoteFile]]:
    """Files by where their bytes go: in the cache, equal contents share one blob and are fetched once."""
    groups: dict[Path, list[RemoteFile]] = {}
    for file in files:
        groups.setdefault(store.home(file), []).append(file)
    return groups


def _outcome(file: RemoteFile, fetched: FetchedFile | None) -> FetchedFile:
    """What became of a file: fetched itself, or there before (or under another name with the same content)."""
    if fetched is not None and fetched.path == file.path:
        return fetched
    return FetchedFile(file.path, file.size, file.sha256, file.blob_id, "reused")


def _check(run: Transfer, file: RemoteFile, meter: Meter, *, recheck: bool) -> bool:
    complete = is_complete(run.store, file, run.verified, recheck=recheck)
    meter.add(file.size)
    return complete


def _partial_bytes(store: Store, file: RemoteFile) -> int:
    """Bytes of an earlier run that will be continued."""
    partial = store.partial(file)
    size = partial.stat().st_size if partial.is_file() and not partial.is_symlink() else 0
    return size if size <= file.size else 0


def _in_parallel(files: list[RemoteFile], work: Callable[[RemoteFile], T], run: Transfer) -> list[T]:
    """`work` of every file, in their order; the first failure (or Ctrl-C) stops the others and is raised."""
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="download") as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() and future.exception() is None for future in futures):
                run.stop.set()
                run.source.close()
                for future in futures:
                    future.cancel()
                wait(futures)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
        return [future.result() for future in futures]


def _check_disk(run: Transfer, missing: list[RemoteFile]) -> None:
    """Room for what is still to come (else InputError with both figures)."""
    need = sum(file.size - _partial_bytes(run.store, file) for file in missing)
    free = free_disk_bytes(run.store.root)
    if missing and need + SPARE_BYTES > free:
        raise InputError(
            f"no room for '{run.listing.name}'",
            f"{format_bytes(need)} are still to be fetched, and {run.store.root} has {format_bytes(free)} free",
            "free some space, or give a folder on another disk with --local-dir (for the cache: HF_HOME)",
        )
