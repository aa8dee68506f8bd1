"""Stage 3, optional: the merged model's router rows are tuned together on proxies (paper, A.2).

The proxies are public documents that each owner chose because they resemble its own
(data/proxies.py); no owner's text is needed. Tuned rows depend on every expert that was present,
so removing an expert from a tuned model also undoes the tuning.
"""

from pathlib import Path

import jax

from flexolmo_jax.config import RouterTraining
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.loading import load_model
from flexolmo_jax.federation.merge import write_tuned
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.parallel import placement
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.objectives import RouterRows, router_parts
from flexolmo_jax.training.run import alone_in_its_run, check_run, describe_run, record_run
from flexolmo_jax.training.starting_point import check_length, check_room_for


@alone_in_its_run
def train_router(
    config: RouterTraining,
    *,
    model: str | Path,
    data: str,
    out: str | Path,
    run: str | Path,
    resume: bool = False,
) -> None:
    """Tunes the router rows of a merged model and writes a merged model with them.

    Args:
      config: the stage's config.
      model: a merged model.
      data: the proxies of all owners and public text, as `read_documents` takes it (a folder).
      out: the tuned merged model; must not exist.
      run: folder of the run.
      resume: continue from the newest checkpoint in `run`.

    Raises:
      ValueError: an argument or a file is wrong; the message says what to do.
      FloatingPointError: the training diverged.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      AlreadyDone: the package exists.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.RouterTraining(
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=2,
      ... )
      >>> fo.train_router(
      ...     config, model="ours", data="public.jsonl",
      ...     out="tuned", run="tuned.run",
      ... )
      >>> fo.load("tuned").expert_names
      ('public', 'math', 'code')
    """
    model, out, run = Path(model), Path(out), Path(run)
    mesh = mesh_of(config)
    manifest = read_manifest(model, kind="merged")
    if not manifest["experts"]:
        raise ValueError(
            f"{model}: has no expert beside the public one, so there is nothing to route and no "
            "router to tune; add one with `flexolmo experts add`"
        )
    if manifest.get("evidence"):
        raise ValueError(
            f"{model}: is routed by evidence, so its router rows are not used; merge it again with "
            "--no-evidence to tune them"
        )
    loaded = load_model(model, mesh=mesh)
    if loaded.tokenizer is None:
        raise ValueError(f"{model}: there is no tokenizer.json with its anchor")
    check_length(config.data, loaded.config, model)
    rows = RouterRows.of(placement.to_host(loaded.experts.router))
    wanted = describe_run(config, data, model=manifest["digest"])
    check_run(run, wanted, resume, config, out)
    check_room_for(config, data, out, run, rows)
    source, report = prepare(data, config.data, loaded.tokenizer, run / "data")
    report.tell()
    record_run(run, wanted)
    loss, trainable, frozen = router_parts(
        config, loaded.config, loaded.backbone, loaded.experts, rows
    )
    rows = train(StandardSteps("router", config, loss, source), trainable, frozen, run)
    count = len(loaded.names)  # without the padding experts that pad the stack
    rows = RouterRows(rows.row[:, :count], rows.bias[:, : count - 1])
    tuned = jax.device_get(rows.router(loaded.experts.router))
    on_main_process(lambda: write_tuned(out, model, tuned))
