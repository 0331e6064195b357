"""What is said of experts as they are trained: how much they learned, how long it takes, and where they can't learn."""

import re
from pathlib import Path

import pytest
import torch

from fbpc_ray.core.presets import preset, with_method
from fbpc_ray.core.signals import Interruption
from fbpc_ray.data.datasets import normalise
from fbpc_ray.distillation import expert_training
from fbpc_ray.distillation.expert_training import short_training_note, train_missing_experts
from fbpc_ray.evaluation.evaluate import describe_evaluation
from fbpc_ray.execution import session
from fbpc_ray.execution.serial import Serial
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import count_macs
from fbpc_ray.tracking.run_contents import run_params


def trained(config, digits) -> tuple[list[str], list]:
    """What was said, and the stores."""
    specs, lines = session.network_specs(config, digits), []
    stores = [session.expert_store(config, digits, spec) for spec in specs]
    count = config.experts.expert_count
    train_missing_experts(stores, specs, count, digits, Serial("cpu", Interruption()), lines.append)
    return lines, stores


def test_a_line_gives_the_accuracy_of_an_expert(small, digits, tmp_path):
    """BatchNorm's own statistics and all, on 1,000 of 1,437 training images, evenly spread; 2 networks, 2 each."""
    lines, stores = trained(small.updated(experts=str(tmp_path), expert_epochs=6, expert_batch_size=32), digits)
    assert lines[0] == "experts: 0 of 4 trajectories are there, training 4"
    assert len(lines) == 3
    index = torch.linspace(0, 1436, 1000).long().numpy()
    images = normalise(torch.tensor(digits.train.images[index]), digits.mean, digits.std)
    for line, store, spec in zip(lines[1:], stores, session.network_specs(small, digits), strict=True):
        network = Network(spec)
        shares = []
        for number in (0, 1):
            module = network.module(torch.Generator().manual_seed(0)).eval()
            module.load_state_dict(store.read(number, 6))
            with torch.no_grad():
                right = module(images).argmax(1).numpy() == digits.train.labels[index]
            shares.append(right.mean())
        share = 100 * sum(shares) / 2
        assert share > 60  # they did learn
        match = re.fullmatch(rf"experts of {spec.architecture}: (\d+) % of training images right .*", line)
        assert match, line
        assert int(match[1]) == pytest.approx(share, abs=0.51)
    again, _ = trained(small.updated(experts=str(tmp_path), expert_epochs=6, expert_batch_size=32), digits)
    assert again == ["experts: 4 of 4 trajectories are there"]


def test_what_another_run_trained_meanwhile_is_not_trained_again(small, digits, tmp_path):
    """Both found nothing; one of them is through before the other begins, and has the files open."""
    own = small.updated(experts=str(tmp_path), architectures=("convnet-in",), expert_epochs=1, start_epoch=0)
    specs = session.network_specs(own, digits)
    stores, trainings = [session.expert_store(own, digits, spec) for spec in specs], []

    def files() -> dict:
        paths = Path(str(stores[0].folder)).iterdir()
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    class Overtaken(Serial):
        def map(self, function, shared, items):
            trained(own, digits)
            trainings.append(files())
            return super().map(function, shared, items)

    lines = []
    train_missing_experts(stores, specs, 2, digits, Overtaken("cpu", Interruption()), lines.append)
    assert lines[0] == "experts: 0 of 2 trajectories are there, training 2"
    assert re.fullmatch(r"experts of convnet-in: \d+ % of training images right .*", lines[-1])
    assert len(trainings[0]) == 5
    assert files() == trainings[0]


class OnACluster(Serial):
    """Says that its tasks run on other machines."""

    uses_other_machines = True


@pytest.mark.parametrize("kind, noted", [(Serial, False), (OnACluster, True)])
def test_a_local_folder_of_experts_is_noted_where_other_machines_train_them(kind, noted, small, digits, tmp_path):
    """An expert that a node wrote on its own disk is missing on the others."""
    lines: list[str] = []
    own = small.updated(experts=str(tmp_path), architectures=("convnet-in",), expert_epochs=1, start_epoch=0)
    session.open_session(own, lines.append, digits).train_experts(kind("cpu", Interruption()), lines.append)
    note = f"note: all nodes must see {tmp_path}; where they don't share it (NFS), give --experts s3://BUCKET/PREFIX"
    assert [line for line in lines if "all nodes" in line] == [note] * noted


def test_experts_that_cannot_learn_are_noted_once(small, digits, tmp_path):
    """1,437 images in batches of 256 are 6 steps per epoch: 12 in two epochs, and 102 in 17."""
    lines, stores = trained(small.updated(experts=str(tmp_path), expert_epochs=2, expert_batch_size=256), digits)
    notes = [line for line in lines if "too few to learn" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: each expert gets only 12 SGD steps (1437 images in batches of 256, 2 epochs)")
    assert notes[0].endswith(" too few to learn: try --expert-batch-size 32, or more --expert-epochs")
    recipe = stores[0].recipe
    for changes, advice in (
        ({"lr": 0.01}, "try --expert-batch-size 32 --expert-lr 0.05, or more --expert-epochs"),
        ({"lr": 0.01, "batch_size": 32, "epochs": 1}, "try --expert-lr 0.05, or more --expert-epochs"),
        ({"batch_size": 32, "epochs": 1}, "try more --expert-epochs"),
    ):  # fmt: skip
        assert short_training_note(recipe._replace(**changes), 1437).endswith(f" too few to learn: {advice}")
    assert short_training_note(recipe._replace(epochs=16), 1437)
    assert not short_training_note(recipe._replace(epochs=17), 1437)


def test_a_line_estimates_the_hours_on_a_cpu_before_they_pass(small, digits, tmp_path, monkeypatch):
    """A forward pass costs two operations for each of `count_macs`, a backward pass twice that; 3 epochs of 2
    experts of 2 networks at a rate at which they take 2.4 hours."""
    config = small.updated(experts=str(tmp_path), expert_epochs=3)
    each = [6 * count_macs(Network(spec)) * 1437 * 3 * 2 for spec in session.network_specs(config, digits)]
    monkeypatch.setattr(expert_training, "CPU_FLOPS", sum(each) / (2.4 * 3600))
    assert "training 4, which takes something like 2 hours of a CPU core" in trained(config, digits)[0][0]


def test_what_methods_bring_is_logged_for_both_that_are_compared():
    """FBPC starts at an epoch of Table 4, BPC-fKL before one of its own: MLflow shows both values of both."""
    fbpc = preset("cifar10-ipc10")
    fkl = with_method(fbpc, "bpc-fkl", 10)
    one, other = run_params(fbpc), run_params(fkl)
    assert (one["start_epoch"], one["start_rule"]) == (2, "from")
    assert (other["start_epoch"], other["start_rule"], other["syn_steps"]) == (20, "before", 30)
    assert {name for name in other if name not in one} == {"inner_lr", "syn_steps"}
    assert len(one) < 15  # MLflow writes them above the images of a run


def test_a_line_counts_the_chains_of_an_evaluation():
    settings = preset("digits").updated(num_chains=3, chain_epochs=1000).evaluation
    lines = describe_evaluation({"random": 0, "fbpc": 1}, ["a"], "test", settings)
    assert lines == "evaluating on the test split: 6 chains (2 coresets x 1 network x 3 seeds) of 1,000 epochs"
