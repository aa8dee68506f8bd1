"""A study: FlexOlmo and every baseline on the same texts, for several seeds, as a list of stages.

    flexolmo study configs/study/ci.py --out DIR

What is compared, and how, is in docs/study.md.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from flexolmo_jax.storage.outputs import check_kept_folder
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.rates import choose_rates
from flexolmo_jax.studies.baselines.report import write_report
from flexolmo_jax.studies.baselines.seed_stages import plan_seed
from flexolmo_jax.studies.baselines.shared_stages import plan_shared
from flexolmo_jax.studies.engine.stages import run_stages


def run_study(config: StudyConfig, out: Path, seeds: Sequence[int], resume: bool = False) -> None:
    """Runs a study for some seeds, and writes the report of all seeds that are done.

    Args:
      config: the study.
      out: the folder: stages, then report.md, report.json and figures.
      seeds: to run now; seeds that were run before with the same values stay in the report.
      resume: the folder may exist; whatever in it is still valid is used.

    Raises:
      ValueError: the folder exists and `resume` is false; a text is missing.
      FloatingPointError, Interrupted: as the training functions.
    """
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"{out}: a study already exists here; pass --resume to continue it, or choose another "
            "--out"
        )
    reads = [] if config.texts == "corpus" else [config.texts]
    check_kept_folder(out, reads, holding=("*/lock", "*/done.json"))
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"seeds must differ, found {list(seeds)}")
    out.mkdir(parents=True, exist_ok=True)
    root = out.absolute()
    shared = plan_shared(config, root)
    with _compiled_programs_in(root / "compiled"):
        run_stages(shared.stages)
        rates = choose_rates(config, shared)
        config = rates.config
        for seed in seeds:
            jax.clear_caches()  # programs hold memory maps; at 65530 of them Linux ends a process
            run_stages(plan_seed(config, shared, seed).stages)
    known = sorted(int(f.name.removeprefix("seed")) for f in root.glob("seed*") if f.is_dir())
    plans = {seed: plan_seed(config, shared, seed) for seed in known}
    done = {n: plan for n, plan in plans.items() if all(s.is_done for s in plan.stages)}
    write_report(rates, shared, done, out)


@contextlib.contextmanager
def _compiled_programs_in(folder: Path) -> Iterator[None]:
    """Caches compiled programs on disk for the next seed, unless the user has set a cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    if before[0] is not None:
        yield
        return

    def switch(values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads the folder's name only once

    switch([str(folder), 0.5])
    try:
        yield
    finally:
        switch(before)
