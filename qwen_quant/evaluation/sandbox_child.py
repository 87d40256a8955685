"""The supervising process of `sandbox.py`: started as a script, it jails and runs one program and reports in JSON.

It is never imported by the package and imports only the standard library, because it runs with an empty environment
and in the jail's own working folder.  Input: one JSON job on stdin (see `sandbox.job_of`).  Output: one JSON object
on stdout (see `sandbox.read_report`).

Two processes.  The supervisor (this script) makes the namespaces and mounts, forks the program, keeps the tails of
its output, and kills it at the wall limit.  The program is process 1 of a process-id namespace, so that the kernel
kills all it started, whatever it did to signals or sessions, when it ends.  Root becomes an own, unused user id
first.

System call numbers and constants are those of linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import math
import os
import resource
import selectors
import signal
import struct
import sys
import time
import traceback
import types
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
CAPABILITY_VERSION_3 = 0x20080522
CAP_CHOWN, CAP_DAC_READ_SEARCH, CAP_SETGID, CAP_SETUID = 0, 2, 6, 7
POLL_SECONDS = 0.01
OWN_UIDS = range(61184, 65520)  # those systemd keeps for dynamic users; also exist where a container maps 65536 ids
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Without namespaces: what Python code may not do (audit events, https://docs.python.org/3/library/audit_events.html).
BLOCKED_EVENTS = frozenset(
    "socket.connect socket.bind socket.sendto socket.sendmsg socket.getaddrinfo socket.gethostbyname "
    "socket.gethostbyaddr os.fork os.forkpty os.system os.exec os.posix_spawn os.spawn subprocess.Popen pty.spawn "
    "os.kill os.killpg os.putenv".split()
)
PATH_EVENTS = frozenset(
    "os.remove os.rename os.rmdir os.mkdir os.truncate os.chmod os.chown os.link os.symlink shutil.rmtree".split()
)
Job = dict[str, Any]
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A libc function that answers -1 on failure: then OSError with its errno."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def set_read_only(path: str, *, recursive: bool, read_only: bool) -> None:
    """Makes the mount at `path` (recursive: and all below) read-only, or writable again; Linux 5.12 or newer."""
    wanted = (MOUNT_ATTR_RDONLY, 0) if read_only else (0, MOUNT_ATTR_RDONLY)
    attributes = struct.pack("=QQQQ", *wanted, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(len(attributes))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size)


def enter_namespaces() -> None:
    """New network (no interface is up), process-id, mount and IPC namespaces; inside a user namespace unless root."""
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        call("unshare", flags)
        return
    call("unshare", flags | CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def protect_files(folder: str, hidden: list[str], shared_memory_bytes: int) -> None:
    """Everything read-only but `folder` and /dev/shm (own, empty); the folders `hidden` look empty."""
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount(folder, folder, "none", MS_BIND)
    os.chdir(folder)  # onto the new mount
    for path in hidden:
        mount("none", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    mount("none", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"size={shared_memory_bytes},mode=1777")
    set_read_only("/", recursive=True, read_only=True)
    set_read_only(folder, recursive=False, read_only=False)
    set_read_only("/dev/shm", recursive=False, read_only=False)


def isolate(job: Job) -> dict[str, str]:
    """Jails this process as far as the kernel allows and says how far: see `sandbox.Isolation`."""
    try:
        if not job["namespaces"]:
            raise OSError("not wanted")
        enter_namespaces()
    except OSError as error:
        why = f" (namespaces: {error})"
        return {"network": "audit hook" + why, "processes": "audit hook", "files": "audit hook"}
    try:
        protect_files(os.getcwd(), job["hidden"], job["file_bytes"])
        files = "read-only"
    except OSError as error:
        files = f"user permissions ({error})"
    return {"network": "namespace", "processes": "namespace", "files": files}


def own_uid() -> int | None:
    """A user id that nothing else should have, when this is root and may become it."""
    if os.geteuid() != 0:
        return None
    needed = [CAP_CHOWN, CAP_SETGID, CAP_SETUID] + [CAP_DAC_READ_SEARCH] * python_is_private()
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    able = all(effective >> capability & 1 for capability in needed)
    return OWN_UIDS[os.getpid() % len(OWN_UIDS)] if able else None


def python_is_private() -> bool:
    """Whether a stranger could not read this Python (for example one under /root)."""
    for start in (os.path.realpath(os.__file__), sys.prefix):
        path = start
        while path != "/":
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & 0o001:
                return True
    return False


def drop_privileges(uid: int | None) -> None:
    """Becomes `uid` (None: stays) without capabilities and without a way to new ones.

    Where this Python is private to root, reading past file permissions is the one capability kept.
    """
    keep = 1 << CAP_DAC_READ_SEARCH if uid is not None and python_is_private() else 0
    if uid is not None:
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    call("capset", header, struct.pack("=IIIIII", keep, keep, 0, 0, 0, 0))
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def set_limits(job: Job) -> None:
    """Resource limits of the program and of each process it starts; their number counts the program too."""
    cpu = math.ceil(job["cpu_seconds"])
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def set_process_limit(processes: int, namespaced: bool) -> None:
    """RLIMIT_NPROC counts per user and user namespace: the supervisor is one more, or all that the user runs."""
    others = 1 if namespaced else sum(_tasks_of(os.geteuid()))
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    value = processes + others if hard == resource.RLIM_INFINITY else min(processes + others, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (value, value))


def _tasks_of(uid: int) -> list[int]:
    """Threads of each process of a user."""
    counts = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                counts.append(len(os.listdir(f"/proc/{name}/task")))
        except OSError:
            continue
    return counts


def install_audit_hook(folder: str) -> None:
    """The fallback where the kernel gives no namespaces: Python-level network, process and write attempts raise."""
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in BLOCKED_EVENTS:
            raise PermissionError(f"the sandbox forbids {event}")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS
        if not (writes or event in PATH_EVENTS) or not isinstance(arguments[0], str | bytes):
            if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith("/proc/"):
                raise PermissionError("the sandbox forbids /proc")
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not (path + os.sep).startswith(inside) and path != os.devnull:
            raise PermissionError(f"the sandbox forbids {event} outside its folder: {path}")

    sys.addaudithook(hook)


def run_program(job: Job, report_fd: int) -> None:
    """Executes the code as module `module_name` and writes one line of JSON to `report_fd` when it ends by itself.

    The line names how it ended: finished, raised (type, message) or exit (code).  A process that the code forked and
    that runs to the end of the code reports nothing.
    """
    program = os.getpid()
    module = types.ModuleType(job["module_name"])
    sys.modules[job["module_name"]] = module
    sys.argv = ["program.py"]
    linecache.cache["program.py"] = (len(job["code"]), None, job["code"].splitlines(True), "program.py")
    report: dict[str, Any] = {"end": "finished"}
    try:
        exec(compile(job["code"], "program.py", "exec"), module.__dict__)
    except MemoryError:
        report = {"end": "raised", "type": "MemoryError", "message": ""}
    except SystemExit as error:
        report = {"end": "exit", "code": str(error.code)}
    except BaseException as error:  # noqa: BLE001 - whatever the program raises is its result
        report = {"end": "raised", "type": type(error).__name__, "message": str(error)[:300]}
        traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    if os.getpid() == program:
        os.write(report_fd, json.dumps(report).encode())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def become_program(job: Job, isolation: dict[str, str], uid: int | None, pipes: dict[str, int]) -> None:
    """In the forked child: from the supervisor's privileges down to the program's, then the program. Never returns."""
    report_fd = pipes["report"]
    try:
        os.setsid()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(pipes[name], descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        report_fd = os.dup2(pipes["report"], 3, inheritable=False)
        os.closerange(4, 65536)
        set_limits(job)
        drop_privileges(uid)
        namespaced = isolation["processes"] == "namespace"
        set_process_limit(job["processes"], namespaced)
        if not namespaced:
            install_audit_hook(os.getcwd())
    except BaseException as error:  # noqa: BLE001 - nothing of the supervisor may run in this process
        os.write(report_fd, json.dumps({"end": "not started", "message": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    try:
        run_program(job, report_fd)
    finally:
        os._exit(0)


class Tail:
    """The last `limit` bytes of a stream, and how many there were."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self.data = limit, 0, bytearray()

    def add(self, chunk: bytes) -> None:
        """Appends, forgets what is too old."""
        self.total += len(chunk)
        self.data += chunk
        del self.data[: -self.limit]


