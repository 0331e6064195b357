"""`fbpc experts`: train the expert trajectories that are missing."""

from dataclasses import fields

from fbpc_ray.commands import planning
from fbpc_ray.core import files
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log, resume_hint
from fbpc_ray.core.settings import Experts, Networks
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.sizes import SizeRequest
from fbpc_ray.execution import validation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.session import uses_experts
from fbpc_ray.execution.sizing import open_sized_session

SHOWN = {field.name for group in (Networks, Experts) for field in fields(group)}
"""Settings of the experts."""


def only_of_experts(config: Config) -> Config:
    """Return `config` with the defaults of all settings that experts don't use, which a preset may have."""
    d = config.distillation
    own = Config(data=config.data, networks=config.networks, experts=config.experts, workers=config.workers)
    return own.updated(method=d.method, ipc=d.ipc)


def experts(config: Config, sizes: SizeRequest | None, *, dry_run: bool, json: str) -> None:
    """Train the expert trajectories that are missing, whichever of their epochs a distillation will take."""
    if sizes is None:
        config = only_of_experts(config)
    config = validation.canonical(config)
    if not uses_experts(config):
        method = config.distillation.method
        raise UserError(f"--preset: its method, {method}, takes no experts; give a preset of another method")
    if sizes is None:
        validation.check(config.updated(start_epoch=0, start_rule="from"))
    start = config.updated(download=False) if dry_run else config
    sized = open_sized_session(start, sizes, log, SHOWN, planned=dry_run, experts_alone=True)
    session, config = sized.session, sized.session.config
    if sizes is not None:
        ipc = config.distillation.ipc
        log(f"note: these are the experts of `fbpc distill --ipc {ipc}`; --ipc sets another number of images per class")
    if dry_run:
        planning.describe(session, parts=("experts",), limit=sized.limit, measured=sized.measured)
        return
    with open_backend(config, Interruption(), log) as workers, resume_hint("the same command goes on"):
        session.train_experts(workers, log)
    folders = {spec.architecture: str(store.folder) for spec, store in zip(session.specs, session.stores, strict=True)}
    for architecture, folder in folders.items():
        log(f"{architecture}: {folder}")
    files.write_output(json, folders)
