#!/bin/bash
# model-signing 1.1.1 lists a model's files sorted by the parts of their paths. The specification of
# the format (github.com/ossf/model-signing-spec, v1.0 of 14 May 2026, section 5.2.1) asks for the
# order of the names as text, by code points. They differ where a folder's name begins with another
# folder's name: "." and "-" come before "/". The digest of the whole model, which is computed over
# the list in its order, is then another one.
# Seen on 2026-11-29:
#   signed ['gate/0', 'gate.a/0']
#   sorted ['gate.a/0', 'gate/0']
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    model-signing==1.1.1 sigstore==4.5.1 pyOpenSSL==26.4.0 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PY'
import base64
import json
from pathlib import Path

import model_signing
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

for folder in ("gate", "gate.a"):
    file = Path("model", folder, "0")
    file.parent.mkdir(parents=True)
    file.write_text(folder)
key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)
Path("key").write_bytes(key)
model_signing.signing.Config().use_elliptic_key_signer(private_key="key").sign("model", "model.sig")
envelope = json.loads(Path("model.sig").read_text())["dsseEnvelope"]
statement = json.loads(base64.b64decode(envelope["payload"]))
names = [entry["name"] for entry in statement["predicate"]["resources"]]
print("signed", names)
print("sorted", sorted(names))
assert names == ["gate/0", "gate.a/0"]
PY
