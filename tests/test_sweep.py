"""Sweeps: what is drawn, who gets which part of a cluster, which trial is best; and real ones, killed and resumed."""

import json
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import flags
from processes import soon
from test_run import start

from fbpc_ray import cli, config, plan, sweep, tuning
from fbpc_ray.backend import Serial
from fbpc_ray.cluster.placement import Need, Node, need_of, room, share
from fbpc_ray.config import Sweep, preset
from fbpc_ray.errors import UserError
from fbpc_ray.signals import Interruption
from fbpc_ray.sweep import Look, Outcome, Record, Task

SPACE = {"alpha": [1.0, 10.0]}


def drawn(space, samples=1, seed=0):
    from fbpc_ray.cluster.space import variants

    return variants(space, samples, seed)


def test_the_same_seed_draws_the_same_trials_and_another_seed_others():
    from ray import tune

    space = {"alpha": tune.loguniform(1, 100), "batch_size": tune.choice([5, 10]), "gamma": 0.25}
    one = drawn(space, 6, seed=3)
    assert one == drawn(space, 6, seed=3) != drawn(space, 6, seed=4)
    assert all(1 <= each["alpha"] <= 100 and each["gamma"] == 0.25 for each in one)
    assert len({each["alpha"] for each in one}) == 6
    assert json.loads(json.dumps(one)) == one  # plain values, and the file holds what is run


def test_a_grid_is_crossed_with_the_draws_and_functions_see_the_other_values():
    from ray import tune

    from fbpc_ray.cluster.space import gridded

    space = {"lambda_u": lambda own: own["lambda_x"] / 5, "lambda_x": tune.uniform(0.1, 1)}
    found = drawn(gridded(space, sweep.grid_of(["start-epoch=1,5", "augment=dsa,none"])), samples=2)
    assert Counter((each["start_epoch"], each["augment"]) for each in found) == Counter(
        {(1, "dsa"): 2, (1, "none"): 2, (5, "dsa"): 2, (5, "none"): 2}
    )
    assert all(each["lambda_u"] == pytest.approx(each["lambda_x"] / 5, rel=1e-3) for each in found)
    assert list(found[0]) == ["lambda_u", "lambda_x", "start_epoch", "augment"]


@pytest.mark.parametrize("name", [*config.PRESETS, ""])
def test_the_default_space_holds_table_4_and_only_what_a_run_can_use(name, tmp_path):
    from fbpc_ray.cluster.space import default_space

    base = (preset(name) if name else config.Config()).updated(validation=0.1)
    space = default_space(base, 10)
    assert set(space) == {"start_epoch", "gamma", "lambda_x", "lambda_u", "steps", "alpha", "batch_size"}
    for number, own in enumerate(drawn(space, 20)):
        found = sweep.config_of(base, own, Sweep(), tmp_path, number)
        assert {key: found.flat()[key] for key in own} == own


