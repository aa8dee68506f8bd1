"""Ed25519 signatures of JSON values (the extra `usage`: the library `cryptography`)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_jax.storage import key_files

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KEY = ("an Ed25519 key", "flexolmo usage keygen")


def make_keys(file: Path) -> Path:
    """Makes a key pair: `file` for the coordinator alone, and beside it a `.pub` for everybody.

    Returns:
      the file of the public key.

    Raises:
      ValueError: one of the files is there; `cryptography` is missing.
      OSError: they cannot be written.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return key_files.write_keys(file, Ed25519PrivateKey.generate())


def read_private(file: Path) -> "Ed25519PrivateKey":
    """The private key in a file of `make_keys`.

    Raises:
      ValueError: it is missing, no such key, or others may read it; `cryptography` is missing.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return key_files.read_private(file, Ed25519PrivateKey, *_KEY)


def read_public(file: Path) -> str:
    """The public key in a file of `make_keys`: 32 bytes, hexadecimal.

    Raises:
      ValueError: it is missing, or no such key; `cryptography` is missing.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return key_files.read_public(file, Ed25519PublicKey, *_KEY).public_bytes_raw().hex()


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
