"""The sandbox against what generated code does by accident or on purpose, under small limits."""

from __future__ import annotations

import os
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_quant.errors import InputError
from qwen_quant.evaluation import sandbox
from qwen_quant.evaluation.sandbox import SandboxLimits, SandboxResult, credential_folders, probe_isolation, run_code

LIMITS = SandboxLimits(wall_seconds=60, cpu_seconds=5, memory_bytes=512 << 20, file_bytes=1 << 20, processes=8)
HOOK = SandboxLimits(wall_seconds=60, cpu_seconds=5, memory_bytes=512 << 20, processes=8, namespaces=False)
BOTH = pytest.mark.parametrize("limits", [LIMITS, HOOK], ids=["namespaces", "hook"])


def run(code: str, limits: SandboxLimits = LIMITS) -> SandboxResult:
    return run_code(textwrap.dedent(code), limits=limits)


def quick(wall_seconds: float, **others: int) -> SandboxLimits:
    return SandboxLimits(wall_seconds=wall_seconds, memory_bytes=512 << 20, processes=8, **others)


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skips what only namespaces promise where the kernel gives none."""
    isolation = run("pass").isolation
    if isolation.network != "namespace" or isolation.files != "read-only":
        pytest.skip(f"the kernel refuses namespaces: {isolation}")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[str]:
    """A word to find left-over processes by, with the check that there are none at the end."""
    word = f"qwen-quant-test-{os.getpid()}-{time.monotonic_ns()}"
    yield word
    deadline = time.monotonic() + 5
    while (left := _processes_with(word)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"still running: {left}"


def _processes_with(word: str) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes()
        except OSError:
            continue
        if word.encode() in command and int(name) != os.getpid():
            found.append(name)
    return found


def test_the_isolation_can_be_asked_for_beforehand() -> None:
    assert probe_isolation(HOOK).network.startswith("audit hook")
    assert probe_isolation(LIMITS) == run("pass").isolation


@BOTH
def test_a_program_that_ends_passes_with_its_output(limits: SandboxLimits) -> None:
    result = run("import sys\nprint('哈 out')\nprint('err', file=sys.stderr)", limits)
    assert (result.status, result.detail, result.truncated) == ("passed", "", False)
    assert (result.stdout, result.stderr) == ("哈 out\n", "err\n")
    assert 0 < result.seconds < LIMITS.wall_seconds


def test_an_exception_fails_and_names_itself_and_its_line() -> None:
    result = run("x = 1\nassert x == 2, 'not two'\n")
    assert (result.status, result.detail) == ("failed", "AssertionError: not two")
    assert "line 2" in result.stderr and "assert x == 2" in result.stderr
    assert "sandbox_child" not in result.stderr
    assert run("def f(:\n").detail.startswith("SyntaxError")


@BOTH
@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(0)", "raise SystemExit", "exit()", "import os; os._exit(0)", "import os; os._exit(3)"],
)
def test_leaving_before_the_end_is_no_pass(code: str, limits: SandboxLimits) -> None:
    result = run(f"{code}\nassert False", limits)
    assert result.status == "exited early"
    assert "exit code" in result.detail


def test_a_forked_child_that_reaches_the_end_is_no_pass() -> None:
    result = run("import os\nif os.fork():\n    os.wait()\n    assert False")
    assert result.status == "failed"


@BOTH
def test_an_endless_loop_hits_the_cpu_limit(limits: SandboxLimits) -> None:
    shorter = SandboxLimits(wall_seconds=120, cpu_seconds=1, namespaces=limits.namespaces)
    result = run("while True: pass", shorter)
    assert (result.status, result.detail) == ("timed out", "CPU limit of 1 s")


@BOTH
def test_sleeping_hits_the_wall_limit(limits: SandboxLimits) -> None:
    started = time.monotonic()
    result = run("import time; time.sleep(60)", SandboxLimits(wall_seconds=0.5, namespaces=limits.namespaces))
    assert (result.status, result.detail) == ("timed out", "wall limit of 0.5 s")
    assert time.monotonic() - started < 30  # on a busy machine too


def test_ignoring_every_signal_does_not_help() -> None:
    code = """
    import signal, time
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    print('ready', flush=True)
    while True: time.sleep(1)
    """
    result = run(code, quick(1.0))
    assert (result.status, result.stdout) == ("timed out", "ready\n")


def test_children_that_ignore_sigterm_in_their_own_session_die_with_the_program(marker: str) -> None:
    code = f"""
    import subprocess
    script = 'trap "" TERM HUP INT; echo up; sleep 300; : {marker}'
    child = subprocess.Popen(['setsid', 'sh', '-c', script], stdout=subprocess.PIPE)
    print(child.stdout.readline().decode(), end='')
    """
    result = run(code)
    if result.isolation.processes == "namespace":
        assert (result.status, result.stdout) == ("passed", "up\n")  # and `marker` finds none left
    else:
        assert "PermissionError" in result.detail


@BOTH
def test_memory_is_limited(limits: SandboxLimits) -> None:
    result = run("x = bytearray(4 << 30)", limits)
    assert result.status == "out of memory"
    growing = run("rows = []\nwhile True: rows.append('x' * 10_000_000 + str(len(rows)))", limits)
    assert growing.status == "out of memory"


def test_a_fork_bomb_stays_within_the_process_limit(namespaces: None) -> None:
    code = """
    import os, time
    alive = 0
    for _ in range(64):  # bounded: never more than 64, even without a limit
        try:
            pid = os.fork()
        except BlockingIOError:
            break
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        alive += 1
    print(alive)
    """
    result = run(code)
    assert result.status == "passed"
    assert 1 <= int(result.stdout) <= LIMITS.processes
    assert result.seconds < 25  # the children's 30 s of sleep did not hold it up


def test_without_namespaces_starting_processes_is_forbidden() -> None:
    for code in ("import os; os.fork()", "import os; os.system('true')", "import subprocess; subprocess.run(['true'])"):
        result = run(code, HOOK)
        assert result.status == "failed" and "the sandbox forbids" in result.detail, (code, result.detail)
    assert result.isolation.processes == "audit hook"


@BOTH
def test_the_network_is_not_there(limits: SandboxLimits) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        result = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2).sendall(b'hello')", limits)
        assert result.status == "failed"
        assert any(word in result.detail for word in ("PermissionError", "unreachable", "refused")), result.detail
        with pytest.raises(TimeoutError):
            server.accept()
    assert result.isolation.network.startswith("namespace" if limits.namespaces else "audit hook")


def test_the_listener_of_the_network_test_can_be_reached_from_outside() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(2)
        socket.create_connection(server.getsockname(), 2).close()
        server.accept()[0].close()


@BOTH
def test_the_environment_is_empty(limits: SandboxLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run("import os\nprint(sorted(os.environ))\nprint(open('/proc/self/environ').read())", limits)
    assert "hf_secret" not in result.stdout and "HF_TOKEN" not in result.stdout
    assert "PATH" in result.stdout


@BOTH
def test_the_callers_environment_cannot_be_read_through_proc(
    limits: SandboxLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
    for pid in ({os.getpid()}, {os.getppid()}):
        try:
            print(len(open(f'/proc/{{pid}}/environ', 'rb').read()))
        except OSError as error:
            print(type(error).__name__)
    """
    assert run(code, limits).stdout.split() in (["PermissionError"] * 2, ["FileNotFoundError"] * 2)


