"""Assembly of the commands and the one error boundary.

Exit codes: 0 done, 2 usage, 3 bad input, 4 a gate failed, 5 network or hub, 130 interrupted, 1 our bug. Heavy imports
(torch, transformers) happen inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from qwen_quant import __version__
from qwen_quant.commands.bnb import bnb
from qwen_quant.commands.card import card
from qwen_quant.commands.compare import compare
from qwen_quant.commands.convert import convert
from qwen_quant.commands.demo import demo
from qwen_quant.commands.doctor import doctor
from qwen_quant.commands.download import download
from qwen_quant.commands.export import export
from qwen_quant.commands.gptq import gptq
from qwen_quant.commands.init import init
from qwen_quant.commands.inspect import inspect
from qwen_quant.commands.plan import plan
from qwen_quant.commands.profile import profile
from qwen_quant.commands.push import push
from qwen_quant.commands.release import release
from qwen_quant.commands.sign import sign
from qwen_quant.commands.validate import validate
from qwen_quant.commands.verify import verify
from qwen_quant.console import close_stdout, show_error, write_line
from qwen_quant.errors import InputError, Interrupted, QwenQuantError, UsageError
from qwen_quant.process import tune_process

COMMANDS = (
    download,
    gptq,
    bnb,
    convert,
    export,
    validate,
    compare,
    profile,
    card,
    verify,
    sign,
    push,
    release,
    inspect,
    plan,
    doctor,
    init,
    demo,
)
DEBUG_VARIABLE = "QWEN_QUANT_DEBUG"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_PLACE = "give another place"
REFUSALS = {  # what a file system or its limits refuse, and what helps
    errno.EFBIG: "give a smaller --max-shard-size, or another file system",
    errno.EMFILE: "raise the limit (ulimit -n 4096), or give a larger --max-shard-size",
    errno.ENFILE: "close other programs, or give a larger --max-shard-size",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.ELOOP: _PLACE,
    errno.EIO: "check the disk, or " + _PLACE,
    errno.ESTALE: _PLACE,
}


def _version(value: bool) -> None:
    if value:
        write_line(f"qwen-quant {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Quantize Qwen checkpoints to GPTQ Int4 on a small machine, and measure how far the result is from BF16.

    \b
    Examples:
      qwen-quant demo
      qwen-quant gptq ./Qwen2.5-0.5B ./Qwen2.5-0.5B-Int4 --bits 4
      qwen-quant validate ./Qwen2.5-0.5B-Int4 --baseline ./Qwen2.5-0.5B
    """


def build_app() -> typer.Typer:
    """The Typer application with every command."""
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        name="qwen-quant", add_completion=False, no_args_is_help=True, rich_markup_mode=None, context_settings=settings
    )
    app.callback()(_root)
    for command in COMMANDS:
        app.command(context_settings=settings)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `qwen-quant`: run one command and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminated)
    tune_process()
    sys.exit(run(given))


def run(arguments: list[str]) -> int:
    """Run one command line; every exception ends here as one message and an exit code."""
    as_json = "--json" in arguments
    command = typer.main.get_command(build_app())
    try:
        _check_names(arguments)
        with command.make_context("qwen-quant", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except typer.TyperException as error:
        return _usage(error, as_json=as_json)
    except BrokenPipeError:
        close_stdout()
    except (Exception, KeyboardInterrupt) as error:
        known = as_known_error(error)
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exception(error)
        show_error(known, as_json=as_json)
        return known.exit_code
    return 0


def _check_names(arguments: list[str]) -> None:
    """Names are UTF-8 (InputError otherwise): JSON holds nothing else, and a run would end at its manifest."""
    with contextlib.suppress(FileNotFoundError):
        arguments = [*arguments, os.getcwd()]
    for text in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"{ascii(text)} is not valid UTF-8", "manifests and reports cannot name it", "rename it")


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM stops as Ctrl-C does: finished blocks are kept."""
    raise KeyboardInterrupt


def _usage(error: typer.TyperException, *, as_json: bool) -> int:
    """A command line that Typer could not parse: exit 2. Without arguments Typer's "error" is the help text."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "qwen-quant"
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        write_line(context.get_help(), to_stderr=True)
        return 2
    show_error(UsageError(error.format_message(), next_step=f"{path} --help"), as_json=as_json)
    return UsageError.exit_code


def as_known_error(error: BaseException) -> QwenQuantError:
    """The exception as one the user can act on; what is not known is our bug (exit 1), its traceback kept in a file."""
    if isinstance(error, QwenQuantError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", next_step="run the same command again to resume")
    if isinstance(error, OSError) and error.errno in DISK_FULL or "os error 28" in str(error):
        place = getattr(error, "filename", None)
        return InputError("disk full", str(place or error), "free some space and run the same command again to resume")
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        step = "close other programs, or lower --num-samples or --seq-len; qwen-quant plan says what a run needs"
        return InputError("out of memory", str(error), step)
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename is not None:
        return InputError(
            f"cannot use {error.filename}", str(error.strerror), "check its permissions, or use another place"
        )
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return InputError(f"cannot use {error.filename or 'a file'}", str(error.strerror), REFUSALS[error.errno])
    return _bug(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """torch says "out of memory" in a RuntimeError (CPU allocator) or its subclass OutOfMemoryError (GPU)."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _bug(error: BaseException) -> QwenQuantError:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="qwen-quant-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        where = f"the traceback is in {file.name}; please report it ({DEBUG_VARIABLE}=1 prints it)"
    except OSError:
        where = f"run again with {DEBUG_VARIABLE}=1 to see the traceback, and please report it"
    summary = str(error).strip().splitlines()
    return QwenQuantError(f"internal error: {type(error).__name__}", summary[0] if summary else "", where)
