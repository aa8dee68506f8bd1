"""The peer's side: `transformers` FlexOlmo on PyTorch, set up as well as we know how.

Its experts have several implementations; the benchmark runs two and compares with the faster one
("batched_mm" was five times slower on CPU). An owner's training gets expert weights that can be
frozen one by one, which its packed parameters do not allow: gradients of the frozen expert would
otherwise be computed and thrown away.
"""

import tempfile
from collections.abc import Callable

import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config, Olmo2ForCausalLM
from transformers.models.flex_olmo import modeling_flex_olmo

from benchmarks.sizes import Size
from flexolmo_jax.config import ModelConfig


class OneByOne(torch.nn.Module):
    """A packed parameter [E, ...] as E parameters, indexed in the same way."""

    def __init__(self, packed: torch.Tensor):
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.nn.Parameter(part.clone()) for part in packed)

    def __getitem__(self, index) -> torch.Tensor:
        return self.parts[int(index)]


def build(case: str, size: Size, implementation: str) -> Callable[[], None]:
    """One run of a case, ready to be timed.

    Raises:
      ValueError: the case does not exist on this side.
    """
    torch.manual_seed(0)
    if case == "gemm":
        a, b = (torch.randn(size.gemm, size.gemm) for _ in range(2))
        return lambda: torch.mm(a, b)
    if case == "stream":
        matrix, vector = torch.randn(size.stream, size.stream), torch.randn(size.stream)
        return lambda: torch.mv(matrix, vector)
    if case == "loss_100352":
        return _loss(size)
    if case == "load":
        folder = tempfile.mkdtemp()
        _flex_olmo(size.merged(), implementation).save_pretrained(folder)
        return lambda: FlexOlmoForCausalLM.from_pretrained(folder)
    if case == "anchor_step":
        return _step(_olmo2(size.config), size, lambda name: True)
    if case == "expert_step":
        model = _flex_olmo(size.pair(), implementation)
        if implementation == "eager":
            for layer in model.model.layers:
                experts = layer.mlp.experts
                for name in ("gate_up_proj", "down_proj"):
                    packed = getattr(experts, name).detach()
                    delattr(experts, name)
                    setattr(experts, name, OneByOne(packed))
            return _step(model, size, lambda name: name.endswith("_proj.parts.1"))
        return _step(model, size, lambda name: ".experts." in name)
    if case == "merged_forward":
        model = _flex_olmo(size.merged(), implementation).eval()
        tokens = _tokens(size)
        return torch.inference_mode()(lambda: model(tokens).logits)
    if case.startswith("decode_"):
        model = _flex_olmo(size.merged(), implementation).eval()
        prompt = torch.randint(0, size.config.vocab_size, (int(case.split("_")[1]), size.prompt))
        exact = {"min_new_tokens": size.new_tokens, "max_new_tokens": size.new_tokens}
        return torch.inference_mode()(
            lambda: model.generate(prompt, do_sample=False, use_cache=True, **exact)
        )
    if case.startswith("moe_"):
        experts, active = map(int, case.split("_")[1:])
        config = _config(size.config.replace(num_experts=experts, active_experts=active))
        config._experts_implementation = implementation
        layer = modeling_flex_olmo.FlexOlmoSparseMoeBlock(config)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(1, size.tokens, size.config.width, requires_grad=True)

        def run():
            layer.zero_grad(set_to_none=True)
            x.grad = None
            layer(x).sum().backward()

        return run
    raise ValueError(f"no case {case!r} on the peer's side")


def _loss(size: Size) -> Callable[[], None]:
    hidden = torch.randn(size.batch * size.length, size.config.width, requires_grad=True)
    head = torch.randn(100_352, size.config.width)
    targets = torch.randint(0, 100_352, (len(hidden),))

    def run():
        hidden.grad = None
        torch.nn.functional.cross_entropy(hidden @ head.T, targets).backward()

    return run


def _config(config: ModelConfig) -> FlexOlmoConfig:
    return FlexOlmoConfig(
        num_experts=config.num_experts,
        num_experts_per_tok=config.active_experts or config.num_experts,
        **_shared(config),
    )


def _shared(config: ModelConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_length,
        "pad_token_id": None,
        "eos_token_id": None,
        "bos_token_id": None,
    }


def _olmo2(config: ModelConfig) -> Olmo2ForCausalLM:
    return Olmo2ForCausalLM(Olmo2Config(**_shared(config)))


def _flex_olmo(config: ModelConfig, implementation: str) -> FlexOlmoForCausalLM:
    return FlexOlmoForCausalLM._from_config(
        _config(config), experts_implementation=implementation, attn_implementation="sdpa"
    )


def _tokens(size: Size) -> torch.Tensor:
    return torch.randint(0, size.config.vocab_size, (size.batch, size.length))


def _step(model, size: Size, trained: Callable[[str], bool]) -> Callable[[], None]:
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
    )
    tokens = _tokens(size)

    def run():
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return run
