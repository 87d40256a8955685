"""Errors a person can act on: each says what failed, why, and what to run next, and carries its exit code.

Exit codes: 2 usage, 3 bad input, 4 a quality gate failed, 5 network or Hub, 130 interrupted, 1 our bug.
"""

from __future__ import annotations


class QwenQuantError(Exception):
    """Base of every error that reaches the user as one message without a traceback.

    Args:
        what: what failed, in one clause, with the file, tensor or option named.
        why: the reason, where `what` does not already hold it.
        next_step: what the user can run or change now.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        self.what = what
        self.why = why
        self.next_step = next_step
        super().__init__(": ".join(part for part in (what, why) if part))


class UsageError(QwenQuantError):
    """The command line or the recipe asks for something that does not exist or does not fit together."""

    exit_code = 2


class InputError(QwenQuantError):
    """A file, checkpoint, calibration set or machine resource is not usable as it is."""

    exit_code = 3


class GateError(QwenQuantError):
    """A quality gate failed; the artifact is measured but must not be released."""

    exit_code = 4


class NetworkError(QwenQuantError):
    """The network or the Hub did not give what was asked for."""

    exit_code = 5


class AuditError(QwenQuantError):
    """The audit found a parameter that is not accounted for, or bytes that differ from what was solved: our bug."""

    exit_code = 1


class Interrupted(QwenQuantError):
    """The user pressed Ctrl-C (or sent SIGTERM); finished work is kept and the same command resumes."""

    exit_code = 130
