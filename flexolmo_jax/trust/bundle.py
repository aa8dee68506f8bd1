"""The signature file: a bundle of OpenSSF Model Signing (OMS) v1.0, read strictly.

    bundle > DSSE envelope > in-toto statement > predicate: every file's name and sha256

`read_bundle` takes what the specification's schemas take, whatever the way of signing.
`check_ours` is stricter, since the specification leaves room for files that nobody signed: it
demands a key, SHA-256 of whole files, and an empty list of ignored paths. The specification, its
schemas and its test vectors: github.com/ossf/model-signing-spec at a0c91e2.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.federation.fields import parse

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
MAX_BYTES = 16 * 2**20  # of a signature file; those of large packages have a megabyte
_METHODS = ("publicKey", "x509CertificateChain", "certificate")
_HASHES = ("sha256", "blake2b", "blake3")


class Bundle(NamedTuple):
    """A signature file that was read; nothing of it was verified.

    Attributes:
      method: "publicKey", "x509CertificateChain" or "certificate".
      hint: of a public key: sha256 of its PEM text; empty for certificates.
      signature: of `signed_bytes`.
      payload: the statement's bytes.
      files: {relative path: sha256} that the statement lists.
      serialization: how the statement says that they were listed and hashed.
    """

    method: str
    hint: str
    signature: bytes
    payload: bytes
    files: dict[str, str]
    serialization: dict[str, Any]

    @property
    def signed_bytes(self) -> bytes:
        """What the signature is of: DSSE's pre-authentication encoding of the payload."""
        kind = PAYLOAD_TYPE.encode()
        return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(self.payload), self.payload)


def read_bundle(data: bytes, where: Path) -> Bundle:
    """A bundle from the bytes of a signature file.

    Args:
      data: JSON in UTF-8.
      where: the file, to be named in errors.

    Raises:
      ValueError: it is not as the specification's schemas ask, names the part; or an object has a
        key twice, base64 is not spelled as encoders do, or the root digest is another one.
    """
    value = parse(data, where, "a signature")
    try:
        return _bundle(value, where)
    except _Unfit as error:
        raise ValueError(f"{where}: not a signature of a package: {error}") from error


def check_ours(bundle: Bundle, where: Path) -> None:
    """Raises ValueError unless a bundle was made with a key, and leaves no file unsigned."""
    if bundle.method != "publicKey":
        raise ValueError(
            f"{where}: signed with a certificate ({bundle.method}); expected a key of the registry"
        )
    if ignored := bundle.serialization.get("ignore_paths"):
        raise ValueError(
            f"{where}: leaves {', '.join(ignored)[:200]} unsigned; have it signed with `flexolmo "
            "sign`, which leaves out nothing"
        )
    for name, expected in (("method", "files"), ("hash_type", "sha256"), ("allow_symlinks", False)):
        if bundle.serialization[name] != expected:
            raise ValueError(
                f"{where}: expected serialization.{name} to be {expected!r}, found "
                f"{bundle.serialization[name]!r}; have it signed with `flexolmo sign`"
            )


def hint_of(public: str) -> str:
    """How a bundle names a public key: the sha256 of its PEM text."""
    return hashlib.sha256(public.encode()).hexdigest()


class _Unfit(ValueError):
    """What is wrong in a bundle, without the file's name."""


def _bundle(value: dict[str, Any], where: Path) -> Bundle:
    _exact(value, "the bundle", {"mediaType", "verificationMaterial", "dsseEnvelope"})
    media = _text(value["mediaType"], "mediaType")
    if not media.startswith(MEDIA_TYPE):
        raise _Unfit(f"expected a mediaType that begins with {MEDIA_TYPE}, found {media!r:.100}")
    method, hint = _material(value["verificationMaterial"])
    payload, signature = _envelope(value["dsseEnvelope"])
    files, serialization = _statement(parse(payload, where, "a signature with a statement"))
    return Bundle(method, hint, signature, payload, files, serialization)


def _material(value: Any) -> tuple[str, str]:
    """The way of signing, and the hint of a key."""
    methods = [name for name in _METHODS if name in _object(value, "verificationMaterial")]
    if len(methods) != 1:
        raise _Unfit(f"expected one of {', '.join(_METHODS)} in verificationMaterial")
    (method,) = methods
    _exact(value, "verificationMaterial", {method}, {"tlogEntries", "timestampVerificationData"})
    entries = _list(value.get("tlogEntries", []), "tlogEntries")
    if method == "publicKey":
        _exact(value[method], method, {"hint"})
        if entries or "timestampVerificationData" in value:
            raise _Unfit("a signature with a key has no transparency log and no timestamps")
        return method, _text(value[method]["hint"], "publicKey.hint")
    if method == "certificate" and not entries:
        raise _Unfit("a keyless signature needs an entry in tlogEntries")
    chain = [value[method]]
    if method == "x509CertificateChain":
        _exact(value[method], method, {"certificates"})
        chain = _list(value[method]["certificates"], "certificates")
    if not chain:
        raise _Unfit("expected at least one certificate")
    for certificate in chain:
        _exact(certificate, "a certificate", {"rawBytes"})
        _decoded(certificate["rawBytes"], "rawBytes")
    return method, ""


