"""Do head and evidence still matter at four times the width? One seed, on one GPU.

    flexolmo data fetch FETCHED && flexolmo data flexmix FETCHED flexmix
    timeout --signal INT --kill-after 30 590 \\
        flexolmo study configs/study/wide.py --out DIR --texts flexmix --resume

The command may be repeated until the report is there: it continues where it was stopped. Three
owners, about all of their text once, at the learning rates that `paper.py` and `full.py` start
from, which were not chosen at this width: its figures compare with each other, not with those of
`full.py`. Planned for ten minutes on an H100; no GPU has run it yet. At toy size, on a CPU:

    flexolmo study configs/study/wide.py --out DIR --texts corpus --owners math code \\
        --anchor.model.width 64 --anchor.model.ffn-width 96 --anchor.model.num-layers 2 \\
        --anchor.steps 20 --expert.steps 10 --router.steps 5 --anchor.data.batch-size 4 \\
        --expert.data.batch-size 4 --router.data.batch-size 4 --head-rank 8 --evidence-rank 8 \\
        --owner-bytes 300000 --tune-sequences 8 --test-sequences 16 --mixed-sequences 16
"""

import dataclasses
from pathlib import Path

from flexolmo_jax.config import load_config
from flexolmo_jax.studies.baselines.config import StudyConfig

full = load_config(Path(__file__).with_name("full.py"), StudyConfig)
data = dataclasses.replace(full.expert.data, batch_size=32)
rates = ((1e-2, 1.5e-3),)  # of matrices, and of all else

config = dataclasses.replace(
    full,
    owners=("math", "code", "news"),
    owner_bytes=20_000_000,  # all of it
    anchor=dataclasses.replace(
        full.anchor,
        model=full.model.replace(width=512, ffn_width=1536, num_heads=8, unroll=1),
        data=data,
        steps=8000,
        checkpoint_every=2000,
    ),
    expert=dataclasses.replace(full.expert, data=data, steps=800),
    router=dataclasses.replace(full.router, data=data, steps=100),
    anchor_rates=rates,
    expert_rates=rates,
    headed_rates=rates,
    dense_rates=rates,
    unrestricted_rates=rates,
    rate_owners=(),
    # Fewer options to choose from than `full.py` has: each is scored on all tuning sequences.
    memories=((0.8, 0.3),),
    active=(2,),
    decays=(0.8, 0.9),
    evidence_decays=(0.8, 0.9),
    evidence_strengths=(0.5,),
    soup_temperatures=(0.1, 1.0),
)
