"""Ed25519 signatures of JSON values (the extra `usage`: the library `cryptography`)."""

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def make_keys(file: Path) -> Path:
    """Makes a key pair: `file` for the coordinator alone, and beside it a `.pub` for everybody.

    Both are PEM (PKCS #8, SubjectPublicKeyInfo), as OpenSSL writes them; the private one is not
    encrypted, and has mode 0600.

    Returns:
      the file of the public key.

    Raises:
      ValueError: one of the files is there; `cryptography` is missing.
      OSError: they cannot be written.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = file.with_name(f"{file.name}.pub")
    for taken in (file, public):
        if os.path.lexists(taken):
            raise ValueError(f"{taken}: already there, and no key is replaced; choose another FILE")
    key = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(file, secret, 0o600)
    shared = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(public, shared, 0o644)
    return public


def read_private(file: Path) -> "Ed25519PrivateKey":
    """The private key in a file of `make_keys`.

    Raises:
      ValueError: it is missing, no such key, or others may read it; `cryptography` is missing.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{file}: expected a private key that `flexolmo usage keygen` wrote ({error})"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file}: expected an Ed25519 key, found a {type(key).__name__}")
    if mode & 0o077:
        raise ValueError(f"{file}: others may read this key (mode {mode:04o}); chmod 600 {file}")
    return key


def read_public(file: Path) -> str:
    """The public key in a file of `make_keys`: 32 bytes, hexadecimal.

    Raises:
      ValueError: it is missing, or no such key; `cryptography` is missing.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{file}: expected a public key, the .pub of `flexolmo usage keygen` ({error})"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{file}: expected an Ed25519 key, found a {type(key).__name__}")
    return key.public_bytes_raw().hex()


def public_of(key: "Ed25519PrivateKey") -> str:
    """The public key of a private one, as `read_public` gives it."""
    return key.public_key().public_bytes_raw().hex()


def canonical(value: Any) -> bytes:
    """A JSON value as the bytes that are hashed and signed: sorted keys, no spaces, UTF-8."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return text.encode()


def sign(key: "Ed25519PrivateKey", value: Any) -> str:
    """The signature of a JSON value: 64 bytes, hexadecimal."""
    return key.sign(canonical(value)).hex()


def is_signed(public: str, value: Any, signature: Any) -> bool:
    """Whether a signature of a JSON value is one of this public key."""
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        given = bytes.fromhex(signature)
        if given.hex() != signature:  # one spelling of each
            return False
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(given, canonical(value))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "usage ledgers need one more package: pip install 'flexolmo_jax[usage]'"
        ) from error


def _write_new(file: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