def supervise(pid: int, ends: dict[str, int], job: Job) -> dict[str, Any]:
    """Reads the program's pipes until it ended or its wall time is over, then kills what is left of it."""
    tails = {name: Tail(job["output_bytes"]) for name in ends}
    started = time.monotonic()
    done, killed = 0, False
    with selectors.DefaultSelector() as selector:
        for name, descriptor in ends.items():
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ, name)
        while not done:
            _drain(selector, tails, POLL_SECONDS)
            if time.monotonic() - started > job["wall_seconds"] and not killed:
                killed = True
                os.kill(pid, signal.SIGKILL)
            done, status, usage = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - started
        try:
            os.killpg(pid, signal.SIGKILL)  # without namespaces: what it left behind
        except (ProcessLookupError, PermissionError):
            pass
        while _drain(selector, tails, 0):
            pass
    return {
        "exit_status": os.waitstatus_to_exitcode(status),
        "wall_limit_hit": killed,
        "seconds": seconds,
        "program_cpu_seconds": usage.ru_utime + usage.ru_stime,
        "report": bytes(tails["report"].data).decode(errors="replace"),
        "stdout": bytes(tails["stdout"].data).decode(errors="replace"),
        "stderr": bytes(tails["stderr"].data).decode(errors="replace"),
        "truncated": any(tail.total > tail.limit for tail in tails.values()),
    }


def _drain(selector: selectors.BaseSelector, tails: dict[str, Tail], timeout: float) -> int:
    """Reads once from every pipe that has something; bytes read."""
    if not selector.get_map():
        time.sleep(timeout)
        return 0
    count = 0
    for key, _ in selector.select(timeout):
        chunk = os.read(key.fd, 1 << 16)
        count += len(chunk)
        tails[key.data].add(chunk)
        if not chunk:
            selector.unregister(key.fd)
    return count


def main() -> None:
    """Reads the job, runs it, writes the report."""
    job: Job = json.load(sys.stdin)
    uid = own_uid()
    if uid is not None:
        os.chown(".", uid, uid)
    isolation = isolate(job)
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "report")}
    pid = os.fork()
    if pid == 0:
        become_program(job, isolation, uid, {name: write for name, (_, write) in pipes.items()})
    for _, write in pipes.values():
        os.close(write)
    result = supervise(pid, {name: read for name, (read, _) in pipes.items()}, job)
    isolation["user"] = "caller" if uid is None else "own user id"
    sys.stdout.write(json.dumps(result | {"isolation": isolation}))


if __name__ == "__main__":
    main()
