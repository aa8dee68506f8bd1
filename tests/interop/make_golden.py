"""Writes tests/interop/golden with torch and transformers: tiny models, inputs and logits.

    python tests/interop/make_golden.py

Each folder is what `save_pretrained` writes (config.json, model.safetensors) plus expected.npz:
tokens and attention_mask, int32 [B, S], and transformers' logits, float32 [B, S, V].
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "flex_olmo_top2": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "flex_olmo_tied_renormalized": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "head_dim": 6,
    },
    "olmo2": {"num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "olmo2_tied": {"tie_word_embeddings": True, "head_dim": 8, "num_hidden_layers": 3},
}


def random_model(kind: str, seed: int, **fields: Any) -> Any:
    """A model with weights that leave nothing at its default.

    Norms are not 1, router rows are long enough that routing is decisive, and no weight is so
    small that a mistake in its place would not be seen in the logits.
    """
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=0.5 if "mlp.gate.weight" in name else 0.2)
    model.set_attn_implementation("eager")
    return model.eval()


def random_batch(
    model: Any, seed: int, lengths: tuple[int, ...] = (12, 7, 1)
) -> dict[str, np.ndarray]:
    """Left-padded tokens, their mask, and the model's logits."""
    vocab_size = model.config.vocab_size
    width = max(lengths)
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    tokens = np.random.default_rng(seed).integers(2, vocab_size, mask.shape) * mask
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),  # as generate() does
        ).logits
    return {
        "tokens": tokens.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "logits": logits.numpy(),
    }


def main() -> None:
    for seed, (name, fields) in enumerate(MODELS.items()):
        folder = GOLDEN / name
        model = random_model("olmo2" if name.startswith("olmo2") else "flex_olmo", seed, **fields)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        expected: dict[str, Any] = random_batch(model, seed)
        np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main()
