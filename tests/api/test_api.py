"""From Python: the bits of the command line, what is logged and drawn, and files of samples."""

import base64
import io
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from support.runs import BRIEF_CHAIN, silent

from fbpc_ray import api
from fbpc_ray.commands.parsing import distill_arguments
from fbpc_ray.core.config import Data, Output
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import coreset
from fbpc_ray.execution.serial import Serial


def settings_of(config, **changes) -> dict[str, Any]:
    """The configuration as the API takes it."""
    flat = config.updated(backend="serial", **changes).flat()
    away = {field.name for group in (Data, Output) for field in fields(group)}
    return {name: value for name, value in flat.items() if name not in away}


def test_a_coreset_is_the_command_lines_to_the_bit(run, pseudocoreset, small, digits):
    """And so it is from a Dataset, and from arrays that hold the same; `random` is the run's random coreset."""
    steps: list[int] = []
    same = settings_of(small, steps=2)
    result = api.distill("digits", **same, log=silent, on_step=lambda values, step: steps.append(step))
    assert steps == [1, 2]
    assert torch.equal(result.images, pseudocoreset.images)
    assert torch.equal(result.labels, pseudocoreset.labels)
    assert result[2:6] == pseudocoreset[2:6]
    assert result.facts == {name: text for name, text in pseudocoreset.facts.items() if name != "commit"}
    mine = api.dataset(digits.train, digits.test, classes=digits.classes, name="digits")
    assert mine.fingerprint == digits.fingerprint
    assert torch.equal(api.distill(mine, **same, log=silent).images, pseudocoreset.images)
    start = api.distill("digits", method="random", seed=small.distillation.seed)
    assert torch.equal(start.images, coreset.load(run.random_path).images)
    assert not torch.equal(start.images, pseudocoreset.images)


def test_the_settings_are_those_of_the_command_line_where_none_are_given(monkeypatch):
    """A data set with a row in Table 4, the small preset, and a baseline with its own paper's settings."""
    seen = []
    monkeypatch.setattr(api.validation, "check", lambda config: seen.append(config) or _stop())
    digits = api.dataset("digits")
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--data", "digits"], {}),
        (["--preset", "digits"], {"preset": "digits"}),
        (["--preset", "digits", "--method", "bpc-rkl", "--steps", "7"],
         {"preset": "digits", "method": "bpc-rkl", "steps": 7}),
    ]  # fmt: skip
    for words, call in cases:
        config = distill_arguments(words).config
        with pytest.raises(_Stopped):
            api.distill(digits, backend=config.workers.backend, **call)
        assert seen.pop() == config.updated(architectures=api.validation.canonical(config).networks.architectures)


def test_the_backend_is_that_which_is_asked_for(pseudocoreset, small, monkeypatch):
    """By `open_backend`, as in every command, with the backend and the address of the call; that Ray's backend gives
    the bits of the serial one is shown in tests/execution/test_ray_backend.py."""
    opened = []

    @contextmanager
    def backend(config, interruption, log):
        opened.append((config.workers.backend, config.workers.address))
        yield Serial("cpu", interruption)

    monkeypatch.setattr(api, "open_backend", backend)
    result = api.distill("digits", **{**settings_of(small, steps=2), "backend": "ray", "address": "local"}, log=silent)
    assert opened == [("ray", "local")]
    assert torch.equal(result.images, pseudocoreset.images)


class _Stopped(Exception): ...


def _stop() -> None:
    raise _Stopped


