#!/usr/bin/env bash
# Mounts the bucket and installs flexolmo_jax on every worker; may be repeated.
#
#     PROJECT=... ZONE=... TPU=... BUCKET=... SOURCE=https://github.com/you/flexolmo_jax \
#         ./setup.sh [--dry-run]
source "$(dirname "$0")/common.sh"
need_tpu
need BUCKET "that create.sh created"
need SOURCE "the git repository from which the workers clone flexolmo_jax"

# Cached metadata would hide the files of other workers:
# https://cloud.google.com/storage/docs/cloud-storage-fuse/caching. How to install gcsfuse:
# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
on_workers "set -e; command -v gcsfuse >/dev/null || {
  key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  curl -fsSL \$apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
  echo deb [signed-by=\$key] \$apt gcsfuse-\$(lsb_release -cs) main |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -q && sudo apt-get install -yq gcsfuse; }
sudo mkdir -p $SHARED && sudo chown \$USER $SHARED
mountpoint -q $SHARED || gcsfuse --metadata-cache-ttl-secs 0 $BUCKET $SHARED"
on_workers "set -e; test -d flexolmo_jax || git clone $SOURCE flexolmo_jax
cd flexolmo_jax && git pull --ff-only
make .venv/tpu.installed ||
  { sudo apt-get install -yq python3.11 python3.11-venv && make .venv/tpu.installed; }
.venv/bin/python -c 'import jax; print(jax.local_devices())'"
