"""Do head and evidence still matter at twice the width? One seed, on two CPU cores.

    flexolmo data fetch FETCHED && flexolmo data flexmix FETCHED flexmix
    flexolmo study configs/study/twice.py --out TWICE --texts flexmix
    flexolmo study configs/study/twice.py --out ONCE --texts flexmix \\
        --anchor.model.width 128 --anchor.model.ffn-width 384 --anchor.model.num-heads 4

Three owners, and the tokens of `full.py`; the second command is the same study at the width of
`full.py`. Learning rates are those that `full.py` chose at its width. All methods have fewer
options to choose from, and fewer test sequences, than in `full.py`.
"""

import dataclasses
from pathlib import Path

from flexolmo_jax.config import load_config
from flexolmo_jax.studies.baselines.config import StudyConfig

full = load_config(Path(__file__).with_name("full.py"), StudyConfig)

config = dataclasses.replace(
    full,
    owners=("math", "code", "news"),
    anchor=dataclasses.replace(
        full.anchor, model=full.model.replace(width=256, ffn_width=768, num_heads=8)
    ),
    anchor_rates=((1e-2, 4e-3),),
    expert_rates=((2e-2, 4e-3),),
    headed_rates=((1e-2, 4e-3),),
    dense_rates=((1e-2, 4e-3),),
    unrestricted_rates=((1e-2, 1.5e-3),),
    rate_owners=(),
    unrestricted_flops=(1.0,),
    test_sequences=100,
    mixed_sequences=100,
    routers=("logistic",),
    memories=((0.8, 0.3),),
    active=(1, 2),
    evidence_decays=(0.9,),
    evidence_strengths=(0.5, 1.0),
    soup_temperatures=(0.1, 1.0),
)