def test_predictions_score_as_evaluate_scores_them(run, samples, digits):
    """Each number of result.json for that chain; a prediction is the same for bytes and for floats in 0..1."""
    expected = json.loads(run.result_path.read_text())["coresets"]["fbpc"]["convnet-bn"]
    result = samples.predict(torch.tensor(digits.test.images))
    for name, value in result.scores(torch.tensor(digits.test.labels))._asdict().items():
        assert value == pytest.approx(expected[name][1], abs=1e-12), name
    assert result.probabilities.sum(1).numpy() == pytest.approx(1)
    assert (result.labels.numpy() == digits.test.labels).mean() == expected["accuracy"][1]
    as_floats = samples.predict(torch.tensor(digits.test.images[:9]) / 255)
    torch.testing.assert_close(as_floats.probabilities, result.probabilities[:9])
    assert repr(result).startswith("<prediction of 360 images, 10 classes: mean entropy ")
    one = samples.predict(digits.test.images[3])
    assert repr(one).startswith("<prediction of 1 image, ")
    torch.testing.assert_close(one.entropy, result.entropy[3:4], rtol=1e-4, atol=1e-6)


def test_more_chains_are_more_samples_of_one_average(pseudocoreset, samples, digits):
    """Chains 1 and 2: the mean of both chains' probabilities, and what they disagree about is more than within one."""
    both = api.posterior(pseudocoreset, "convnet-bn", seed=1, num_chains=2, **BRIEF_CHAIN)
    other = api.posterior(pseudocoreset, "convnet-bn", seed=2, **BRIEF_CHAIN)
    images = digits.test.images[:50]
    one, two, all_ = (ensemble.predict(images) for ensemble in (samples, other, both))
    torch.testing.assert_close(all_.probabilities, (one.probabilities + two.probabilities) / 2)
    assert (all_.entropy >= (one.entropy + two.entropy) / 2 - 1e-9).all()
    assert all_.mutual_information.mean() > (one.mutual_information.mean() + two.mutual_information.mean()) / 2
    assert repr(both) == "<4 posterior samples of convnet-bn, 10 classes>"
    earlier: Any = {"chains": 2}  # the argument's earlier name
    assert torch.equal(
        api.posterior(pseudocoreset, "convnet-bn", seed=1, **earlier, **BRIEF_CHAIN).predict(images).entropy,
        all_.entropy,
    )


def test_what_is_not_given_is_as_the_coreset_was_distilled(pseudocoreset, samples, digits):
    """Network, width and length of the chains, of the metadata; what is given wins."""
    result = api.posterior(pseudocoreset)
    assert (result.spec.architecture, result.spec.width, result.spec.depth) == ("convnet-in", 8, 2)
    assert len(result.samples) == 2  # 20 epochs, one every 10
    same, images = api.posterior(pseudocoreset, "convnet-bn", seed=1), digits.test.images[:20]
    assert torch.equal(same.predict(images).probabilities, samples.predict(images).probabilities)
    assert api.posterior(pseudocoreset, "convnet-ln", width=4, chain_every=20).spec[:1] == ("convnet-ln",)
    with pytest.raises(UserError, match=r"^preset: file mine\.json not found"):
        api.posterior(pseudocoreset, preset="mine.json")
    bare = pseudocoreset._replace(facts={})
    assert api.posterior(bare, chain_epochs=1, chain_every=1).spec.width == 128
    hostile = pseudocoreset._replace(facts={"settings": json.dumps({"architectures": ["os:system"], "width": 8})})
    with pytest.raises(UserError, match="distilled on os:system, but a file alone imports no code"):
        api.posterior(hostile)
    assert api.posterior(hostile, "convnet", chain_epochs=1, chain_every=1).spec.width == 8


def test_an_evaluation_takes_the_networks_of_the_coreset(run, pseudocoreset, digits):
    """And so gives the scores of the run, to the bit."""
    expected = json.loads(run.result_path.read_text())["coresets"]["fbpc"]
    assert api.evaluate(pseudocoreset, digits, num_chains=2, log=silent) == expected


