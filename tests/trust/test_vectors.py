"""The test vectors of the OMS specification: valid ones are read, invalid ones are refused."""

import base64
import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from flexolmo_jax.trust.bundle import check_ours, read_bundle

VECTORS = Path(__file__).parent / "vectors"
VALID = sorted((VECTORS / "valid").iterdir())
INVALID = [*sorted((VECTORS / "invalid").iterdir()), *(VECTORS / "invalid-payload").iterdir()]


def check_by_schemas(data: bytes) -> None:
    """What the specification's own validator does, with its schemas."""
    schemas = [json.loads(file.read_text()) for file in sorted((VECTORS / "schemas").iterdir())]
    known = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in schemas)
    by_title = {schema["title"]: Draft202012Validator(schema, registry=known) for schema in schemas}
    bundle = json.loads(data)
    by_title["OMS Bundle"].validate(bundle)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    by_title["OMS in-toto Statement"].validate(statement)


def verifying_key(file: Path, value) -> ec.EllipticCurvePublicKey:
    """The public key of a vector: in its certificate, or known from where the vector was made."""
    material = value["verificationMaterial"]
    if "publicKey" in material:
        pem = (VECTORS / "keys" / "signing-key-pub.pem").read_bytes()
        return serialization.load_pem_public_key(pem)
    own = material.get("certificate") or material["x509CertificateChain"]["certificates"][0]
    return x509.load_der_x509_certificate(base64.b64decode(own["rawBytes"])).public_key()


def test_there_are_three_valid_and_five_invalid_vectors():
    assert (len(VALID), len(INVALID)) == (3, 5)


@pytest.mark.parametrize("file", VALID, ids=lambda file: file.name)
def test_a_valid_vector_is_read_and_its_signature_verifies(file):
    data = file.read_bytes()
    check_by_schemas(data)
    bundle = read_bundle(data, file)
    assert {"signme-1", "signme-2"} <= bundle.files.keys()
    key = verifying_key(file, json.loads(data))
    digest = {256: hashes.SHA256(), 384: hashes.SHA384()}[key.curve.key_size]
    key.verify(bundle.signature, bundle.signed_bytes, ec.ECDSA(digest))


@pytest.mark.parametrize("file", INVALID, ids=lambda file: file.name)
def test_an_invalid_vector_is_refused(file):
    data = file.read_bytes()
    with pytest.raises((ValidationError, json.JSONDecodeError)):
        check_by_schemas(data)
    with pytest.raises(ValueError, match="not a signature"):
        read_bundle(data, file)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("key", "leaves .*ignore-me.* unsigned"),
        ("certificate", "signed with a certificate"),
        ("sigstore", "signed with a certificate"),
    ],
)
def test_we_are_stricter_than_the_specification(name, reason):
    """All three valid vectors leave files unsigned, or are not signed with a plain key."""
    file = VECTORS / "valid" / f"{name}.bundle.json"
    with pytest.raises(ValueError, match=reason):
        check_ours(read_bundle(file.read_bytes(), file), file)
