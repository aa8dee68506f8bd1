"""Stage 3, optional: the merged model's router rows tuned together, on proxies (paper, A.2).

The proxies are public documents that each owner picked for likeness to its own (data/proxies.py);
no owner's text is needed. Rows tuned so keep an indirect trace of every expert that was present,
so taking an expert out of a tuned model also undoes the tuning.
"""

from pathlib import Path

import jax

from flexolmo_jax.config import RouterTraining
from flexolmo_jax.data.sources import fingerprint
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.loading import load_model
from flexolmo_jax.federation.merge import write_tuned
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.parallel import placement
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.run import alone_in_its_run, check_run, describe_run, record_run
from flexolmo_jax.training.stages.expert import check_length, check_room_for
from flexolmo_jax.training.step import RouterLoss, RouterRows


@alone_in_its_run
def train_router(
    config: RouterTraining, *, model: Path, data: str, out: Path, run: Path, resume: bool = False
) -> None:
    """Tunes router rows and writes a merged model that has them.

    Args:
      config: the stage's config.
      model: a merged model.
      data: the proxies of all owners and public text, as `read_documents` takes it (a folder).
      out: the tuned merged model; must not exist.
      run: folder of the run.
      resume: go on from the newest checkpoint in `run`.

    Raises:
      ValueError, FloatingPointError, Interrupted, AlreadyDone: as the parts say.
    """
    mesh = mesh_of(config)
    if not read_manifest(model, kind="merged")["experts"]:
        raise ValueError(
            f"{model}: has no expert beside the public one, so there is nothing to route and no "
            "router to tune; add one with `flexolmo experts add`"
        )
    loaded = load_model(model, mesh=mesh)
    if loaded.tokenizer is None:
        raise ValueError(f"{model}: there is no tokenizer.json with its anchor")
    check_length(config.data, loaded.config, model)
    rows = RouterRows.of(placement.to_host(loaded.experts.router))
    made_from = {
        "source": fingerprint(data),
        "source_at": data,
        "model": read_manifest(model)["digest"],
    }
    wanted = describe_run(config, **made_from)
    check_run(run, wanted, resume, config, out)
    check_room_for(config, data, out, run, rows)
    source, report = prepare(data, config.data, loaded.tokenizer, run / "data")
    report.tell()
    record_run(run, wanted)
    active = config.active_experts or loaded.config.active_experts
    model_config = config.computing(loaded.config).replace(active_experts=active)
    loss = RouterLoss(model_config, config.output_z_loss, config.router_z_loss)
    steps = StandardSteps("router", config, loss, source)
    rows = train(steps, rows, (loaded.backbone, loaded.experts), run)
    # Without the empty experts.
    rows = RouterRows(rows.row[:, : len(loaded.names)], rows.bias[:, : len(loaded.names) - 1])
    tuned = jax.device_get(rows.router(loaded.experts.router))
    on_main_process(lambda: write_tuned(out, model, tuned))
