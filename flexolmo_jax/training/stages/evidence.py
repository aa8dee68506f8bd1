"""A public evidence head for an anchor that exists: ours, or a Hugging Face directory."""

from pathlib import Path

import jax

from flexolmo_jax.config import EvidenceTraining, check_rank
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import LoadedAnchor, write_anchor
from flexolmo_jax.modeling.experts import Ranks, with_parts
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.objectives import evidence_parts
from flexolmo_jax.training.public_sample import public_sample, shuffled_training_documents
from flexolmo_jax.training.run import (
    alone_in_its_run,
    check_run,
    describe_run,
    package_facts,
    record_run,
)
from flexolmo_jax.training.starting_point import (
    anchor_to_train_beside,
    check_room_for,
    in_float32,
)

# What the manifest of an anchor says of its training; it stays as it is.
FACTS = ("licence", "contact", "tokens_seen", "heldout", "domain_embedding")


@alone_in_its_run
def train_evidence(
    config: EvidenceTraining,
    *,
    anchor: str | Path,
    data: str,
    out: str | Path,
    run: str | Path,
    resume: bool = False,
    separator: str | None = None,
    begin_as_public: bool = False,
) -> None:
    """Trains a public evidence head (modeling/evidence.py), and writes the anchor with it.

    The anchor's identity does not change, so experts that were trained beside it stay valid.

    Args:
      config: the stage's config.
      anchor: an anchor package, or a Hugging Face directory of an OLMo 2 model.
      data: the public text, as `read_documents` takes it.
      out: the anchor package with the head; must not exist.
      run: folder of the run: windows, checkpoints, metrics, plot.
      resume: continue from the newest checkpoint in `run`.
      separator: as in `train_expert`.
      begin_as_public: the head begins as the one that the anchor has, as an owner's does in
        `train_expert`, not at zero.

    Raises:
      ValueError: an argument or a file is wrong, or the anchor has no head of the config's rank to
        begin as; the message says what to do.
      FloatingPointError, Interrupted: as `train` says.
      AlreadyDone: the package exists.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.EvidenceTraining(
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=2,
      ...     evidence_rank=8,
      ... )
      >>> fo.train_evidence(
      ...     config, anchor="anchor", data="public.jsonl", out="with_evidence",
      ...     run="with_evidence.run",
      ... )
      >>> fo.load("with_evidence").expert_names
      ('public',)
    """
    anchor, out, run = Path(anchor), Path(out), Path(run)
    loaded, tokenizer = anchor_to_train_beside(anchor, config.data, separator)
    check_rank("evidence_rank", config.evidence_rank, loaded.config)
    mesh_of(config)  # raises if the batch cannot be divided among the devices
    public = loaded.weights.public
    if begin_as_public and public.ranks.evidence != config.evidence_rank:
        raise ValueError(
            f"{anchor}: expected an evidence head of rank {config.evidence_rank} to begin as, "
            f"found rank {public.ranks.evidence}"
        )
    begun = {"begin_as_public": True} if begin_as_public else {}
    wanted = describe_run(config, data, anchor=loaded.identity, **begun)
    check_run(run, wanted, resume, config, out)
    if not begin_as_public:
        public = with_parts(public, evidence=None)
        public.set_heads(loaded.config, Ranks(evidence=config.evidence_rank), jax.random.key(0))
    check_room_for(config, data, out, run, public.evidence, packaged=loaded.weights)
    source, report = prepare(data, config.data, tokenizer, run / "data")
    report.tell()
    public_text = loaded.public_text
    if not public_text:  # of a Hugging Face directory, or an anchor that was packaged without
        documents = shuffled_training_documents(data, config.data)
        public_text = public_sample(documents, tokenizer, config.public_tokens)
    record_run(run, wanted)
    head = in_float32(public.evidence)
    loss, trainable, frozen = evidence_parts(config, loaded.config, loaded.weights.backbone, head)
    trained = train(StandardSteps("evidence", config, loss, source), trainable, frozen, run)

    def finish() -> None:
        weights = Anchor(loaded.weights.backbone, with_parts(public, evidence=trained))
        facts = _facts(config, loaded)
        write_anchor(out, weights, loaded.config, tokenizer, public_text, facts)

    on_main_process(finish)


def _facts(config: EvidenceTraining, anchor: LoadedAnchor) -> dict[str, object]:
    if anchor.package is None:
        return package_facts(config)
    manifest = anchor.package.manifest
    return {name: manifest[name] for name in FACTS if name in manifest}
