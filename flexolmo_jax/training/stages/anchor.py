"""Stage 1: the public model, trained on public text by whoever hosts it."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import AnchorTraining
from flexolmo_jax.data.domain_embedding import domain_embedding, source_name
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor, write_anchor
from flexolmo_jax.modeling.experts import Ranks, with_parts
from flexolmo_jax.modeling.transformer import Anchor, init_anchor
from flexolmo_jax.parallel import placement
from flexolmo_jax.runtime.processes import on_main_process, one_process_at_a_time
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.objectives import anchor_parts
from flexolmo_jax.training.public_sample import (
    public_sample,
    shuffled_training_documents,
    training_documents,
)
from flexolmo_jax.training.run import (
    RUN_FILE,
    alone_in_its_run,
    check_run,
    describe_run,
    package_facts,
    record_run,
)
from flexolmo_jax.training.starting_point import check_room_for


@alone_in_its_run
def train_anchor(
    config: AnchorTraining,
    *,
    data: str,
    out: str | Path,
    run: str | Path,
    resume: bool = False,
    start: str | Path | None = None,
) -> None:
    """Trains an anchor and writes its package.

    Args:
      config: the stage's config.
      data: the public text, as `read_documents` takes it.
      out: the anchor package; must not exist.
      run: folder of the run: windows, checkpoints, metrics, plot.
      resume: continue from the newest checkpoint in `run`.
      start: an anchor package (same sizes and tokenizer) to start from; default: random weights.

    Raises:
      ValueError: an argument or a file is wrong; the message says what to do.
      FloatingPointError, Interrupted: as `train` says.
      AlreadyDone: the package exists.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.AnchorTraining(
      ...     model=fo.ModelConfig(
      ...         vocab_size=512, width=32, num_layers=2, num_heads=2, ffn_width=48, max_length=64
      ...     ),
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=2,
      ...     public_tokens=2048,
      ... )
      >>> fo.train_anchor(config, data="public.jsonl", out="public", run="public.run")
      >>> fo.load("public").expert_names
      ('public',)
    """
    out, run = Path(out), Path(run)
    given = None if start is None else read_anchor(Path(start))
    mesh = mesh_of(config)
    wanted = describe_run(config, data, **({"start": given.identity} if given else {}))
    check_run(run, wanted, resume, config, out)
    ranks = Ranks(evidence=config.evidence_rank)
    initial = functools.partial(init_anchor, config.model, jax.random.key(config.seed), ranks)
    check_room_for(config, data, out, run, jax.eval_shape(initial))
    tokenizer = one_process_at_a_time(lambda: _tokenizer(config, data, run))
    _check_model(config, tokenizer, given)
    source, report = prepare(data, config.data, tokenizer, run / "data")
    report.tell()
    # Read before the training, although needed after it, so that errors in it show now.
    public_text, row = _public_text_and_row(config, data, tokenizer)
    record_run(run, wanted)
    weights = _initial_weights(initial, mesh, given, ranks)
    loss, trainable, frozen = anchor_parts(config, config.model, weights)
    weights = train(StandardSteps("anchor", config, loss, source), trainable, frozen, run)
    if row is not None:
        weights = _with_public_row(weights, row)
    facts = package_facts(config, domain_embedding=source_name(config.domain_embedding))
    on_main_process(lambda: write_anchor(out, weights, config.model, tokenizer, public_text, facts))


def _initial_weights(initial, mesh, given: LoadedAnchor | None, ranks: Ranks) -> Anchor:
    """New weights, or those of a given anchor; with a new evidence head if that has another."""
    if given is None:
        return placement.init_sharded(initial, mesh)
    backbone, public = given.weights
    if public.ranks != ranks:
        public = with_parts(public, head=None, evidence=None)
        public.set_heads(given.config, ranks, jax.random.key(0))
    return Anchor(backbone, public)


def _public_text_and_row(
    config: AnchorTraining, data: str, tokenizer: Tokenizer
) -> tuple[list[str], np.ndarray | None]:
    """The public text for the package, and the public router row [D] if the config asks for one."""
    documents = shuffled_training_documents(data, config.data)
    sample, row = public_sample(documents, tokenizer, config.public_tokens), None
    if config.domain_embedding:
        texts = [d.text for d in documents]
        row = domain_embedding(config.domain_embedding, texts, config.model.width)
    return sample, row


def _check_model(config: AnchorTraining, tokenizer: Tokenizer, start: LoadedAnchor | None) -> None:
    """Raises ValueError if the model does not fit the tokenizer, or the anchor to start from."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.vocab_size="
            f"{config.model.vocab_size}; make the model's vocabulary at least as large"
        )
    if start is None:
        return
    ours, theirs = config.model.architecture(), start.config.architecture()
    for field in ours:
        if ours[field] != theirs[field]:
            raise ValueError(
                f"cannot start from an anchor of another model: expected {field}={ours[field]}, "
                f"found {theirs[field]}"
            )
    if start.tokenizer is None or start.tokenizer.digest != tokenizer.digest:
        raise ValueError("cannot start from an anchor with another tokenizer: name its own")


def _tokenizer(config: AnchorTraining, data: str, run: Path) -> Tokenizer:
    """The config's tokenizer, or a BPE trained on the training documents and stored in `run`."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer, config.separator)
    file = run / "tokenizer.json"
    if file.exists() and (run / RUN_FILE).exists():  # else: of a run that never started
        return Tokenizer.load(file, config.separator)
    documents = training_documents(data, config.data)
    texts = (d.text for d in documents)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size, config.separator)
    run.mkdir(parents=True, exist_ok=True)
    replace_file(file, tokenizer.json)
    return tokenizer


def _with_public_row(weights: Anchor, row: np.ndarray) -> Anchor:
    """The anchor with the same public router row in every layer, as the paper has it (A.2)."""
    weights.public.router.row[...] = jnp.broadcast_to(
        jnp.asarray(row), weights.public.router.row.shape
    )
    return weights
