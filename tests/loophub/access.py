"""Who may do what: four tokens, the Hub's own words of refusal."""

from __future__ import annotations

from dataclasses import dataclass

from tests.loophub.state import Repository
from tests.loophub.wire import Reply, error_reply

# Shaped like real ones (hf_ and 34 letters), so that redaction is put to the test.
GOOD_TOKEN = "hf_" + "LoopbackGoodWrite".ljust(34, "A")
READ_TOKEN = "hf_" + "LoopbackReadOnly".ljust(34, "B")
STRANGER_TOKEN = "hf_" + "LoopbackStranger".ljust(34, "C")
EXPIRED_TOKEN = "hf_" + "LoopbackExpired".ljust(34, "D")
FOREIGN_NAMESPACE = "foreign"  # where nobody here may write


@dataclass(frozen=True)
class Person:
    """Who a token stands for."""

    name: str
    role: str  # "write" or "read"
    member: bool  # sees private repositories, and gated ones once granted


PEOPLE = {
    GOOD_TOKEN: Person("loop", "write", True),
    READ_TOKEN: Person("loop", "read", True),
    STRANGER_TOKEN: Person("stranger", "write", False),
}


class RefusedError(Exception):
    """Carries the reply that says no."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


def person_of(token: str | None) -> Person | None:
    """The person, or None without a token. Raises RefusedError for a token that is not (or no longer) good."""
    if token is None:
        return None
    if token == EXPIRED_TOKEN:
        raise RefusedError(error_reply(401, 'User Access Token "loopback" is expired'))
    if token not in PEOPLE:
        raise RefusedError(error_reply(401, "Invalid credentials in Authorization header"))
    return PEOPLE[token]


def require_person(token: str | None) -> Person:
    """Somebody known. Raises RefusedError."""
    person = person_of(token)
    if person is None:
        raise RefusedError(error_reply(401, "Invalid username or password."))
    return person


def see(repo: Repository | None, token: str | None) -> Repository:
    """The repository, if this token may know of it. Absent and private ones are not told apart, as on the Hub."""
    person = person_of(token)
    if repo is not None and (not repo.private or (person is not None and person.member)):
        return repo
    if person is None:
        raise RefusedError(error_reply(401, "Invalid username or password."))
    raise RefusedError(error_reply(404, "Repository not found", "RepoNotFound"))


def read(repo: Repository | None, token: str | None) -> Repository:
    """The repository, if this token may read its files: a gated one only after its terms were accepted."""
    found, person = see(repo, token), person_of(token)
    if not found.gated or (found.granted and person is not None and person.member):
        return found
    restricted = f"Access to model {found.repo_id} is restricted"
    if person is None:
        wording = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
        raise RefusedError(error_reply(401, wording, "GatedRepo"))
    wording = f"{restricted} and you are not in the authorized list. Ask for access on its page."
    raise RefusedError(error_reply(403, wording, "GatedRepo"))


def write(repo: Repository | None, token: str | None) -> Repository:
    """The repository, if this token may change it."""
    person = require_person(token)
    found = see(repo, token)
    if person.role != "write":
        raise RefusedError(error_reply(403, "Forbidden: you must use a write token to upload to a repository."))
    if not may_write(person, found.repo_id):
        raise RefusedError(
            error_reply(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        )
    return found


def may_write(person: Person, repo_id: str) -> bool:
    """Members write everywhere but in FOREIGN_NAMESPACE, others in their own namespace."""
    namespace = repo_id.split("/")[0]
    return namespace == person.name or (person.member and namespace != FOREIGN_NAMESPACE)
