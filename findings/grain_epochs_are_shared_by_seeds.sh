#!/bin/bash
# grain 0.2.18: `MapDataset.shuffle(seed=s).repeat()` reshuffles each epoch with the seed s + epoch.
# So two runs with seeds s and s + 1 read the same orders, one epoch apart: what looks like
# independent seeds of a study is not, once there is more than one epoch.
# Seen on 2026-11-28:
#   seed 0, epoch 1: [5, 7, 6, 0, 4, 1, 3, 2]
#   seed 1, epoch 0: [5, 7, 6, 0, 4, 1, 3, 2]
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check grain==0.2.18 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PY'
import grain

data = grain.MapDataset.range(8)


def epoch(seed, number):
    order = data.shuffle(seed=seed).repeat(3)
    return [order[8 * number + i] for i in range(8)]


print("seed 0, epoch 1:", epoch(0, 1))
print("seed 1, epoch 0:", epoch(1, 0))
for seed in range(5):
    assert epoch(seed, 1) == epoch(seed + 1, 0) != epoch(seed, 0)
    assert epoch(seed, 2) == epoch(seed + 2, 0)
PY
