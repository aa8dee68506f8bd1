"""Key pairs in files: PEM, as OpenSSL writes it; the private one is for its owner alone.

They need the library `cryptography`.
"""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def write_keys(file: Path, key: "Ed25519PrivateKey | EllipticCurvePrivateKey") -> Path:
    """Writes a key pair: `file` for its owner alone, and beside it a `.pub` for everybody.

    Both are PEM (PKCS #8, SubjectPublicKeyInfo); the private one is not encrypted, and has mode
    0600.

    Returns:
      the file of the public key.

    Raises:
      ValueError: one of the files is there.
      OSError: they cannot be written.
    """
    from cryptography.hazmat.primitives import serialization

    public = file.with_name(f"{file.name}.pub")
    for taken in (file, public):
        if os.path.lexists(taken):
            raise ValueError(f"{taken}: already there, and no key is replaced; choose another FILE")
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(file, secret, 0o600)
    shared = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(public, shared, 0o644)
    return public


def read_private(file: Path, kind: type, what: str, keygen: str) -> Any:
    """The private key in a file of `write_keys`.

    Args:
      file: where.
      kind: the class of `cryptography` that it must be of.
      what: its name in errors: "an Ed25519 key".
      keygen: the command that writes such files, for errors.

    Raises:
      ValueError: it is missing, no such key, or others may read it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{file}: expected a private key that `{keygen}` wrote ({error})"
        ) from error
    if not isinstance(key, kind):
        raise ValueError(f"{file}: expected {what}, found a {type(key).__name__}")
    if mode & 0o077:
        raise ValueError(f"{file}: others may read this key (mode {mode:04o}); chmod 600 {file}")
    return key


def read_public(file: Path, kind: type, what: str, keygen: str) -> Any:
    """The public key in a file of `write_keys`; arguments as of `read_private`.

    Raises:
      ValueError: it is missing, or no such key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{file}: expected a public key, the .pub of `{keygen}` ({error})"
        ) from error
    if not isinstance(key, kind):
        raise ValueError(f"{file}: expected {what}, found a {type(key).__name__}")
    return key


def _write_new(file: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