def _envelope(value: Any) -> tuple[bytes, bytes]:
    """The payload and the signature."""
    _exact(value, "dsseEnvelope", {"payload", "payloadType", "signatures"})
    if value["payloadType"] != PAYLOAD_TYPE:
        raise _Unfit(f"expected the payloadType {PAYLOAD_TYPE}")
    signatures = _list(value["signatures"], "signatures")
    if len(signatures) != 1:
        raise _Unfit(f"expected one signature, found {len(signatures)}")
    _exact(signatures[0], "a signature", {"sig"}, {"keyid"})
    if signatures[0].get("keyid") not in (None, ""):
        raise _Unfit("expected no keyid; the key is named by publicKey.hint")
    return _decoded(value["payload"], "payload"), _decoded(signatures[0]["sig"], "sig")


def _statement(value: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of an in-toto statement, and its serialization."""
    _exact(value, "the statement", {"_type", "subject", "predicateType", "predicate"})
    for name, expected in (("_type", STATEMENT), ("predicateType", PREDICATE)):
        if value[name] != expected:
            raise _Unfit(f"expected {name} to be {expected}, found {value[name]!r:.100}")
    subjects = _list(value["subject"], "subject")
    if len(subjects) != 1:
        raise _Unfit(f"expected one subject, found {len(subjects)}")
    _exact(subjects[0], "the subject", {"name", "digest"})
    _text(subjects[0]["name"], "the subject's name")
    _exact(subjects[0]["digest"], "the subject's digest", {"sha256"})
    _exact(value["predicate"], "the predicate", {"resources", "serialization"})
    serialization = _serialization(value["predicate"]["serialization"])
    files: dict[str, str] = {}
    for entry in _list(value["predicate"]["resources"], "resources"):
        # Further fields are allowed by the specification, and to be ignored.
        _needs(entry, "a resource", {"name", "digest", "algorithm"})
        name = _path(entry["name"])
        if name in files:
            raise _Unfit(f"lists {name!r:.100} twice")
        if entry["algorithm"] != serialization["hash_type"]:
            raise _Unfit(f"expected the algorithm of {name!r:.100} to be that of hash_type")
        files[name] = _hexadecimal(entry["digest"], name)
    if not files:
        raise _Unfit("lists no file")
    root = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
    if subjects[0]["digest"]["sha256"] != root:
        raise _Unfit("its root digest is not that of the files that it lists")
    return files, serialization


def _serialization(value: Any) -> dict[str, Any]:
    needed, more = {"method", "hash_type", "allow_symlinks"}, {"shard_size", "ignore_paths"}
    _exact(value, "serialization", needed, more)
    if value["method"] not in ("files", "shards") or value["hash_type"] not in _HASHES:
        raise _Unfit("expected the method files or shards, and a hash_type of sha256 or BLAKE")
    if not isinstance(value["allow_symlinks"], bool):
        raise _Unfit("expected allow_symlinks to be true or false")
    size, sharded = value.get("shard_size"), value["method"] == "shards"
    if sharded != ("shard_size" in value) or (sharded and not (type(size) is int and size > 0)):
        raise _Unfit("expected a shard_size above 0 for the method shards, and none for files")
    for path in _list(value.get("ignore_paths", []), "ignore_paths"):
        _text(path, "ignore_paths")
    return value


def _path(value: Any) -> str:
    name = _text(value, "a resource's name")
    if name.startswith("/") or {"", ".", ".."} & set(name.split("/")) or "\\" in name:
        raise _Unfit(f"expected plain relative paths, found {name!r:.100}")
    return name


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Unfit(f"expected {what} to be an object")
    return value


def _needs(value: Any, what: str, needed: Set[str]) -> None:
    if missing := needed - _object(value, what).keys():
        raise _Unfit(f"{what} has no {min(missing)}")


def _exact(value: Any, what: str, needed: Set[str], more: Set[str] = frozenset()) -> None:
    """Raises _Unfit unless a value is an object of the needed fields, and perhaps of more."""
    _needs(value, what, needed)
    if unknown := value.keys() - needed - more:
        raise _Unfit(f"{what} has an unknown field {min(unknown)!r:.100}")


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Unfit(f"expected {what} to be a list")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise _Unfit(f"expected {what} to be text")
    return value


def _hexadecimal(value: Any, what: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("([0-9a-f]{2})+", value):
        raise _Unfit(f"expected the digest of {what!r:.100} in lower-case hexadecimal digits")
    return value


def _decoded(value: Any, what: str) -> bytes:
    """The bytes of base64, of the one spelling that encoders write."""
    text = _text(value, what)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Unfit(f"expected {what} to be base64 ({error})") from error
    if base64.b64encode(data).decode() != text:
        raise _Unfit(f"expected {what} to be base64, padded with zeros")
    return data