@pytest.mark.parametrize(
    "words, message",
    [
        (["--grid", "alhpa=1,2"], "did you mean alpha"),
        (["--grid", "alpha=1,much"], "'much' is no float"),
        (["--grid", "alpha=1,-3"], "trial 1: --alpha is -3.0: it must be above 0"),
        (["--grid", "start-epoch=99"], "trial 0: .*start-epoch"),
        (["--grid", "data-seed=1,2"], "the same for all trials; give --data-seed"),
        (["--grid", "architectures=convnet"], "is no tuple"),
        (["--space", "no_such_module:SPACE"], "--space no_such_module:SPACE fails .*MODULE:NAME"),
        (["--space", "spaces_of_tests:MISSPELT"], "'alhpa': did you mean alpha"),
        (["--space", "spaces_of_tests:LIST"], "must be a dict"),
        (["--validation", "0"], "never on test data"),
        (["--backend", "serial"], "runs no sweep"),
        (["--samples", "-1"], "--samples is -1"),
        (["--judge-seeds", "0"], "--judge-seeds is 0"),
        (["--resume"], "add --out DIR"),
        (["--preset", "nowhere/best.json"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("spaces_of_tests.py").write_text("MISSPELT = {'alhpa': 1}\nLIST = [1]\n")
    with pytest.raises(SystemExit) as error:
        cli.main(["tune", *words])
    assert error.value.code == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert len(found.splitlines()) == 1
    assert re.search(message, found), found
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["spaces_of_tests.py"]


def test_a_preset_file_is_plain_flags_and_accepted_where_names_are(tmp_path, capsys):
    path = tmp_path / "best.json"
    base = preset("digits").updated(alpha=3.25, steps=7, out="elsewhere", data_root="/mnt", threads=2, validation=0.2)
    path.write_text(config.to_preset(base))
    assert preset(str(path)) == base.updated(out="", data_root="data")
    cli.main(["distill", "--preset", str(path), "--steps", "9", "--dry-run"])
    said = capsys.readouterr().out
    assert '"alpha": 3.25' in said
    assert '"steps": 9' in said
    path.write_text('{"alpha": 3, "alhpa": 4}')
    with pytest.raises(UserError, match=r"best.json: unknown setting 'alhpa': did you mean alpha"):
        preset(str(path))
    path.write_bytes(b"\x80\x04cos\nsystem\n")  # the beginning of a pickle
    with pytest.raises(UserError, match="is not a configuration"):
        preset(str(path))


@pytest.mark.parametrize(
    "nodes, units, trials, gpu, workers, together",
    [
        ([Node(2, 0)], 4, 8, False, 1, 2),  # two cores: two trials, each of one worker that computes all four
        ([Node(1, 0)], 4, 8, False, 1, 1),
        ([Node(64, 0)], 4, 8, False, 4, 8),
        ([Node(16, 0)], 4, 2, False, 4, 2),
        ([Node(16, 0)], 4, 6, False, 2, 6),
        ([Node(16, 4)], 4, 8, True, 1, 4),  # a GPU each, which its four workers share
        ([Node(16, 1)], 4, 8, True, 1, 4),  # a quarter of the only one
        ([Node(8, 2), Node(8, 2)], 2, 2, True, 2, 2),
    ],
)
def test_a_trial_gets_bundles_in_which_its_workers_fit(nodes, units, trials, gpu, workers, together):
    """Room for all trials at once before more than one worker for any; and inside its bundles a trial finds a place."""
    more = {"gpu": gpu, "threads": 1, "cpus_per_actor": 0.0, "gpus_per_actor": 0.0}
    need = need_of(units, nodes, **more)
    found = share(nodes, need, units, trials)
    assert (found, min(trials, room(nodes, need) // found)) == (workers, together)
    bundles = [Node(need.cpus, need.gpus)] * found
    inside = need_of(units, bundles, **more)
    assert room(bundles, inside) >= found


def test_half_a_gpu_is_no_place_for_more_than_a_half():
    assert room([Node(1, 0.5)], Need(0.5, 0.25)) == 2
    assert room([Node(1, 0.5)], Need(1, 0.6)) == 0
    assert room([Node(4, 1.5)], Need(1, 0.5)) == 3
    assert room([Node(4, 1.5)], Need(1, 1)) == 1


def outcome(number, how, *scores):
    looks = [Look(10 * (index + 1), nll, accuracy, 0.1, 0.2, []) for index, (nll, accuracy) in enumerate(scores)]
    return Outcome(number, how, "", Record([0], looks))


def test_the_best_is_the_finished_trial_whose_last_look_is_best():
    found = [
        outcome(0, "finished", (0.1, 0.99), (1.5, 0.7)),  # what it was in between doesn't count
        outcome(1, "stopped", (0.5, 0.9)),
        outcome(2, "finished", (2.0, 0.1), (1.0, 0.6)),
        outcome(3, "failed"),
        outcome(4, "finished", (2.0, 0.1), (1.0, 0.6)),
    ]
    assert [each.number for each in sweep.best_first(found, "nll")] == [2, 4, 0]
    assert [each.number for each in sweep.best_first(found, "accuracy")] == [0, 2, 4]
    assert sweep.best_first(found[1:2], "nll") == []


def test_looks_have_shorter_chains_with_as_many_samples():
    whole = config.Evaluation(chain_steps=1000, chain_every=100, eval_seeds=5)
    assert sweep.shorter(whole, Sweep()) == replace(whole, chain_steps=200, chain_every=20, eval_seeds=1)
    assert sweep.shorter(whole, Sweep(judge_chain_steps=5000, judge_seeds=2)) == replace(whole, eval_seeds=2)
    assert sweep.shorter(replace(whole, chain_steps=4, chain_every=4), Sweep()).chain_every == 1


def test_losses_are_summed_over_architectures_and_averaged_over_draws():
    rows = [
        {"step": step, "architecture": name, "loss": loss}
        for step, name, loss in [(1, "a", 9.0), (2, "a", 1.0), (2, "a", 3.0), (2, "b", 5.0)]
    ]
    assert sweep.losses(rows, 1) == [[2, 7.0]]


def task_of(small, digits, folder, *own, **settings):
    """Trials on the experts of the session, as `tuning` would give them out."""
    base = small.updated(steps=4)
    made = Sweep(evaluate_every=2, **settings)
    configs = [sweep.config_of(base, each, made, folder, number) for number, each in enumerate(own)]
    held = digits._replace(validation=digits.test)  # as many images as the experts' data set leaves
    return Task(configs, sweep.withheld(held), made)


def one_trial(task, number=0, until=None):
    looks = []

    def report(look):
        looks.append(look)
        if look.step == until:
            raise KeyboardInterrupt

    sweep.run_trial(task, number, Serial("cpu", Interruption()), report, print)
    return looks


def test_a_trial_that_was_cut_gives_what_the_whole_one_gives(small, digits, tmp_path):
    whole = one_trial(task_of(small, digits, tmp_path / "whole", {"alpha": 5.0}))
    assert [look.step for look in whole] == [2, 4]
    cut = task_of(small, digits, tmp_path / "cut", {"alpha": 5.0})
    with pytest.raises(KeyboardInterrupt):
        one_trial(cut, until=2)
    assert sweep.outcome(cut.configs[0], 0).how == "open"
    assert one_trial(cut) == whole[1:]
    found = sweep.outcome(cut.configs[0], 0)
    assert (found.how, found.record.starts, found.record.looks) == ("finished", [0, 2], whole)
    rows = pq.read_table(Path(cut.configs[0].output.out) / "metrics.parquet").to_pylist()
    assert Counter(row["step"] for row in rows) == {1: 2, 2: 2, 3: 2, 4: 2}
    assert one_trial(cut) == []  # a finished one does nothing


def test_a_look_that_a_kill_prevented_is_made_up_for(small, digits, tmp_path):
    """The checkpoint is written before the look."""
    task = task_of(small, digits, tmp_path, {"alpha": 5.0})
    with pytest.raises(KeyboardInterrupt):
        one_trial(task, until=2)
    folder = Path(task.configs[0].output.out)
    record = sweep.read_record(folder)
    expected = record.looks.pop()
    sweep.write_record(folder, record)
    assert one_trial(task)[0] == expected


def test_a_configuration_that_diverges_is_a_failed_trial_and_no_error(small, digits, tmp_path):
    task = task_of(small, digits, tmp_path, {"alpha": 1e30})
    one_trial(task)
    found = sweep.outcome(task.configs[0], 0)
    assert found.how == "failed"
    assert "lower --alpha" in found.why


def test_the_method_that_learns_nothing_is_looked_at_once(small, digits, tmp_path):
    task = task_of(small, digits, tmp_path, {"method": "random"})
    assert [look.step for look in one_trial(task)] == [0]
    assert sweep.outcome(task.configs[0], 0).how == "finished"


def test_what_trials_get_holds_no_test_image(digits, tmp_path):
    """Bytes of the test images, which are in the whole data set's, are not in what is sent; nor can they be asked for."""
    from ray import cloudpickle

    base = preset("digits").updated(validation=0.1)
    dataset = plan.load_data(base, print)
    wanted = dataset.test.images[7].tobytes()
    own = [sweep.config_of(base, {}, Sweep(), tmp_path, 0)]
    assert wanted in cloudpickle.dumps(dataset)
    sent = cloudpickle.dumps(tuning.task_of(own, dataset, Sweep()))
    assert wanted not in sent
    assert dataset.validation.images[7].tobytes() in sent
    assert not {row.tobytes() for row in dataset.validation.images} & {row.tobytes() for row in dataset.test.images}
