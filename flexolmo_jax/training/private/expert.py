"""Stage 2 with differential privacy: an expert whose package carries a certificate.

Everything that is computed from the owner's text passes through `privacy/mechanism.py`: the
gradient of every step, of all parts of the expert together, and one sum that the router rows are
fitted to. The certificate names what does not.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from flexolmo_jax.config import ExpertTraining, PrivacyConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.units import Units, prepare_units
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.parallel import placement
from flexolmo_jax.privacy import mechanism
from flexolmo_jax.privacy.calibration import calibrate, default_delta
from flexolmo_jax.privacy.canaries import (
    Canaries,
    canaries_of_run,
    check_they_are_read,
    check_they_fit,
)
from flexolmo_jax.privacy.certificate import make_certificate
from flexolmo_jax.privacy.ledger import Ledger, Run, marked_run
from flexolmo_jax.privacy.text_marks import digest_of_documents
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.training.loop import train
from flexolmo_jax.training.objectives import expert_parts, trained_expert
from flexolmo_jax.training.private import release
from flexolmo_jax.training.private.steps import PrivateSteps
from flexolmo_jax.training.public_data import public_text_of, public_units
from flexolmo_jax.training.run import (
    RUN_FILE,
    alone_in_its_run,
    check_run,
    record_run,
)
from flexolmo_jax.training.starting_point import (
    anchor_to_train_beside,
    check_room_for,
    describe_expert_run,
    expert_facts,
    in_float32,
    initial_expert,
)

MAX_MEANINGFUL_EPSILON = 20  # above, an observation may become a billion times as likely
RELEASE = "rows_release.npz"  # in the run folder
RESUMABLE_FIELDS = ("limit", "microbatch_size")  # of PrivacyConfig: may differ on resuming


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
      ledger: the file that records all private runs on this text.
      anchor, data, name, out, run, public, canaries, resume, separator: as in `train_expert`.
        Held-out canaries become empty units, so the number of units does not reveal which were
        included.

    Raises:
      ValueError, FloatingPointError, Interrupted, AlreadyDone: as `train_expert`; ValueError also
        if the run would exceed the owner's limit.
    """
    check_name(name)
    _check_config(config)
    config = privacy.applied_to(config)
    loaded, tokenizer = anchor_to_train_beside(anchor, config.data, separator)
    texts = public_text_of(loaded, public, anchor, config)
    # Read before the training, although needed after it, so that errors in it show now.
    public_read = public_units(
        texts, tokenizer, length=config.data.length, max_windows=privacy.windows,
        tokens=config.fit_tokens,
    ) if config.gating == "fixed" else None  # fmt: skip
    expert = in_float32(initial_expert(config, loaded.config, loaded.weights.public))
    wanted = describe_expert_run(
        config, loaded, name=name, data=data, public=public, canaries=canaries,
        separator=separator, **_described(privacy),
    )  # fmt: skip
    check_run(run, wanted, resume, config, out)
    # `ragged_dot`, of grouped experts, fails under the vmap over units.
    dense = dataclasses.replace(config, expert_compute="dense")
    loss, trainable, frozen = expert_parts(dense, loaded.config, loaded.weights, expert)
    check_room_for(config, data, out, run, trainable, packaged=expert)
    units, drawn = _own_units(config, privacy, data, run, tokenizer, canaries)
    book = Ledger(ledger)
    text = digest_of_documents(data, config.data.text_field)
    on_main_process(lambda: book.check_text(data, text))
    delta = _delta(book, privacy, len(units))
    entry = _enter(book, config, privacy, name, run, len(units), delta, resume)
    on_main_process(lambda: book.mark_text(data, text))
    record_run(run, wanted)

    steps = PrivateSteps(f"expert {name}", config, privacy, loss, units, book, entry, delta)
    trained = train(steps, trainable, frozen, run)

    def finish() -> None:
        finished, rows_clip = trained_expert(config, expert, trained), None
        if public_read is not None:
            rows, biases, rows_clip = _release(
                run, book, entry, units, loaded, public_read, config, privacy, steps.secret
            )
            finished = release.with_rows(finished, rows, biases)
        other_runs = [other.counted for other in book.finish(entry.id)[:-1]]
        certificate = make_certificate(
            privacy, entry.planned, delta, window_tokens=config.data.length, rows_clip=rows_clip,
            other_runs=other_runs, library=mechanism.version(), parts=expert.parts,
            optimizer=config.optimizer.name,
        )  # fmt: skip
        facts = expert_facts(
            config, drawn, separator, privacy=certificate,
            tokens_seen=config.steps * steps.tokens_per_step,  # upper bound: the count is private
        )  # fmt: skip
        write_expert(out, finished, name, loaded, facts)

    on_main_process(finish)


