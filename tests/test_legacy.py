"""Files of the code before the rename (tests/fixtures/legacy) are read: by the command line, and from Python.

Names of flags and metrics in them are the old ones (core/config.RENAMED). README.md there says what made each file.
"""

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fbpc_ray import api
from fbpc_ray.commands import main
from fbpc_ray.core.config import read_config
from fbpc_ray.core.presets import preset
from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset_reader, datasets

FIXTURES = Path(__file__).parent / "fixtures" / "legacy"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
HERE = {
    "torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    "machine": platform.machine(),
}  # fmt: skip
SERIAL = ("--backend", "serial", "--device", "cpu", "--compiled", "off", "--compiled-chains", "off")


@pytest.fixture
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; the current folder, since the paths in the files are relative to it. Nothing is tracked."""
    folder = tmp_path / "legacy"
    shutil.copytree(FIXTURES, folder)
    for path in folder.rglob("config.json"):
        path.write_text(path.read_text().replace('"tracking": true', '"tracking": false'))
    monkeypatch.chdir(folder)
    return folder


def digest(folder: Path) -> str:
    images = safetensors.torch.load_file(folder / "checkpoint" / "state.safetensors")["images"]
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def test_a_configuration_has_todays_names(legacy):
    config = read_config(place("interrupted-pool"))
    assert (config.evaluation.chain_epochs, config.evaluation.num_chains) == (20, 2)
    assert config.workers.trajectory_cache_gb == 0
    d = config.distillation
    assert (d.map_init, d.warm_pool_size, d.warm_pool_uses) == ("warm", 1, 3)
    assert read_config(place("run")).distillation.map_init == "prior"
    assert preset("preset.json").evaluation.chain_epochs == preset("sweep/best.json").evaluation.chain_epochs == 20


def test_a_finished_run_is_reported_and_evaluated_again(legacy, capsys):
    before = json.loads(Path("run/evaluations/001-test-convnet-ln.json").read_text())["coresets"]
    main.main(["evaluate", "run", "--architectures", "convnet-ln", *SERIAL, "--json", "scores.json"])
    after = json.loads(Path("scores.json").read_text())["coresets"]
    for coreset, by_network in after.items():
        scores, earlier = by_network["convnet-ln"], before[coreset]["convnet-ln"]
        assert scores["nll"] == pytest.approx(earlier["nll"], rel=1e-3)
        assert scores["mean_sample_nll"] == pytest.approx(earlier["nll_of_samples"], rel=1e-3)
        assert scores["batch_nll"] == pytest.approx(earlier["nll_of_batches"], rel=1e-3)
    main.main(["report", "run"])
    page = Path("report.html").read_text()
    assert "001-test-convnet-ln" in page, "the old evaluation"
    assert "002-test-convnet-ln" in page, "today's"
    capsys.readouterr()
    main.main(["distill", "--out", "run", "--resume", "--json", "result.json"])
    assert "complete" in capsys.readouterr().out
    scores = json.loads(Path("result.json").read_text())["coresets"]["fbpc"]["convnet-in"]
    assert {"batch_nll", "mean_sample_nll"} < scores.keys()


@pytest.mark.parametrize(("run", "word"), [("interrupted", "--resume"), ("interrupted-pool", "--again")])
def test_an_interrupted_run_resumes_to_the_same_bits(run, word, legacy):
    assert digest(legacy / run) == EXPECTED["images_sha256"][f"{run}, step 2"]
    main.main(["distill", "--out", run, word, *SERIAL])
    assert json.loads(Path(run, "result.json").read_text())["steps"] == 4
    if {name: EXPECTED[name] for name in HERE} == HERE:
        assert digest(legacy / run) == EXPECTED["images_sha256"][f"{run}, resumed to step 4"]


def test_a_run_starts_from_a_preset_file(legacy, capsys):
    """With the experts that are there: none is trained. Its coreset is that of `run`, which the same file made."""
    words = ["--preset", "preset.json", "--experts", "experts", "--out", "again", "--x-cache", "0", "--threads", "1"]
    main.main(["distill", *words, *SERIAL, "--no-tracking"])
    assert "--x-cache is now --trajectory-cache-gb" in capsys.readouterr().err
    images, earlier = (api.load_coreset(f"{run}/coreset/coreset.safetensors").images for run in ("again", "run"))
    assert (images - earlier).abs().max() < 0.5, "the same start and nearly the same steps, whatever the machine"
    if {name: EXPECTED[name] for name in HERE} == HERE:
        assert torch.equal(images, earlier)
    main.main(["distill", "--preset", "sweep/best.json", "--print-config"])
    assert '"chain_epochs": 20' in capsys.readouterr().out


def test_a_sweep_is_complete_and_can_go_on(legacy, capsys):
    words = ["tune", "--out", "sweep", "--resume"]
    main.main(words)
    assert "this sweep is complete" in capsys.readouterr().out
    rows = Path("sweep", "trials.md").read_text().strip().splitlines()[2:]
    Path("sweep", "trials.md").unlink()
    main.main(words)
    assert rows and set(rows) <= set(capsys.readouterr().out.splitlines()), "those of result.json"
    main.main(["report", "sweep/trials/00000", "--out", "trial.html"])
    for name in ("result.json", "best.json", "trials/00001/ended.json"):
        Path("sweep", name).unlink()
    main.main([*words, "--print-config"])
    assert '"val_every": 1' in capsys.readouterr().out, "evaluate_every of sweep.json"
    main.main([*words, "--dry-run"])
    assert "trial 1: alpha 100000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main([*words, "--dry-run", "--val-chain-epochs", "10"])
    assert "the sweep's flags differ from the stored ones" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main([*words, "--dry-run", "--val-every", "2"])
    assert "--val-every was 1, now 2" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_goes_on_from_its_files(legacy, capsys):
    """The trial that was stopped is left as it is; the best one is judged on the test split again."""
    for name in ("result.json", "best.json"):
        Path("sweep", name).unlink()
    before = Path("sweep/trials/00000/checkpoint/state.safetensors").read_bytes()
    main.main(["tune", "--out", "sweep", "--resume"])
    result = json.loads(Path("sweep/result.json").read_text())
    assert result["best"]["trial"] == 0
    assert result["trials"] == {"finished": 1, "stopped": 1}
    assert before == Path("sweep/trials/00000/checkpoint/state.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["safetensors.safetensors", "npz.npz", "pt/images_best.pt", "hf", "png"])
def test_an_export_holds_the_coreset(name, legacy):
    """All but png hold the very images; png their pixels, rounded to 8 bits and cut to 0..1."""
    digits = datasets.load("digits")
    export = coreset_reader.load(Path("exports", name), digits).coreset
    run = api.load_coreset("run/coreset/coreset.safetensors")
    assert torch.equal(export.labels, run.labels)
    if name != "png":
        assert torch.equal(export.images, run.images)
        return
    pixels, earlier = ((source.images * digits.std[0] + digits.mean[0]).clamp(0, 1) for source in (export, run))
    assert (pixels - earlier).abs().max() < 0.51 / 255


def test_an_export_is_evaluated_by_the_command_line(legacy):
    main.main(["evaluate", "--coreset", "exports/hf", "--data", "digits", "--width", "4", "--eval-seeds", "1",
               "--chain-steps", "20", "--chain-every", "10", *SERIAL, "--json", "scores.json"])  # fmt: skip
    assert "convnet-in" in json.dumps(json.loads(Path("scores.json").read_text())["coresets"])


def test_posterior_samples_predict_what_they_did(legacy):
    test = api.dataset("digits", log=lambda line: None).test
    outcome = api.load_posterior("posterior.safetensors", device="cpu").predict(test.images[:3]).probabilities
    expected = EXPECTED["posterior_probabilities_of_the_first_3_test_images"]
    np.testing.assert_allclose(np.asarray(outcome), np.asarray(expected), atol=1e-5)
