"""Where it runs: jobs that are submitted, stopped and submitted again; the files for `ray up` and KubeRay."""

import re
import shlex
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.runs import distil, flags, images_of, refused

from fbpc_ray.commands.parsing import distill_arguments
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution import validation

ROOT = Path(__file__).parents[2]


def test_again_goes_on_where_nothing_but_the_configuration_is(finished_run, small, tmp_path):
    """Killed before its first checkpoint; and while the configuration was written, of which a kill leaves a part."""
    folder = tmp_path / "early"
    words = flags(small, backend="serial", steps=12, num_chains=1, chain_epochs=2, chain_every=1, out=str(folder))
    RunDirectory(folder).folder.mkdir()
    (folder / ".config.json.0a1b2c3d.tmp").write_text("{")
    distil(*words, "--resume", "auto")
    assert torch.equal(images_of(folder), images_of(finished_run))
    for path in (RunDirectory(folder).state_path, RunDirectory(folder).metrics_path, RunDirectory(folder).result_path):
        path.unlink()
    distil(*words, "--resume", "auto")
    assert torch.equal(images_of(folder), images_of(finished_run))


def test_again_is_refused_without_a_folder_or_with_another_configuration(finished_run, small, capsys):
    assert "--out DIR" in refused(capsys, "--resume", "auto", "--backend", "serial")
    words = flags(small, backend="serial", steps=12, out=str(finished_run), alpha=3.0)
    assert "--alpha was 10.0, now 3.0" in refused(capsys, *words, "--resume", "auto")


def test_again_goes_on_with_a_preset_too(small, tmp_path, capsys):
    """What the preset and the flags say is compared with what the run began with."""
    folder = tmp_path / "preset"
    changed = flags(small, backend="serial", steps=2, out=str(folder))
    distil("--preset", "digits", *changed, "--resume", "auto")
    distil("--preset", "digits", *changed, "--resume", "auto")
    assert "this run is complete" in capsys.readouterr().out
    assert "--data was" in refused(capsys, "--preset", "cifar10-ipc1", "--resume", "auto", "--out", str(folder))


# ---- the files for `ray up` and KubeRay


def described(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return version


def test_cluster_yaml_is_what_ray_up_takes():
    """By Ray's own schema and preparation, which know the fields; not by a cloud. They are private: ray is pinned."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    assert version("ray") == pinned("ray")
    cluster = prepare_config(described("cluster.yaml"))
    validate_config(cluster)
    kinds = cluster["available_node_types"]
    head, gpu = kinds[cluster["head_node_type"]], kinds["gpu"]
    assert head["resources"] == {"CPU": 0}
    assert gpu["resources"]["GPU"] == 1
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= cluster["max_workers"]
    with pytest.raises(Exception, match="Additional properties"):
        validate_config({**cluster, "available_node_types": {**kinds, "gpu": {**gpu, "gpus": 1}}})


def test_every_node_has_the_pinned_ray_and_one_python():
    """In cluster.yaml, rayjob.yaml and the Dockerfile; Python is that on which the constraints were resolved."""
    cluster, job = described("cluster.yaml"), described("rayjob.yaml")["spec"]["rayClusterSpec"]
    (base,) = re.findall(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    for image, device in (
        (cluster["docker"]["head_image"], "cpu"),
        (cluster["docker"]["worker_image"], "gpu"),
        (base, "gpu"),
    ):
        assert image == f"rayproject/ray:{pinned('ray')}-py311-{device}"
    assert job["rayVersion"] == pinned("ray")
    for spec in (job["headGroupSpec"], *job["workerGroupSpecs"]):
        (container,) = spec["template"]["spec"]["containers"]
        assert container["image"].endswith(f"/fbpc-ray:{pinned('ray')}")
    assert any("--constraint constraints.txt" in line for line in cluster["setup_commands"])
    assert "--constraint constraints.txt" in (ROOT / "Dockerfile").read_text()


def test_every_node_asks_for_the_token_and_the_dashboard_stays_on_the_head():
    cluster = described("cluster.yaml")
    mounts = cluster["file_mounts"]
    assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert command.startswith("export RAY_AUTH_MODE=token;")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert described("rayjob.yaml")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_what_rayignore_leaves_out_is_not_copied_to_the_nodes_either():
    ignored = {line.strip("/") for line in (ROOT / ".rayignore").read_text().splitlines() if line[:1] not in ("", "#")}
    patterns = {line.strip("/") for line in described("cluster.yaml")["rsync_exclude"]}
    assert patterns <= ignored
    assert {".git", ".venv", "experts", "data", "outputs", "mlflow.db*"} <= patterns


def test_every_file_of_the_package_is_copied_to_the_nodes():
    """A pattern of rsync without a slash in front leaves out every folder of that name, such as fbpc_ray/data."""
    patterns = described("cluster.yaml")["rsync_exclude"]
    at_any_depth = [pattern.strip("/") for pattern in patterns if not pattern.startswith("/")]
    modules = [path.relative_to(ROOT) for path in (ROOT / "fbpc_ray").rglob("*.py")]
    assert Path("fbpc_ray/data/datasets.py") in modules
    for pattern in at_any_depth:
        assert [path for path in modules if any(fnmatch(part, pattern) for part in path.parts)] == []


RAYJOB = {
    "entrypoint": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
    "runtimeEnvYAML": str, "rayClusterSpec": dict,
}  # fmt: skip
"""Of RayJobSpec in KubeRay's reference of ray.io/v1, those that we use."""


def test_rayjob_yaml_has_the_form_of_a_rayjob():
    """By its structure alone: there is no KubeRay here."""
    job = described("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert {name: type(value) for name, value in job["spec"].items()} == RAYJOB
    assert job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    (gpu,) = cluster["workerGroupSpecs"]
    assert gpu["minReplicas"] == gpu["replicas"] == 0 < gpu["maxReplicas"]
    (container,) = gpu["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["enableInTreeAutoscaling"] is True
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


def commands_of_readme() -> list[list[str]]:
    """The words after `--` of each `ray job submit` in docs/cluster.md."""
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("ray job submit")]
    return [line[line.index("--") + 1 :] for line in lines]


def test_the_commands_of_the_jobs_are_ours(tmp_path):
    """Those of rayjob.yaml and docs/cluster.md parse by our own command line, and can be repeated."""
    entrypoint = shlex.split(described("rayjob.yaml")["spec"]["entrypoint"])
    submitted = commands_of_readme()
    assert len(submitted) >= 2
    for program, script, *words in (entrypoint, *submitted):
        assert program == "python"
        assert (ROOT / "jobs" / Path(script).name).is_file()
        words = [word.replace("s3://BUCKET", str(tmp_path)) for word in words]
        arguments = distill_arguments(words)
        validation.check(validation.canonical(arguments.config))
        if "--autoscale" in words:
            assert arguments.job.resume == "auto"
            assert (arguments.config.workers.autoscale, arguments.config.workers.device) == (True, "cuda")
            assert arguments.config.output.out
            assert arguments.config.experts.experts
