#!/bin/bash
# model-signing 1.1.1: `import model_signing` fails after `pip install model-signing`, since it
# imports OpenSSL (the package pyOpenSSL), which it does not ask for. With pyOpenSSL it works.
# Seen on 2026-11-29:
#   ModuleNotFoundError: No module named 'OpenSSL'
#   with pyOpenSSL: imported
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
install() {
    venv/bin/pip install --quiet --disable-pip-version-check "$@" 2> pip.log || {
        cat pip.log >&2
        exit 2
    }
}
install model-signing==1.1.1 sigstore==4.5.1
if venv/bin/python -c "import model_signing" 2> error.log; then
    echo "imported without pyOpenSSL"
    exit 1
fi
tail -n 1 error.log
grep -q "No module named 'OpenSSL'" error.log
install pyOpenSSL==26.4.0
venv/bin/python -c "import model_signing; print('with pyOpenSSL: imported')"
