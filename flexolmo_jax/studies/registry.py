"""The studies that `flexolmo study NAME` runs, by name.

Each module has `add_arguments(parser)` and `run(args)`, and its docstring says what it measures.
This table imports none of them, so that `flexolmo --help` stays quick.
"""

STUDIES: dict[str, str] = {
    "admission": "flexolmo_jax.studies.admission.study",
    "demo-seeds": "flexolmo_jax.studies.demo_seeds",
    "evidence": "flexolmo_jax.studies.evidence",
    "expert-parts": "flexolmo_jax.studies.expert_parts",
    "expert-size": "flexolmo_jax.studies.expert_size",
    "expert-training": "flexolmo_jax.studies.expert_training",
    "loading": "flexolmo_jax.studies.loading",
    "privacy-accounting": "flexolmo_jax.studies.privacy_accounting",
    "privacy-audits": "flexolmo_jax.studies.privacy_audits",
    "privacy-curve": "flexolmo_jax.studies.privacy_curve",
    "reproduction": "flexolmo_jax.studies.reproduction",
    "rounding": "flexolmo_jax.studies.rounding",
    "scaling": "flexolmo_jax.studies.scaling",
    "shares": "flexolmo_jax.studies.shares",
    "tasks-compared": "flexolmo_jax.studies.tasks_compared",
    "trace-membership": "flexolmo_jax.studies.trace_membership",
    "trace-memorized": "flexolmo_jax.studies.trace_memorized",
    "trace-similar": "flexolmo_jax.studies.trace_similar",
    "usage-agreement": "flexolmo_jax.studies.usage_agreement",
}
