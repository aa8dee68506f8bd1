"""What weights in fewer bits change: bits per byte of the demo's merged model in each dtype.

flexolmo demo
.venv/bin/python flexolmo_jax/studies/rounding.py flexolmo_demo     # writes docs/rounding.md
"""

import argparse
import datetime
from pathlib import Path

from flexolmo_jax.config import ExpertTraining, load_config
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
from flexolmo_jax.model import load
from flexolmo_jax.studies.demo import OWNERS

DTYPES = ("float32", "bfloat16", "int8")
PAGE = """\
# Weights in fewer bits

`python flexolmo_jax/studies/rounding.py flexolmo_demo`, {date}: bits per byte of the merged model that
`flexolmo demo` leaves, on held-out documents, and the change from float32. `bfloat16` rounds
weights and activations; `int8` the matrices alone, with a scale for each output channel. How fast
each decodes is in [benchmarks.md](benchmarks.md).

| dtype | {domains} |
| --- | {columns} |
{rows}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    args = parser.parse_args()
    data = load_config("demo_expert", ExpertTraining).data
    texts = {name: heldout_documents(f"corpus:{name}", data) for name in ("public", *OWNERS)}
    whole: dict[str, float] = {}
    rows = ""
    for dtype in DTYPES:
        model = load(args.demo / "merged", dtype=dtype)
        cells = []
        for name, documents in texts.items():
            found = score(model, documents).bits_per_byte
            change = found / whole.setdefault(name, found) - 1
            cells.append(f"{found:.4f} ({change:+.2%})")
        rows += f"| {dtype} | {' | '.join(cells)} |\n"
    page = PAGE.format(
        date=datetime.date.today(), domains=" | ".join(texts),
        columns=" | ".join("---:" for _ in texts), rows=rows,
    )  # fmt: skip
    (Path(__file__).parent / "rounding.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
