"""ECDSA keys on the curve P-256, the one that packages, registries and logs are signed with.

Model signing (OMS) takes elliptic curves of NIST only, and TUF's libraries know P-256 too, so one
kind of key does for all (the extra `trust`). A public key is its PEM text, always spelled in the
one way that `cryptography` writes; its id is the one that TUF computes of it.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.storage import key_files

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from securesystemslib.signer import SSlibKey

KEYGEN = "flexolmo registry keygen"
_KEY = ("an elliptic-curve key", KEYGEN)


def make_keys(file: Path) -> Path:
    """Makes a key pair: `file` for its owner alone (mode 0600), and beside it a `.pub`.

    Returns:
      the file of the public key.

    Raises:
      ValueError: one of the files is there; a package of the extra is missing.
      OSError: they cannot be written.
    """
    need_trust()
    from cryptography.hazmat.primitives.asymmetric import ec

    return key_files.write_keys(file, ec.generate_private_key(ec.SECP256R1()))


def read_private(file: Path) -> "EllipticCurvePrivateKey":
    """The private key in a file of `make_keys`.

    Raises:
      ValueError: it is missing, not on P-256, or others may read it; a package is missing.
    """
    need_trust()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    key = key_files.read_private(file, EllipticCurvePrivateKey, *_KEY)
    _check_curve(key.curve.name, str(file))
    return key


def read_public(file: Path) -> str:
    """The public key in a file of `make_keys`, as PEM.

    Raises:
      ValueError: it is missing, or not on P-256; a package is missing.
    """
    need_trust()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    key = key_files.read_public(file, EllipticCurvePublicKey, *_KEY)
    _check_curve(key.curve.name, str(file))
    return _pem(key)


def public_of(key: "EllipticCurvePrivateKey") -> str:
    """The public key of a private one, as PEM."""
    return _pem(key.public_key())


def check_public(public: object, where: str) -> str:
    """The text itself, if it is a public key as `read_public` gives it.

    Raises:
      ValueError: it is not, or is spelled in another way; `where` says where it stands.
    """
    try:
        if isinstance(public, str) and _pem(_parsed(public)) == public:
            return public
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected a public key on P-256 as PEM ({error})") from error
    raise ValueError(f"{where}: expected a public key on P-256 as PEM, spelled as OpenSSL does")


def key_id(public: str) -> str:
    """The id that TUF gives a public key: a sha256, hexadecimal."""
    return tuf_key(public).keyid


def tuf_key(public: str) -> "SSlibKey":
    """A public key as TUF's libraries hold it."""
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(_parsed(public))


def sign(key: "EllipticCurvePrivateKey", data: bytes) -> bytes:
    """A signature of bytes: ECDSA with SHA-256, in DER."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def is_signed(public: str, data: bytes, signature: bytes) -> bool:
    """Whether a signature of bytes is one of this public key."""
    need_trust()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        _parsed(public).verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def need_trust() -> None:
    """Raises ValueError unless the packages of the extra `trust` are installed."""
    try:
        import cryptography  # noqa: F401
        import tuf.api.metadata  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "signatures need more packages: pip install 'flexolmo_jax[trust]'"
        ) from error


@functools.lru_cache(maxsize=256)
def _parsed(public: str) -> "EllipticCurvePublicKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        key = serialization.load_pem_public_key(public.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, EllipticCurvePublicKey):
        raise ValueError(f"found a {type(key).__name__}")
    _check_curve(key.curve.name, "the key")
    return key


def _check_curve(name: str, where: str) -> None:
    if name != "secp256r1":
        raise ValueError(f"{where}: expected a key on P-256 (secp256r1), found {name}")


def _pem(key: "EllipticCurvePublicKey") -> str:
    from cryptography.hazmat.primitives import serialization

    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(encoding, form).decode()
