"""Runs generated Python code in a jailed process of its own.

What holds (`SandboxResult.isolation` says how, since not every kernel gives everything):

- time: wall seconds for the whole run, CPU seconds per process; at the limit everything it started is killed;
- memory: address space per process (RLIMIT_AS); no core dumps; size of any one file; number of processes and threads;
- network: none.  An empty network namespace, or, where the kernel refuses one, a Python audit hook that forbids
  sockets to connect or bind and forbids starting processes at all;
- files: everything but the run's own temporary folder and its own /dev/shm is read-only (mount namespace), or
  Python-level writes elsewhere raise (audit hook); folders that usually hold credentials look empty (mount namespace
  only);
- environment: nothing of the caller's, so no tokens; hash seeds are fixed, so that a run repeats;
- as root, the program is another, unprivileged user.

It protects against accidents and simple attacks.  It is not a security boundary: the kernel's system calls are all
reachable, what the user may read can be read, sockets that are files (for example a container engine's under /run)
can be reached where their permissions allow, and the limit of memory is per process.  For hostile code use a virtual
machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_quant.errors import InputError

CHILD = Path(__file__).with_name("sandbox_child.py")
Status = Literal["passed", "failed", "exited early", "timed out", "out of memory"]
GRACE_SECONDS = 10.0  # for the supervisor to start and to report; then it is killed as well
# Under the home folder: looked at as empty inside. HF_HOME and friends come from the caller's environment.
CREDENTIAL_FOLDERS = (".ssh", ".aws", ".azure", ".config", ".docker", ".gnupg", ".kube", ".cache/huggingface")


@dataclass(frozen=True)
class SandboxLimits:
    """What one run may use.

    Args:
        wall_seconds: from the program's start to its end; far above cpu_seconds, so that a busy machine fails no one.
        cpu_seconds: user and system time per process, rounded up to whole seconds.
        memory_bytes: address space per process.
        file_bytes: any one written file, and all of /dev/shm.
        processes: processes and threads at one time, the program's first thread included.
        output_bytes: how much of the end of stdout and of stderr is kept, each.
        namespaces: False uses the audit hook even where the kernel gives namespaces.
    """

    wall_seconds: float = 60.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 64 << 20
    processes: int = 16
    output_bytes: int = 1 << 16
    namespaces: bool = True


@dataclass(frozen=True)
class Isolation:
    """What kept the program in.

    Args:
        network: "namespace", or "audit hook" with the kernel's reason for refusing namespaces.
        processes: "namespace" (all are killed with the program), or "audit hook" (starting any is forbidden).
        files: "read-only" outside the run's folder, "audit hook", or "user permissions" with the reason.
        user: "caller" (the same user), or "own user id" when the caller is root.
    """

    network: str
    processes: str
    files: str
    user: str


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended.

    Args:
        status: "passed" only when the code ran to its end; "exited early" when it ended its process before (sys.exit,
            os._exit); "failed" when it raised or was killed by a signal.
        detail: one line: the exception, the exit code, the signal or the limit.
        stdout: the last `output_bytes` of it, as UTF-8.
        stderr: likewise.
        truncated: whether either was longer.
        seconds: wall time of the program, the sandbox's own start not included.
        isolation: see there.
    """

    status: Status
    detail: str
    stdout: str
    stderr: str
    truncated: bool
    seconds: float
    isolation: Isolation


def run_code(
    code: str, *, limits: SandboxLimits, files: Sequence[Path] = (), module_name: str = "__main__"
) -> SandboxResult:
    """Runs `code` to its end in a sandbox whose working folder holds copies of `files`.

    Args:
        code: Python source, executed as one module by the Python that runs this package, with its installed packages.
        limits: what it may use.
        files: copied into the working folder under their own names.
        module_name: the module's `__name__`; another than "__main__" leaves `if __name__ == "__main__"` blocks out.

    Errors: InputError when a file is missing or the sandbox itself cannot be set up.
    """
    with tempfile.TemporaryDirectory(prefix="qwen-quant-sandbox-", ignore_cleanup_errors=True) as folder:
        for path in files:
            if not path.is_file():
                raise InputError(f"{path} is not there", "the code is to run with this file beside it")
            shutil.copy(path, Path(folder) / path.name)
        report = _run_supervisor(job_of(code, limits, module_name, Path(folder)), Path(folder), limits)
    return read_report(report, limits)


