"""What each method of a study costs: FLOPs a token, weights, and FLOPs of training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flexolmo_jax.config import EVIDENCE
from flexolmo_jax.modeling.experts import Ranks
from flexolmo_jax.modeling.flops import (
    evidence_flops,
    expert_alone_step_flops,
    forward_flops,
    low_rank_head_flops,
)
from flexolmo_jax.modeling.transformer import num_parameters
from flexolmo_jax.studies.baselines.config import StudyConfig


class Cost(NamedTuple):
    """Of answering with a method.

    Attributes:
      flops: of a token, needed in the sense of `modeling/flops.py`, in a sequence of the study's
        length.
      parameters: all weights that the method has to hold.
    """

    flops: float
    parameters: int


def expert_step_flops(config: StudyConfig) -> float:
    """FLOPs per token of training an owner's expert, with heads if the study has them."""
    ranks = Ranks(config.head_rank, config.evidence_rank)
    return expert_alone_step_flops(config.model, config.length, ranks)


def costs(config: StudyConfig, active: Mapping[str, int | None]) -> dict[str, Cost]:
    """The costs of the study's methods, by the names of their results.

    Args:
      config: of the study.
      active: experts that a token may use, by the name of a merged model; None is all.
    """
    count, model = len(config.domains), config.model
    whole = num_parameters(model)
    mixture = num_parameters(model.replace(num_experts=count))

    def merged(name: str) -> Cost:
        return Cost(forward_flops(model, config.length, active[name] or count), mixture)

    one = forward_flops(model, config.length, active=1)
    found = {
        "anchor": Cost(one, whole),
        "soup_weighted": Cost(one, whole),
        "prompt_routing": Cost(one, count * whole),
        "btm_running_top2": Cost(count * one, count * whole),  # the posterior asks all models
        "btm_decay_top2": Cost(count * one, count * whole),
        "btx_best": merged("btx"),
        "paper_topall": Cost(forward_flops(model, config.length, count), mixture),
        "flexolmo": merged("flexolmo"),
    }
    for times in config.unrestricted_flops:
        flops = forward_flops(model, config.length, config.unrestricted_active)
        found[f"unrestricted_{times:g}x"] = Cost(flops, mixture)
    if config.has_heads:
        found["headed_rows"] = _with_heads(config, merged("headed_rows"), active["headed_rows"])
        asked = Cost(count * one, mixture)  # all whole models, which share the anchor's weights
        found["btm_headed_decay_top2"] = _with_heads(config, asked, None)
        for name in ("evidence", "btx_evidence"):
            with_heads = _with_heads(config, merged(name), active[name])
            found[name] = _by_evidence(config, with_heads)
        for few in config.active:
            fewer = Cost(forward_flops(model, config.length, few), mixture)
            found[f"evidence_top{few}"] = _by_evidence(config, _with_heads(config, fewer, few))
    return found


def _with_heads(config: StudyConfig, cost: Cost, active: int | None) -> Cost:
    """With the output heads of the owners' experts; one of the active experts may be public."""
    owners = len(config.owners)
    used = min(active or owners, owners)
    flops = cost.flops + used * low_rank_head_flops(config.model, config.head_rank)
    return Cost(flops, cost.parameters + owners * _weights(config, config.head_rank))


def _by_evidence(config: StudyConfig, cost: Cost) -> Cost:
    """With the evidence heads of all experts, and the output head that they add to."""
    count = len(config.domains)
    model = config.model.replace(num_experts=count, evidence=EVIDENCE)
    weights = count * _weights(config, config.evidence_rank)
    more = evidence_flops(model, config.evidence_rank)
    return Cost(cost.flops + more, cost.parameters + weights)


def _weights(config: StudyConfig, rank: int) -> int:
    """The weights of a low-rank head: two factors and a bias."""
    vocabulary = config.model.vocab_size
    return rank * (config.model.width + vocabulary) + vocabulary


def costs_as_json(config: StudyConfig, choices: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """`costs` as the report has them, each with its share of the costs of BTM.

    Args:
      config: of the study.
      choices: by seed; where they differ, the largest number of active experts counts.
    """
    headed = ["evidence", "headed_rows", "btx_evidence"] if config.has_heads else []
    names = ["flexolmo", "btx", *headed]
    active = {
        name: max(of_seed[name]["active"] or len(config.domains) for of_seed in choices.values())
        for name in names
    }
    found = costs(config, active)
    whole = found["btm_decay_top2"]
    return {
        name: {
            **cost._asdict(),
            "flops_of_btm": cost.flops / whole.flops,
            "parameters_of_btm": cost.parameters / whole.parameters,
        }
        for name, cost in found.items()
    }
