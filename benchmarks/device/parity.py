"""Parity with transformers on the device, and what a switched-off expert leaves there.

PyTorch and JAX run in processes of their own: the first writes a model and its numbers into a
folder, the second reads them.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.device.sections import MODEL, REFERENCE

MAX_WIDTH = 512  # the reference is computed on the CPU
PROMPT, NEW_TOKENS = 16, 24
COMPUTE = ("dense", "grouped")
EXACT = "highest"  # the precision of matmuls: XLA's default for float32 on a GPU is TF32


class Check(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    is_good: bool


def write_reference(folder: Path, width: int) -> list[Check]:
    """Writes a FlexOlmo model of transformers, and its logits and tokens.

    The reference are logits in float32 on the CPU. Beside them: PyTorch's own error on the device,
    in float32 and bfloat16.
    """
    import torch
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    torch.manual_seed(0)
    width = min(width, MAX_WIDTH)
    config = FlexOlmoConfig(
        vocab_size=512, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = FlexOlmoForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:  # routing is decisive, logits are of the size of a trained model's
                weight.normal_(std=0.5 if "mlp.gate.weight" in name else width**-0.5)
    model.save_pretrained(folder / MODEL)
    tokens = torch.randint(0, config.vocab_size, (4, 128))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = {}
    with torch.inference_mode():
        logits = model(tokens).logits.numpy()
        generated = model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False)
        for dtype in ("float32", "bfloat16"):
            model = model.to(device, getattr(torch, dtype))
            found = model(tokens.to(device)).logits.float().cpu().numpy()
            errors[dtype] = _relative(found, logits)
    np.savez(
        folder / REFERENCE, tokens=tokens.numpy(), logits=logits,
        generated=generated[:, PROMPT:].numpy(), bfloat16_error=errors["bfloat16"],
    )  # fmt: skip
    return [Check(f"logits, {dtype}", f"{error:.1e}", True) for dtype, error in errors.items()]


def compare(folder: Path, width: int) -> list[Check]:
    """Our logits and tokens against the reference, then masks against smaller merges."""
    import jax

    from flexolmo_jax.interop import hf_import
    from flexolmo_jax.model import FlexOlmo

    del width  # the reference's
    reference = np.load(folder / REFERENCE)
    backbone, experts, config = hf_import.load(folder / MODEL)
    names = tuple(map(str, range(config.num_experts)))

    def model(dtype: str, compute: str = "dense") -> FlexOlmo:
        weights = jax.tree.map(lambda x: x.astype(dtype), (backbone, experts))
        changed = config.replace(dtype=dtype, expert_compute=compute)
        return FlexOlmo(*weights, changed, names, None)

    checks = []
    bounds = {  # relative errors of logits, by dtype and precision
        ("float32", EXACT): 1e-5,
        ("float32", "default"): 5e-3,
        ("bfloat16", "default"): 1.5 * float(reference["bfloat16_error"]),
    }
    for ((dtype, precision), bound), compute in itertools.product(bounds.items(), COMPUTE):
        with jax.default_matmul_precision(precision):
            logits = model(dtype, compute).logits(reference["tokens"])
        error = _relative(np.asarray(logits), reference["logits"])
        what = f"logits, {dtype}, {precision} precision, {compute}"
        checks.append(Check(what, f"{error:.1e}", error <= bound))
    with jax.default_matmul_precision(EXACT):
        prompts = reference["tokens"][:, :PROMPT].tolist()
        generated = np.asarray(model("float32").generate(prompts, NEW_TOKENS))
    same, all_tokens = int(np.sum(generated == reference["generated"])), generated.size
    checks.append(
        Check("greedy tokens, float32", f"{same} of {all_tokens} equal", same == all_tokens)
    )
    for dtype, compute in itertools.product(("float32", "bfloat16"), COMPUTE):
        checks += _switched_off(model(dtype, compute), reference["tokens"])
    return checks


def _switched_off(model: Any, tokens: np.ndarray) -> list[Check]:
    """Expert 2, off and with NaN weights, against a model that never had it."""
    import jax
    import jax.numpy as jnp

    from flexolmo_jax.modeling.experts import select

    off, kept = 2, [0, 1, 3]
    poisoned = dataclasses.replace(
        model, experts=jax.tree.map(lambda x: x.at[:, off].set(jnp.nan), model.experts)
    )
    smaller = dataclasses.replace(
        model,
        experts=select(model.experts, kept),
        config=model.config.replace(num_experts=len(kept)),
        expert_names=tuple(model.expert_names[e] for e in kept),
    )
    never = np.asarray(smaller.logits(tokens))
    without = np.asarray(poisoned.logits(tokens, without=[model.expert_names[off]]))
    allowed = np.ones((len(tokens), len(model.expert_names)), bool)
    allowed[0, off] = False
    in_batch = np.asarray(poisoned.logits(tokens, allowed=allowed))[:1]
    how = f"{model.config.dtype}, {model.config.expert_compute}"
    return [
        _equal(f"off, and never merged, {how}", without, never),
        _equal(f"off in one row of a batch, {how}", in_batch, never[:1]),
    ]


def _equal(what: str, found: np.ndarray, expected: np.ndarray) -> Check:
    if np.array_equal(found, expected):
        return Check(what, "bit for bit", True)
    error = _relative(found, expected)
    return Check(what, f"up to {error:.1e}", bool(error < 3e-2))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what was expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
