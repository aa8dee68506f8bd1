#!/bin/bash
# tokenizers 0.23.3: `encode` holds Python's global lock until it is done, `encode_batch` of one text gives it up. A
# server that calls `encode` in another thread, so that its event loop stays free, gains nothing: no other
# thread runs while a long text is encoded. The ids are the same.
# Seen on 2026-11-29, ticks of a thread that sleeps for a millisecond between two of them:
#   encode: 971129 characters in 1.72 s, other thread: 1 ticks
#   encode_batch: 971129 characters in 1.80 s, other thread: 890 ticks
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PYTHON'
import random
import threading
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

draw = random.Random(0)
words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
text = " ".join(draw.choices(words, k=150_000))
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(
    [text[:200_000]], trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
)

ticks, is_over = 0, False


def tick():
    global ticks
    while not is_over:
        ticks += 1
        time.sleep(0.001)


threading.Thread(target=tick, daemon=True).start()
seen, ids = {}, {}
for name, encode in {
    "encode": lambda: tokenizer.encode(text),
    "encode_batch": lambda: tokenizer.encode_batch([text])[0],
}.items():
    before, begun = ticks, time.monotonic()
    encoded = encode()
    seen[name], seconds = ticks - before, time.monotonic() - begun
    ids[name] = encoded.ids
    print(f"{name}: {len(text)} characters in {seconds:.2f} s, other thread: {seen[name]} ticks")
is_over = True
assert ids["encode"] == ids["encode_batch"]
assert seen["encode"] < 20 < 100 < seen["encode_batch"], seen
PYTHON
