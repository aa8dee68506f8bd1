"""Stage 2 with differential privacy: an expert whose package says how little it tells.

All that is made of the owner's text goes through `privacy/mechanism.py`: gradients in every step,
and one sum that the router rows are fitted to. What does not, is named in the statement.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from flexolmo_jax.config import ExpertTraining, ModelConfig, PrivacyConfig
from flexolmo_jax.data.sources import fingerprint
from flexolmo_jax.data.units import Units, prepare_units
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.parallel import placement
from flexolmo_jax.privacy import mechanism
from flexolmo_jax.privacy.calibration import calibrate, default_delta
from flexolmo_jax.privacy.canaries import canaries_of_run, check_they_are_read, check_they_fit
from flexolmo_jax.privacy.certificate import make_certificate
from flexolmo_jax.privacy.ledger import Ledger, Run, marked_run
from flexolmo_jax.privacy.text_marks import digest_of_documents
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.training.loop import train
from flexolmo_jax.training.private import release
from flexolmo_jax.training.private.steps import PrivateSteps
from flexolmo_jax.training.run import (
    RUN_FILE,
    alone_in_its_run,
    check_run,
    describe_run,
    record_run,
)
from flexolmo_jax.training.stages.expert import (
    anchor_to_train_beside,
    check_room_for,
    in_float32,
    public_text_of,
)
from flexolmo_jax.training.step import ExpertAloneLoss, ExpertPairLoss, Loss, with_parts

PLAUSIBLE = 20  # epsilon; above, what is seen becomes a billion times as likely
RELEASE = "rows_release.npz"  # in the run folder


@alone_in_its_run
def train_private_expert(
    config: ExpertTraining,
    privacy: PrivacyConfig,
    *,
    anchor: Path,
    data: str,
    name: str,
    out: Path,
    run: Path,
    ledger: Path,
    public: str | None = None,
    canaries: int = 0,
    resume: bool = False,
    separator: str | None = None,
) -> None:
    """Trains an expert with differential privacy and writes its package.

    Args:
      config: the stage's config; `data.batch_size` is the mean number of units in a batch.
      privacy: the owner's budget, and what it protects.
      ledger: the file that all private runs on this text are entered in.
      anchor, data, name, out, run, public, canaries, resume, separator: as in `train_expert`. A
        canary that is left out is a unit of nothing, so that the number of units does not tell of
        the coins.

    Raises:
      ValueError, FloatingPointError, Interrupted, AlreadyDone: as the parts say; the run would
        exceed the owner's limit.
    """
    check_name(name)
    if config.domain_embedding:
        raise ValueError(
            "domain_embedding with --dp-epsilon: an embedding of private text would leave without "
            "noise; leave it out (rows then start at the public expert's)"
        )
    for field in ("expert_parallel", "tensor_parallel"):
        if getattr(config, field) > 1:
            raise ValueError(
                f"{field} with --dp-epsilon: every device works on units of its own, with whole "
                f"weights; leave {field} out"
            )
    if config.router != "logistic":
        raise ValueError(
            f"router={config.router!r} with --dp-epsilon: rows follow from one noisy release, in "
            "a way of their own; leave router out"
        )
    config = privacy.applied_to(config)
    loaded, tokenizer = anchor_to_train_beside(anchor, config.data, separator)
    texts = public_text_of(loaded, public, anchor, config)
    # Read before the training that it is needed after, so that what is wrong with it shows now.
    read = release.units_of_public(
        texts, tokenizer, length=config.data.length, most_windows=privacy.windows,
        tokens=config.fit_tokens,
    ) if config.gating == "alone" else None  # fmt: skip
    expert = in_float32(loaded.weights.public)
    asked = {f"dp_{k}": v for k, v in dataclasses.asdict(privacy).items() if k not in NOT_THE_RUN}
    asked |= {"name": name, "canaries": canaries or None}
    asked |= {"separator": separator} if separator else {}
    asked["public"] = fingerprint(public) if public else None
    wanted = describe_run(
        config, source=fingerprint(data), source_at=data, anchor=loaded.identity, **asked
    )
    check_run(run, wanted, resume, config, out)
    trains = expert.feed_forward if config.gating == "alone" else expert
    check_room_for(config, data, out, run, trains, packaged=expert)
    drawn = canaries_of_run(canaries, run, tokenizer)
    extra, empty = (drawn.inserted, drawn.left_out) if drawn else ([], 0)
    units = prepare_units(data, config.data, tokenizer, run / "data", privacy.kind, extra, empty)
    units.report.tell()
    if drawn:
        most = 1 if privacy.kind == "sequence" else privacy.windows
        check_they_fit(drawn, tokenizer, config.data.length, most)
        check_they_are_read(drawn, units.windows, tokenizer, config, units=len(units))
    book = Ledger(ledger)
    text = digest_of_documents(data, config.data.text_field)
    on_main_process(lambda: book.check_text(data, text))
    delta = privacy.delta or book.delta() or default_delta(len(units))
    if delta >= 1 / len(units):
        raise ValueError(
            f"--dp-delta must be below 1 / {len(units)} units, found {delta}: above, a mechanism "
            "that publishes one unit in full would pass"
        )
    if privacy.epsilon > PLAUSIBLE or (privacy.limit or 0) > PLAUSIBLE:
        print(f"an epsilon above {PLAUSIBLE} promises next to nothing", file=sys.stderr)
    entry = _entered(book, config, privacy, name, run, len(units), delta, resume)
    on_main_process(lambda: book.mark_text(data, text))
    record_run(run, wanted)

    model = config.computing(loaded.config).replace(expert_compute="dense")  # see `ragged_dot`
    title = f"expert {name}"
    loss, trainable, frozen = _what_is_trained(config, model, loaded, expert)
    steps = PrivateSteps(title, config, privacy, loss, units, book, entry, delta)
    trained = train(steps, trainable, frozen, run)

    def finish() -> None:
        finished, rows_clip = trained, None
        if read is not None:
            found = _release(run, book, entry, units, loaded, read, config, privacy, steps.secret)
            finished = with_parts(expert, trained, expert.router)
            finished = release.with_rows(finished, *found[:2])
            rows_clip = found[2]
        others = [one.counted for one in book.finish(entry.id)[:-1]]
        statement = make_certificate(
            privacy, entry.planned, delta, window_tokens=config.data.length, rows_clip=rows_clip,
            other_runs=others, library=mechanism.version(),
        )  # fmt: skip
        facts = {
            "tokens_seen": config.steps * steps.tokens_a_step,  # at most; how many is not told
            "gating": config.gating,
            "domain_embedding": None,
            "licence": config.licence,
            "contact": config.contact,
            "heldout": config.data.split(),
            "privacy": statement,
            **(drawn.facts() if drawn else {}),
            **({"separator": separator} if separator else {}),
        }
        write_expert(out, finished, name, loaded, facts)

    on_main_process(finish)


NOT_THE_RUN = ("limit", "microbatch_size")  # of PrivacyConfig: may be another when a run goes on


def _entered(
    book: Ledger, config: ExpertTraining, privacy: PrivacyConfig, name: str, run: Path, units: int,
    delta: float, resume: bool,
) -> Run:  # fmt: skip
    """The run's entry in the ledger: a new one, or that of the run that goes on."""
    goes_on = resume and (run / RUN_FILE).exists()

    def enter() -> None:
        there = marked_run(run) if goes_on else None
        if there is not None:
            book.resume(there, run, privacy.limit)
            return
        planned = calibrate(
            privacy.epsilon, delta, units=units, mean_batch=config.data.batch_size,
            steps=config.steps, rows=config.gating == "alone",
            multiple=privacy.microbatch_size * jax.device_count(),
        )  # fmt: skip
        unit = privacy.unit
        if unit == "sequence":  # windows of other lengths are other units
            unit = f"sequence of {config.data.length} tokens"
        book.admit(name, run, unit, planned, delta, privacy.limit, privacy.epsilon)

    on_main_process(enter)
    there = marked_run(run)
    assert there is not None
    entry = book.run(there)
    rows = privacy.microbatch_size * jax.device_count()
    if entry.planned.largest_batch % rows:
        raise ValueError(
            f"the largest batch of this run, {entry.planned.largest_batch} units, cannot be "
            f"divided among {jax.device_count()} devices with --dp-microbatch-size {privacy.microbatch_size}; "
            "use as many as before, or fewer at a time"
        )
    return entry