def test_coresets_and_predictions_draw_themselves(pseudocoreset, samples, digits):
    """As pictures; in a notebook the coreset's is beside its description."""
    picture = pseudocoreset.plot("ten digits")
    assert picture.size[0] > 300 and pseudocoreset.plot().size[1] < picture.size[1]
    page = pseudocoreset._repr_html_()
    assert "Coreset of 10 images of 1 x 8 x 8" in page
    png = base64.b64decode(page.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(png)).size == pseudocoreset.plot().size
    prediction = samples.predict(digits.test.images[:50])
    assert prediction.plot().size != prediction.plot(digits.test.labels[:50]).size
    with pytest.raises(UserError, match=r"got \d labels for"):
        prediction.plot(digits.test.labels[:3])
    two = pseudocoreset._replace(
        images=pseudocoreset.images.repeat(1, 2, 1, 1), mean=pseudocoreset.mean * 2, std=pseudocoreset.std * 2
    )
    with pytest.raises(UserError, match="images of 2 channels cannot be drawn"):
        two.plot()
    assert "<img" not in two._repr_html_() and "Coreset of 10" in two._repr_html_()


def test_samples_and_coresets_are_read_back_to_the_bit(pseudocoreset, samples, digits, tmp_path):
    api.save(samples, tmp_path / "samples.safetensors")
    api.save(pseudocoreset, tmp_path / "coreset.safetensors")
    back = api.load_posterior(tmp_path / "samples.safetensors")
    images = digits.test.images[:20]
    assert torch.equal(back.predict(images).probabilities, samples.predict(images).probabilities)
    assert (back.spec, back.mean, back.std, back.classes) == (samples.spec, samples.mean, samples.std, samples.classes)
    assert torch.equal(api.load_coreset(str(tmp_path / "coreset.safetensors")).images, pseudocoreset.images)


def test_a_damaged_file_of_samples_is_one_line(pseudocoreset, samples, tmp_path):
    path = tmp_path / "samples.safetensors"
    api.save(samples, path)
    file_content = path.read_bytes()
    for content in (
        b"",
        file_content[: len(file_content) // 2],
        b"hello",
        safetensors.torch.save({"a": torch.zeros(1)}),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no posterior samples") as caught:
            api.load_posterior(path)
        assert "\n" not in str(caught.value)
    for other in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError):
            api.load_posterior(other)


def test_the_log_names_arguments(digits, tmp_path, monkeypatch):
    """The table of sizes, notes, and warnings: no flag is left, and the columns of the table stand below each other."""
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    few = (digits.train.images[:60], digits.train.labels[:60])
    sizes: dict[str, Any] = {"width": 8, "steps": 1, "expert_count": 1, "expert_epochs": 1, "start_epoch": 1}
    own = api.distill(few, **sizes, log=lines.append)
    api.evaluate(own, digits, num_chains=1, chain_epochs=20, chain_every=5, log=lines.append)
    text = "\n".join(lines)
    assert "--" not in text and "flag" not in text
    assert "(preset='laptop')" in text
    assert "other sizes: preset='quick' | 'laptop' | 'gpu' | 'paper', or time_budget='20m'" in text
    table = text[text.index("setting  ") :].splitlines()
    value = table[0].index("value")
    rows = table[1 : next(number for number, line in enumerate(table) if line.startswith("as the paper: "))]
    assert {row.split()[0] for row in rows} > {"alpha", "expert_lr"}
    assert all(row[value - 1] == " " and row[value].isdigit() for row in rows)
    assert "too few to learn: try more expert_epochs" in text
    assert "longer chains (chain_epochs)" in text


PROGRESS = """
import sys, types
sys.modules["ipykernel"] = types.ModuleType("ipykernel")  # that a kernel runs here is all that is asked
from fbpc_ray import api
api.posterior(api.distill("digits", method="random"), width=8, chain_epochs=2, chain_every=1)
print(*{"ray", "mlflow", "matplotlib"} & set(sys.modules))
"""


def test_there_is_progress_in_a_notebook():
    """Neither Ray nor MLflow nor matplotlib is imported for it. (test_examples.py: a log has no progress in it.)"""
    process = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "\n"
    assert "sample:   0%" in process.stderr