def _check_config(config: ExpertTraining) -> None:
    """Raises ValueError if the config asks for something that private training cannot do."""
    if config.domain_embedding:
        raise ValueError(
            "domain_embedding with --dp-epsilon: an embedding of private text would leave without "
            "noise; leave it out (rows then start at the public expert's)"
        )
    for field in ("expert_parallel", "tensor_parallel"):
        if getattr(config, field) > 1:
            raise ValueError(
                f"{field} with --dp-epsilon: every device needs all weights, for units of its own; "
                f"leave {field} out"
            )
    if config.router != "logistic":
        raise ValueError(
            f"router={config.router!r} with --dp-epsilon: private rows are always fitted to one "
            "noisy release; leave router out"
        )


def _described(privacy: PrivacyConfig) -> dict[str, object]:
    """The fields that must not change when the run is resumed."""
    fields = dataclasses.asdict(privacy).items()
    return {f"dp_{name}": value for name, value in fields if name not in RESUMABLE_FIELDS}


def _own_units(
    config: ExpertTraining, privacy: PrivacyConfig, data: str, run: Path, tokenizer: Tokenizer,
    canaries: int,
) -> tuple[Units, Canaries | None]:  # fmt: skip
    """The owner's text as units of privacy, with the canaries that were drawn into it."""
    drawn = canaries_of_run(canaries, run, tokenizer)
    extra, empty = (drawn.inserted, drawn.left_out) if drawn else ([], 0)
    units = prepare_units(data, config.data, tokenizer, run / "data", privacy.kind, extra, empty)
    units.report.tell()
    if drawn:
        max_windows = 1 if privacy.kind == "sequence" else privacy.windows
        check_they_fit(drawn, tokenizer, config.data.length, max_windows)
        check_they_are_read(drawn, units.windows, tokenizer, config, units=len(units))
    return units, drawn


def _delta(book: Ledger, privacy: PrivacyConfig, units: int) -> float:
    """Delta of the run; warns of an epsilon that is too large to mean anything.

    Raises:
      ValueError: delta is too large for the number of units.
    """
    delta = privacy.delta or book.delta() or default_delta(units)
    if delta >= 1 / units:
        raise ValueError(
            f"--dp-delta must be below 1 / {units} units, found {delta}: above, a mechanism that "
            "publishes one unit in full would pass"
        )
    if max(privacy.epsilon, privacy.limit or 0) > MAX_MEANINGFUL_EPSILON:
        print(
            f"an epsilon above {MAX_MEANINGFUL_EPSILON} promises next to nothing", file=sys.stderr
        )
    return delta


def _enter(
    book: Ledger, config: ExpertTraining, privacy: PrivacyConfig, name: str, run: Path, units: int,
    delta: float, resume: bool,
) -> Run:  # fmt: skip
    """The run's entry in the ledger: a new one, or the entry of the run that is resumed."""
    multiple = privacy.microbatch_size * jax.device_count()
    resumes = resume and (run / RUN_FILE).exists()

    def enter() -> None:
        earlier = marked_run(run) if resumes else None
        if earlier is not None:
            book.resume(earlier, run, privacy.limit)
            return
        planned = calibrate(
            privacy.epsilon, delta, units=units, mean_batch=config.data.batch_size,
            steps=config.steps, rows=config.gating == "fixed",
            multiple=multiple,
        )  # fmt: skip
        unit = privacy.unit
        if unit == "sequence":  # windows of other lengths are other units
            unit = f"sequence of {config.data.length} tokens"
        book.admit(name, run, unit, planned, delta, privacy.limit, privacy.epsilon)

    on_main_process(enter)
    run_id = marked_run(run)
    assert run_id is not None
    entry = book.run(run_id)
    if entry.planned.largest_batch % multiple:
        raise ValueError(
            f"the largest batch of this run, {entry.planned.largest_batch} units, cannot be "
            f"divided among {jax.device_count()} devices with --dp-microbatch-size "
            f"{privacy.microbatch_size}; use as many devices as before, or a smaller microbatch"
        )
    return entry


def _release(
    run: Path, book: Ledger, entry: Run, units: Units, loaded: LoadedAnchor,
    public_read: tuple[np.ndarray, np.ndarray], config: ExpertTraining, privacy: PrivacyConfig,
    secret: mechanism.Secret,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """The router rows, their biases, and the clip norm of the release that both follow from.

    The release is made once, and stored in the run folder: a resumed run reads it.
    """
    noise = entry.planned.rows_noise_multiplier
    assert noise is not None
    anchor = placement.device_put(loaded.weights, None)  # on this process's first device
    public = release.public_statistics(public_read, anchor, loaded.config)
    file = run / RELEASE
    if not file.exists():
        total = release.clipped_total(
            anchor, units, public, loaded.config, secret.generator("rows"),
            max_windows=privacy.windows, microbatch_size=privacy.microbatch_size,
        )  # fmt: skip
        book.spend_rows(entry.id)
        released = release.release(total, public.clip, len(units), noise, secret.noise_key(0))
        with new_file(file, "wb") as opened:
            np.savez(opened, **released._asdict())
    with np.load(file) as saved:
        released = release.Release(saved["mean"], float(saved["noise"]), float(saved["clip"]))
    rows, biases = release.rows_of(released, public.whitenings, config.fit_prior)
    return rows, biases, released.clip
