"""Routing mass: equal to the slow sum, and told on demand."""

import json

import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.inference.mass import mass_by_name, shares_by_name
from flexolmo_jax.modeling.transformer import forward

PROMPTS = [[5, 6, 7], [9] * 40]
MASK = np.array([True, True, False, True])


def slow_mass(model, prompt, answer, mask) -> dict[str, float]:
    """Layer by layer and token by token, with the router's softmax and memory spelled out."""
    tokens = np.array([[*prompt, *answer]])
    out = forward(model.backbone, (model.experts,), tokens, model.config, allowed=mask)
    rows = np.asarray(out.router_logits, np.float64)[:, :, 0]  # [L, E, S]
    decay, weight = model.config.memory
    logits = rows.copy()
    for t in range(rows.shape[-1]):
        logits[..., t] += weight * sum(decay ** (t - s) * rows[..., s] for s in range(t))
    num_layers, num_experts, _ = logits.shape
    active = model.config.active_experts or num_experts
    mass = np.zeros(num_experts)
    for layer in range(num_layers):
        for token in range(len(prompt), len(prompt) + len(answer)):
            own = np.where(mask, logits[layer, :, token - 1], -np.inf)
            weights = np.exp(own - own.max())
            chosen = np.argsort(-weights)[:active]
            total = weights[chosen].sum() if model.config.renormalize else weights.sum()
            mass[chosen] += weights[chosen] / total / num_layers
    return mass_by_name(model.expert_names, mass)


@pytest.mark.parametrize("layer_by_layer", [True, False])
def test_it_is_the_sum_over_layers_and_new_tokens(model, monkeypatch, layer_by_layer):
    if not layer_by_layer:  # as on accelerators
        monkeypatch.setattr(fo.FlexOlmo, "_runs_layer_by_layer", lambda self: False)
    masses = []
    answers = model.generate(PROMPTS, 6, allowed=MASK, on_mass=masses.append)
    for prompt, answer, mass in zip(PROMPTS, answers, masses, strict=True):
        expected = slow_mass(model, prompt, answer, MASK)
        assert mass.keys() == expected.keys() == set(model.expert_names) - {"code"}
        assert all(abs(mass[name] - expected[name]) < 2e-4 for name in mass)
        assert abs(sum(mass.values()) - len(answer)) < 1e-3


def test_a_stream_tells_it_at_its_end(model):
    of_stream, of_generate = [], []
    pieces = model.stream(PROMPTS[0], 6, on_mass=of_stream.append)
    next(pieces)
    assert not of_stream
    list(pieces)
    model.generate(PROMPTS[:1], 6, on_mass=of_generate.append)
    assert of_stream == of_generate


def test_a_request_has_it_at_any_time(model):
    engine, request = model.engine(slots=1), model.request(PROMPTS[0], 4)
    assert request.mass.tolist() == [0.0] * 4
    engine.add(request)
    while engine.step():
        assert abs(request.mass.sum() - len(request.generated)) < 1e-5


def test_experts_without_mass_are_not_named():
    mass = np.array([0.5, 0.0, 1.5, 1e-6])
    assert list(mass_by_name("abcd", mass).items()) == [("c", 1.5), ("a", 0.5)]
    assert shares_by_name("abcd", mass[:3]) == {"c": 0.75, "a": 0.25}
    assert shares_by_name("ab", np.zeros(2)) == mass_by_name("ab", np.zeros(2)) == {}


def test_the_command_says_it_in_a_table_and_in_json(world, flexolmo):
    words = ("generate", "--model", world.merged, "--max-new-tokens", 4, "--prompt", "Once")
    code, printed, _ = flexolmo(*words, "--expert-mass", "--without", "code")
    assert code == 0 and "routing mass" in printed and "math" in printed and "code" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    code, printed, _ = flexolmo(*words, "upon", "--expert-mass", "--json")
    rows = json.loads(printed)
    assert code == 0 and len(rows) == 2
    assert all(abs(sum(row["expert_mass"].values()) - 4) < 1e-3 for row in rows)
    assert "expert_mass" not in flexolmo(*words, "--json")[1]
