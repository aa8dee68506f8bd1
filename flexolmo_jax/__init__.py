"""FlexOlmo in JAX: one language model from many data owners who never pool their data."""

import importlib

from flexolmo_jax.version import __version__

# Imported at first use, so that the command line starts quickly and can configure memory before
# the libraries start threads.
_MODULES = {
    "AnchorTraining": "config",
    "DataConfig": "config",
    "ExpertTraining": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "EvidenceTraining": "config",
    "RouterTraining": "config",
    "load_config": "config",
    "bits_per_byte": "evaluation.bits_per_byte",
    "add_expert": "federation.merge",
    "merge": "federation.merge",
    "remove_expert": "federation.merge",
    "Engine": "inference.engine",
    "Request": "inference.request",
    "FlexOlmo": "model",
    "load": "model",
    "make_mesh": "parallel.mesh",
    "train_anchor": "training.stages.anchor",
    "train_expert": "training.stages.expert",
    "train_evidence": "training.stages.evidence",
    "train_router": "training.stages.router",
}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