def _what_is_trained(
    config: ExpertTraining, model: ModelConfig, loaded: LoadedAnchor, expert: Experts
) -> tuple[Loss, object, object]:
    if config.gating == "alone":
        frozen = (loaded.weights, loaded.weights.public.router)
        return ExpertAloneLoss(model, config.output_z_loss), expert.feed_forward, frozen
    pair = model.replace(num_experts=2)
    loss = ExpertPairLoss(pair, config.output_z_loss, config.router_z_loss)
    return loss, expert, loaded.weights


def _release(
    run: Path, book: Ledger, entry: Run, units: Units, loaded: LoadedAnchor,
    read: tuple[np.ndarray, np.ndarray], config: ExpertTraining, privacy: PrivacyConfig,
    secret: mechanism.Secret,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Rows, biases, and the clip norm of the release they follow from, which is made once."""
    noise = entry.planned.rows_noise_multiplier
    assert noise is not None
    anchor = placement.device_put(loaded.weights, None)  # on this process's first device
    public = release.look_at_public(read, anchor, loaded.config)
    file = run / RELEASE
    if not file.exists():
        total = release.clipped_total(
            anchor, units, public, loaded.config, secret.generator("rows"),
            most_windows=privacy.windows, microbatch_size=privacy.microbatch_size,
        )  # fmt: skip
        book.spend_rows(entry.id)
        made = release.release(total, public.clip, len(units), noise, secret.noise_key(0))
        with new_file(file, "wb") as opened:
            np.savez(opened, **made._asdict())
    with np.load(file) as kept:
        found = release.Release(kept["mean"], float(kept["noise"]), float(kept["clip"]))
    rows, biases = release.rows_of(found, public.whitenings, config.fit_prior)
    return rows, biases, found.clip
