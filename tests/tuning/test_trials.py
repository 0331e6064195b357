"""Trials of a sweep: which is best, their files, and what a kill leaves; without Ray."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from support import errors

from fbpc_ray.core import config
from fbpc_ray.core.config import Sweep
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.signals import Interruption
from fbpc_ray.evaluation.results import ChainScore
from fbpc_ray.execution import session
from fbpc_ray.execution.ray.placement import Node, Resources
from fbpc_ray.execution.serial import Serial
from fbpc_ray.tuning import sweep as tuning
from fbpc_ray.tuning import trial as sweep
from fbpc_ray.tuning.trial import Outcome, Record, Task, ValidationResult


def outcome(number, how, *scores):
    looks = [
        ValidationResult(10 * (index + 1), nll, accuracy, 0.1, 0.2, []) for index, (nll, accuracy) in enumerate(scores)
    ]
    return Outcome(number, how, "", Record([0], looks))


def test_the_best_is_the_finished_trial_whose_last_look_is_best():
    result = [
        outcome(0, "finished", (0.1, 0.99), (1.5, 0.7)),  # what it was in between doesn't count
        outcome(1, "stopped", (0.5, 0.9)),
        outcome(2, "finished", (2.0, 0.1), (1.0, 0.6)),
        outcome(3, "failed"),
        outcome(4, "finished", (2.0, 0.1), (1.0, 0.6)),
    ]
    assert [trial.number for trial in sweep.rank(result, "nll")] == [2, 4, 0]
    assert [trial.number for trial in sweep.rank(result, "accuracy")] == [0, 2, 4]
    assert sweep.rank(result[1:2], "nll") == []


def test_looks_have_shorter_chains_with_as_many_samples():
    whole = config.Evaluation(chain_epochs=1000, chain_every=100, num_chains=5)
    assert sweep.val_evaluation(whole, Sweep()) == replace(whole, chain_epochs=200, chain_every=20, num_chains=1)
    assert sweep.val_evaluation(whole, Sweep(val_chain_epochs=5000, val_chains=2)) == replace(whole, num_chains=2)
    assert sweep.val_evaluation(replace(whole, chain_epochs=4, chain_every=4), Sweep()).chain_every == 1


def test_experts_are_trained_once_for_all_trials_also_where_the_first_takes_none(small, digits, tmp_path):
    base = small.updated(experts=str(tmp_path), architectures=("convnet-in",), expert_count=1)
    trials = [{"method": "vbpc"}, {"method": "fbpc"}]
    task = Task([base.updated(**flags) for flags in trials], digits, Sweep())
    of_two_methods: Any = SimpleNamespace(plan=SimpleNamespace(trials=trials), task=task)
    tuning._train_shared_experts(of_two_methods, Serial("cpu", Interruption()))
    assert len(list(tmp_path.rglob("*.arrow"))) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"how": "stopped"}', "[" * 100_000])
@pytest.mark.parametrize("name", ["trial.json", "ended.json"])
def test_a_damaged_file_of_a_trial_is_one_line(name, text, small, tmp_path):
    folder = tmp_path / "trials/00003"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"00003/{name} is damaged \(.*: delete") as caught:
        sweep.read_outcome(small.updated(out=str(folder)), 3)
    assert "\n" not in str(caught.value)


def test_scratch_files_of_a_killed_sweep_and_its_trials_are_removed(small, tmp_path):
    names = (".trials.md.0f.tmp", "trials/00000/.trial.json.0f.tmp", "trials/00001/checkpoint/.state.0f.tmp")
    for name in (*names, "trials/00001/trial.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    configs = [small.updated(out=str(tmp_path / f"trials/{number:05d}")) for number in range(3)]
    sweep_of_three: Any = SimpleNamespace(folder=tmp_path, task=SimpleNamespace(configs=configs))
    tuning.remove_leftovers(sweep_of_three)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["trial.json"]


def test_losses_are_summed_over_architectures_and_averaged_over_draws():
    rows = [
        {"step": step, "architecture": name, "loss": loss}
        for step, name, loss in [(1, "a", 9.0), (2, "a", 1.0), (2, "a", 3.0), (2, "b", 5.0)]
    ]
    assert sweep.losses_after(rows, 1) == [[2, 7.0]]


def test_a_trial_fails_whose_chains_diverged_on_any_network():
    """Without them, the mean over the others would make it the best."""
    values = {"nll": 1.0, "accuracy": 0.5, "ece": 0.1, "brier": 0.2}
    scores = [ChainScore("coreset", "a", 0, values), ChainScore("coreset", "b", 0, values | {"nll": 3.0})]
    assert sweep.mean_result(scores, 2, [], config.Config(), 10) == ValidationResult(2, 2.0, 0.5, 0.1, 0.2, [])
    with pytest.raises(UserError, match="a chain of b on the coreset of step 2 diverged"):
        sweep.mean_result([scores[0], scores[1]._replace(values=None)], 2, [], config.Config(), 10)


def task_of(small, digits, folder, *own, **settings):
    """Trials on the experts of the session, as `tuning` would give them out."""
    base = small.updated(steps=4, val_every=2, validation=0.1)
    settings_of_sweep = Sweep(**settings)
    configs = [sweep.trial_config(base, each, settings_of_sweep, folder, number) for number, each in enumerate(own)]
    held = digits._replace(validation=digits.test)  # as many images as the experts' data set leaves
    return Task(configs, sweep.without_test_split(held), settings_of_sweep)


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
    assert sweep.read_outcome(cut.configs[0], 0).status == "open"
    assert one_trial(cut) == whole[1:]
    result = sweep.read_outcome(cut.configs[0], 0)
    assert (result.status, result.record.starts, result.record.validations) == ("finished", [0, 2], whole)
    rows = pq.read_table(Path(cut.configs[0].output.out) / "metrics.parquet").to_pylist()
    assert Counter(row["step"] for row in rows) == {1: 2, 2: 2, 3: 2, 4: 2}
    assert one_trial(cut) == []  # a finished one does nothing


def test_a_look_has_the_losses_since_the_one_before(small, digits, tmp_path):
    looks = one_trial(task_of(small, digits, tmp_path, {"alpha": 5.0, "steps": 6, "architectures": ["convnet-in"]}))
    assert [[step for step, _ in look.losses] for look in looks] == [[1, 2], [3, 4], [5, 6]]


def test_trials_of_any_length_are_compared_at_the_same_steps(small, tmp_path):
    """Four times in the steps of the base, or as --val-every says."""
    base = small.updated(steps=40, val_every=0, validation=0.1)
    for changes, interval in (({}, 10), ({"val_every": 3}, 3)):
        for steps in (20, 40, 80):
            made = sweep.trial_config(base.updated(**changes), {"steps": steps}, Sweep(), tmp_path, 0)
            assert (made.distillation.steps, made.distillation.checkpoint_every) == (steps, interval)


def test_a_trial_of_another_method_has_the_settings_of_its_paper_but_for_its_own_flags(tmp_path):
    base = preset("cifar10-ipc1").updated(validation=0.1, method="fbpc")
    made = sweep.trial_config(base, {"method": "bpc-fkl", "steps": 7}, Sweep(), tmp_path, 0).distillation
    assert (made.method, made.start_rule, made.start_epoch, made.syn_steps, made.alpha) == (
        "bpc-fkl", "before", 2, 50, 1000.0,
    )  # fmt: skip
    assert made.steps == 7


def test_a_look_that_a_kill_prevented_is_made_up_for(small, digits, tmp_path):
    """The checkpoint is written before the look."""
    task = task_of(small, digits, tmp_path, {"alpha": 5.0})
    with pytest.raises(KeyboardInterrupt):
        one_trial(task, until=2)
    folder = Path(task.configs[0].output.out)
    record = sweep.read_record(folder)
    expected = record.validations.pop()
    sweep.write_record(folder, record)
    assert one_trial(task)[0] == expected


def test_a_configuration_that_diverges_is_a_failed_trial_and_no_error(small, digits, tmp_path):
    task = task_of(small, digits, tmp_path, {"alpha": 1e9, "architectures": ["convnet-none"], "map_max_steps": 20})
    one_trial(task)
    result = sweep.read_outcome(task.configs[0], 0)
    assert result.status == "failed"
    assert result.reason.endswith("diverged: lower --alpha or --chain-eta (now 0.009)")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"method": "vbpc", "inference": "last-layer"}, "--image-lr or --net-lr, or raise --net-ridge"),
        (
            {"method": "bpc-w", "chain_noise": "literal"},
            "--alpha or --chain-eta (now 0.018), or use --chain-noise consistent",
        ),
        ({"method": "random"}, "--chain-eta (now 0.018)"),
    ],
)
def test_a_trial_that_diverged_names_flags_that_it_uses(changes, advice):
    scores = [ChainScore("coreset", "lenet", 0, None)]
    message = errors.refusal(sweep.mean_result, scores, 3, [], config.Config().updated(**changes), 20)
    assert message == f"a chain of lenet on the coreset of step 3 diverged: lower {advice}"


def test_the_method_that_learns_nothing_is_looked_at_once(small, digits, tmp_path):
    task = task_of(small, digits, tmp_path, {"method": "random"})
    assert [look.step for look in one_trial(task)] == [0]
    assert sweep.read_outcome(task.configs[0], 0).status == "finished"


def test_trials_of_different_expert_recipes_that_begin_together_all_finish(small, digits, tmp_path):
    """Each opens its store before the other has one: they would be in the same folder."""
    own = small.updated(
        experts=str(tmp_path / "experts"), architectures=("convnet-in",), expert_epochs=1, start_epoch=0
    )
    task = task_of(own, digits, tmp_path, {"expert_lr": 0.02}, {"expert_lr": 0.05})

    class Overtaken(Serial):
        def map(self, function, shared, items):
            if not sweep.read_outcome(task.configs[1], 1).last:
                one_trial(task, 1)
            return super().map(function, shared, items)

    sweep.run_trial(task, 0, Overtaken("cpu", Interruption()), lambda look: None, print)
    assert [sweep.read_outcome(config, number).status for number, config in enumerate(task.configs)] == ["finished"] * 2


def test_what_trials_get_holds_no_test_image(digits, tmp_path):
    """Bytes of the test images, which are in the whole data set, are not in what is sent to trials."""
    base = preset("digits").updated(validation=0.1)
    dataset = session.load_data(base, print)
    wanted = dataset.test.images[7].tobytes()
    own = [sweep.trial_config(base, {}, Sweep(), tmp_path, 0)]
    assert wanted in pickle.dumps(dataset)
    sent = pickle.dumps(tuning.task_of(own, dataset, Sweep()))
    assert wanted not in sent
    assert dataset.validation.images[7].tobytes() in sent
    assert not {row.tobytes() for row in dataset.validation.images} & {row.tobytes() for row in dataset.test.images}


@pytest.mark.parametrize("metric, better, worse", [("nll", 0.9, 1.1), ("accuracy", 1.1, 0.9)])
def test_asha_knows_what_was_found_before_a_resume(small, digits, tmp_path, metric, better, worse):
    """A trial worse than the median of ended ones is stopped; to a scheduler without a past it is the best."""
    from fbpc_ray.tuning import ray_tune as on_ray

    task = task_of(small, digits, tmp_path, *[{}] * 4)
    task = task._replace(settings=replace(task.settings, metric=metric))
    past = [outcome(n, "finished", (float(n), float(n))) for n in range(3)]
    past = [report._replace(record=Record([0], [report.record.validations[0]._replace(step=2)])) for report in past]
    trial = SimpleNamespace(trial_id="x", config={"number": 3})
    for known, value, decision in ((past, better, "CONTINUE"), (past, worse, "STOP"), ([], worse, "CONTINUE")):
        asha = on_ray._scheduler(task, [*known, outcome(3, "open")])
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, {"step": 2, metric: value}) == decision


def test_more_workers_per_trial_than_fit_are_refused(small, digits, tmp_path, monkeypatch):
    """Their placement group would never be placed; a cluster that starts nodes may come to have room."""
    from fbpc_ray.tuning import ray_tune as on_ray

    monkeypatch.setattr(on_ray, "nodes", lambda: [Node(2, 0), Node(1, 0)])
    task = task_of(small, digits, tmp_path, {})

    def placed(workers: int, **settings: Any) -> int:
        backend = SimpleNamespace(settings=config.Workers(**settings), need=lambda workers, threads: Resources(1, 0))
        chosen = task._replace(settings=replace(task.settings, workers_per_trial=workers))
        return on_ray.place(chosen, 1, backend)[1]  # type: ignore[arg-type]

    assert placed(3) == 3
    with pytest.raises(UserError, match="--workers-per-trial 4 of 1 CPU each, but the Ray cluster has room for 3:"):
        placed(4)
    assert placed(4, autoscale=True) == 4


@pytest.mark.parametrize("error, reason", [
    (
        "Traceback (most recent call last):\nValueError: first\n\nray.exceptions.ActorDiedError: The actor died.\n"
        "\tclass_name: Trial\nThe actor is dead because its node has died.",
        "ray.exceptions.ActorDiedError: The actor died.",
    ),
    ("no line that names one\n\n", "no line that names one"),
    (None, "its process or its machine ended"),
])  # fmt: skip
def test_of_the_error_of_a_lost_trial_the_last_line_that_names_one_is_logged(error, reason):
    from fbpc_ray.tuning import ray_tune as on_ray

    assert on_ray._reason(SimpleNamespace(get_error=lambda: error)) == reason