def test_credential_folders_look_empty(namespaces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_text("private")
    tmp_path.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(f"import os; print(os.listdir({str(tmp_path / '.ssh')!r}))").stdout == "[]\n"


def test_credential_folders_never_cover_the_running_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / ".config" / "python"
    python.mkdir(parents=True)
    (tmp_path / ".ssh").mkdir()
    assert credential_folders({"HOME": str(tmp_path)}) == [tmp_path / ".config", tmp_path / ".ssh"]
    monkeypatch.setattr(sandbox.sys, "prefix", str(python))
    assert credential_folders({"HOME": str(tmp_path)}) == [tmp_path / ".ssh"]


@BOTH
def test_writing_outside_the_working_folder_is_refused(limits: SandboxLimits, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    outside = tmp_path / "outside.txt"
    result = run(f"open('inside.txt', 'w').write('x')\nopen({str(outside)!r}, 'w').write('x')", limits)
    if limits.namespaces and result.isolation.files.startswith("user permissions"):
        pytest.skip(result.isolation.files)
    assert result.status == "failed"
    assert any(word in result.detail for word in ("Read-only file system", "the sandbox forbids")), result.detail
    assert not outside.exists()


@BOTH
def test_deleting_outside_the_working_folder_is_refused(limits: SandboxLimits, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    victim = tmp_path / "victim.txt"
    victim.write_text("here")
    victim.chmod(0o666)
    assert run(f"import os; os.remove({str(victim)!r})", limits).status == "failed"
    assert victim.read_text() == "here"


def test_the_working_folder_is_the_runs_own_and_goes_away() -> None:
    first = run("import os; open('kept', 'w').close(); print(os.getcwd(), os.listdir())")
    folder, _, names = first.stdout.partition(" ")
    assert names == "['kept']\n"
    assert not Path(folder).exists()


def test_a_file_cannot_grow_past_its_limit() -> None:
    result = run("open('big', 'wb').write(b'x' * (8 << 20))")
    assert result.status == "failed" and "File too large" in result.detail


@BOTH
def test_huge_output_is_drained_and_its_end_kept(limits: SandboxLimits) -> None:
    code = "for i in range(300000): print('line', i)\nprint('the end')"
    result = run(code, SandboxLimits(output_bytes=1000, namespaces=limits.namespaces))
    assert result.status == "passed" and result.truncated
    assert len(result.stdout) == 1000 and result.stdout.endswith("the end\n")


def test_a_kill_well_before_the_cpu_limit_is_not_called_a_timeout() -> None:
    result = run("import signal; signal.raise_signal(signal.SIGKILL)", HOOK)
    assert (result.status, result.detail) == ("failed", "killed by SIGKILL")


def test_a_crash_of_the_interpreter_fails() -> None:
    result = run("import ctypes; ctypes.string_at(0)")
    assert (result.status, result.detail) == ("failed", "killed by SIGSEGV")


def test_files_lie_beside_the_code(tmp_path: Path) -> None:
    table = tmp_path / "a table.csv"
    table.write_text("a,b\n1,2\n")
    result = run_code("print(open('a table.csv').read())", limits=LIMITS, files=[table])
    assert result.stdout.startswith("a,b")
    with pytest.raises(InputError, match="absent.csv is not there"):
        run_code("pass", limits=LIMITS, files=[tmp_path / "absent.csv"])


def test_another_module_name_leaves_main_blocks_out() -> None:
    code = "if __name__ == '__main__': print('main')\nprint('always')"
    assert run(code).stdout == "main\nalways\n"
    assert run_code(code, limits=LIMITS, module_name="solution").stdout == "always\n"


def test_dataclasses_with_text_annotations_work_in_any_module_name() -> None:
    code = """
    from __future__ import annotations
    from dataclasses import dataclass
    @dataclass
    class Point:
        x: int
    print(Point(3))
    """
    assert run_code(textwrap.dedent(code), limits=LIMITS, module_name="solution").stdout == "Point(x=3)\n"


def test_sets_of_strings_come_in_the_same_order_every_time() -> None:
    code = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert len({run(code).stdout for _ in range(3)}) == 1


def test_the_program_has_no_privileges(namespaces: None) -> None:
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    print(os.geteuid() != 0 or 'root', libc.unshare(0x20000), libc.mount(b'none', b'/mnt', b'tmpfs', 0, b''))
    """
    assert run(code).stdout.split()[-2:] == ["-1", "-1"]


def test_a_sandbox_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no pipes left')")
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(InputError, match="no pipes left"):
        run("pass")