def job_of(code: str, limits: SandboxLimits, module_name: str, folder: Path) -> dict[str, Any]:
    """What the supervisor is told: the limits by name, `code`, `module_name` and `hidden` (folders to cover)."""
    hidden = [str(path) for path in credential_folders(os.environ) if path not in folder.resolve().parents]
    return asdict(limits) | {"code": code, "module_name": module_name, "hidden": hidden}


def probe_isolation(limits: SandboxLimits) -> Isolation:
    """What would keep a program in on this machine: runs an empty one (InputError when no sandbox can be set up)."""
    return run_code("", limits=limits).isolation


def credential_folders(environment: Mapping[str, str]) -> list[Path]:
    """Existing folders that usually hold credentials, without any that holds the running Python."""
    home = Path(environment.get("HOME") or "/nonexistent")
    named = [Path(environment[name]) for name in ("HF_HOME", "XDG_CONFIG_HOME") if environment.get(name)]
    python = [Path(root).resolve() for root in (sys.prefix, sys.base_prefix, str(CHILD))]
    found = {path.resolve() for path in [*(home / name for name in CREDENTIAL_FOLDERS), *named] if path.is_dir()}
    return sorted(path for path in found if not any(path == root or path in root.parents for root in python))


def _environment(folder: Path) -> dict[str, str]:
    """All the environment the program sees."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(folder),
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PYTHONHASHSEED": "0",
        **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
    }


def _run_supervisor(job: dict[str, Any], folder: Path, limits: SandboxLimits) -> dict[str, Any]:
    """The supervisor's report, or {} when it had to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=_environment(folder),
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(json.dumps(job).encode(), limits.wall_seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return {}
    finally:
        _kill(process)
    if process.returncode or not output:
        lines = errors.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise InputError("the sandbox for generated code cannot start", lines[-1], "run without the code tasks")
    return dict(json.loads(output))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the supervisor if it still runs; the kernel then ends the program (parent-death signal)."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def read_report(report: dict[str, Any], limits: SandboxLimits) -> SandboxResult:
    """A supervisor's report as a result.

    Errors: InputError when the program could not be jailed.
    """
    if not report:
        unknown = Isolation("unknown", "unknown", "unknown", "unknown")
        detail = "the sandbox did not answer after the wall limit and was killed"
        return SandboxResult("timed out", detail, "", "", False, limits.wall_seconds + GRACE_SECONDS, unknown)
    try:
        end = dict(json.loads(report["report"] or "{}"))
    except (ValueError, TypeError):  # the program wrote there
        end = {}
    if end.get("end") == "not started":
        raise InputError("the sandbox for generated code cannot start", end["message"], "run without the code tasks")
    status, detail = _verdict(report, end, limits)
    return SandboxResult(
        status=status,
        detail=detail,
        stdout=report["stdout"],
        stderr=report["stderr"],
        truncated=report["truncated"],
        seconds=report["seconds"],
        isolation=Isolation(**report["isolation"]),
    )


def _verdict(report: dict[str, Any], end: dict[str, Any], limits: SandboxLimits) -> tuple[Status, str]:
    """Status and one line of detail."""
    exit_status = int(report["exit_status"])
    if report["wall_limit_hit"]:
        return "timed out", f"wall limit of {limits.wall_seconds:g} s"
    # The kernel enforces the CPU limit by clock ticks, which on a busy machine run ahead of the time it reports.
    if exit_status == -signal.SIGKILL and report["program_cpu_seconds"] >= 0.5 * limits.cpu_seconds:
        return "timed out", f"CPU limit of {limits.cpu_seconds:g} s"
    if exit_status < 0:
        return "failed", f"killed by {signal.Signals(-exit_status).name}"
    if end.get("end") == "finished":
        return "passed", ""
    if end.get("end") == "raised":
        status: Status = "out of memory" if "MemoryError" in end["type"] else "failed"
        return status, f"{end['type']}: {end['message']}".rstrip(": ")
    code = end.get("code", str(exit_status))
    return "exited early", f"the program ended its process (exit code {code}) before the end of the code"
