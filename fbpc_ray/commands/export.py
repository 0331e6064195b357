"""`fbpc export RUN`: the coreset of a run in a common format."""

from fbpc_ray.core.config import read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import log
from fbpc_ray.core.provenance import home, without_folders
from fbpc_ray.core.storage import Place, local_folder
from fbpc_ray.data import coreset, coreset_formats
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.evaluation import results
from fbpc_ray.reporting import dataset_card


def export(folder: Place, kind: str, out: str) -> None:
    """Write the coreset of the run in `folder` to `out`, a new path, in format `kind`; print the path."""
    run, settings = RunDirectory(folder), read_config(folder)
    pseudocoreset = run.read_coreset(settings)
    data = without_folders(settings.data.data)
    metadata = coreset.metadata(run.coreset_path)
    names = "method", "step", "commit", "fingerprint", "settings"
    facts = {name: metadata[name] for name in names if name in metadata} | {"data": data}
    try:
        result = run.read_result()
    except UserError:  # an export goes without a result
        result = None
    if result and not results.is_of_step(result, facts.get("step")):
        result = None
    default = run.folder.name if kind in coreset_formats.SINGLE else f"{run.folder.name}-{kind}"
    target = coreset_formats.with_kind_suffix(local_folder(out, "--out") if out else home() / "exports" / default, kind)
    card = dataset_card.card(pseudocoreset, kind, settings, facts, result)
    outputs = coreset_formats.files(pseudocoreset, kind, facts, card)
    if kind == "hf":
        outputs |= dataset_card.companions(pseudocoreset, settings, facts, result)
    coreset_formats.write(outputs, target)
    log(f"export: {target}")
    if kind == "png":
        log(
            "note: png is for the eye: it rounds to 8 bits per channel, as `fbpc evaluate --coreset` then reads it; "
            "hf, safetensors, pt and npz are exact"
        )
        if pseudocoreset.soft_labels is not None:
            log("note: png leaves the learned soft labels out; the other formats have them")
