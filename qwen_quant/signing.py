"""OpenSSF model signing: one bundle, `model.sig`, over every other file of an artifact.

The bundle is the one that the `model_signing` command line makes and checks (Sigstore bundle, DSSE envelope, in-toto
statement with the sha256 of every file). Keys are PEM files of a P-256, P-384 or P-521 key; everything is offline.
Optional package: extra `sign`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from qwen_quant.checkpoint.reader import file_sha256
from qwen_quant.errors import InputError

SIGNATURE_FILE = "model.sig"
# As in qwen_quant/verify.py: what is not of the artifact. model-signing leaves git's own files out by itself.
_IGNORED = (SIGNATURE_FILE, ".cache", ".qwen-quant")
_MISFIT = "does not fit"
_GIT = (".gitattributes", ".gitignore")
_MAKE_KEY = (
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub"
)


def sign_folder(folder: Path, key: Path) -> Path:
    """Write `model.sig` over every file of `folder`; a signature of this key that is still valid is kept as it is.

    ECDSA signatures are random, so keeping a valid one is what lets an interrupted push go on with the same bytes.

    Errors: InputError for a key that cannot be used, or where the extra `sign` is not installed.
    """
    library = _library()
    public = _public_half(_read_key(key))
    with tempfile.TemporaryDirectory(prefix="qwen-quant-sign-") as scratch:
        (Path(scratch) / "key.pub").write_bytes(public)
        if (folder / SIGNATURE_FILE).is_file() and not _reason(library, folder, Path(scratch) / "key.pub"):
            return folder / SIGNATURE_FILE
    temporary = folder / f".{SIGNATURE_FILE}.{os.getpid()}.tmp"
    try:
        with _quiet(), _translated(key):
            config = library.signing.Config().use_elliptic_key_signer(private_key=key)
            config.set_hashing_config(library.hashing.Config().set_ignored_paths(paths=_IGNORED))
            config.sign(folder, temporary)
        os.replace(temporary, folder / SIGNATURE_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / SIGNATURE_FILE


def verify_signature(
    folder: Path, key: Path, *, allow_links: bool = False, known: Mapping[str, str] | None = None
) -> str:
    """Why `model.sig` does not prove that the owner of `key` signed these files, "" when it does.

    Args:
        folder: the artifact with its signature.
        key: PEM public key.
        allow_links: whether files may be links, as in the hub's download cache.
        known: hashes (by name) that were computed a moment ago.

    Errors: InputError for a key that cannot be used, or where the extra `sign` is not installed.
    """
    library = _library()
    _read_key(key)
    with _translated(key):
        library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    reason = _reason(library, folder, key, allow_links=allow_links)
    stale = stale_names(folder, known) if reason.startswith(_MISFIT) else []
    return f"does not sign {', '.join(stale[:3])} as it is now" if stale else reason


def stale_names(folder: Path, known: Mapping[str, str] | None = None) -> list[str]:
    """Files that `model.sig` records with another sha256, does not record, or records although they are gone.

    This needs neither key nor package and proves nothing about who signed: it only says that a signature is outdated.
    [] without a signature, or where it hashes in another way than by file and sha256. `known` are hashes (by name) that
    were computed a moment ago, so that weights are not read again.

    Errors: InputError when model.sig is not a Sigstore bundle with such a statement.
    """
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        return []
    try:
        envelope = json.loads(path.read_text(encoding="utf-8"))["dsseEnvelope"]
        predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
        rows = {row["name"]: row["digest"] for row in predicate["resources"] if row["algorithm"] == "sha256"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a signature", str(error), "sign again, or delete it") from error
    now = [p.name for p in folder.iterdir() if p.is_file() and p.name not in (*_IGNORED, *_GIT)]
    if not rows:
        return []
    hashes = {name: (known or {}).get(name) or file_sha256(folder / name) for name in now}
    return sorted(name for name in {*rows, *now} if rows.get(name) != hashes.get(name))


def _library() -> ModuleType:
    """model_signing with its submodules (InputError naming the extra where it is absent)."""
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise InputError(
            "signatures need the package model-signing", str(error), "pip install 'qwen-quant[sign]'"
        ) from error
    return model_signing


def check_key(key: Path) -> None:
    """The private key can be used, and the package is there (InputError otherwise)."""
    library = _library()
    _public_half(_read_key(key))
    with _translated(key):
        library.signing.Config().use_elliptic_key_signer(private_key=key)


def _read_key(key: Path) -> bytes:
    """The PEM text of a key (InputError when it is no readable PEM file)."""
    try:
        text = key.read_bytes()
    except OSError as error:
        raise InputError(
            f"the key {key} cannot be read", error.strerror or str(error), f"make one: {_MAKE_KEY}"
        ) from error
    if b"-----BEGIN" not in text:
        raise InputError(f"{key} is not a key", "it is not a PEM file", f"make one: {_MAKE_KEY}")
    return text


def _public_half(private: bytes) -> bytes:
    """PEM public key that belongs to a PEM private key."""
    from cryptography.hazmat.primitives import serialization

    with _translated(Path("the private key")):
        public = serialization.load_pem_private_key(private, None).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _reason(library: ModuleType, folder: Path, public: Path, *, allow_links: bool = False) -> str:
    """Why the signature in `folder` is not that of `public` over these files, "" when it is."""
    from cryptography.exceptions import InvalidSignature
    from google.protobuf.json_format import ParseError

    config = library.verifying.Config().use_elliptic_key_verifier(public_key=public)
    if allow_links:
        config.set_hashing_config(library.hashing.Config().set_allow_symlinks(True).set_ignored_paths(paths=_IGNORED))
    try:
        with _quiet():
            config.verify(folder, folder / SIGNATURE_FILE)
    except InvalidSignature:
        return "was not made by the owner of this key"
    except (ParseError, KeyError, IndexError, TypeError) as error:
        return f"is damaged: {type(error).__name__}: {error}"
    except ValueError as error:
        return f"{_MISFIT}: {str(error).strip()}"
    return ""


@contextlib.contextmanager
def _translated(key: Path) -> Iterator[None]:
    """Errors of the key itself as InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{key} cannot be used",
            f"it is not an unencrypted P-256, P-384 or P-521 key of the right half: {error}",
            f"make one: {_MAKE_KEY}",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """model-signing prints some warnings on stdout, which belongs to the result."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
