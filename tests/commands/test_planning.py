"""Sizes chosen by the command line, --print-config, and the plan of --dry-run, on a few images of a folder."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support.image_files import encoded, pixels, write_images, write_parquet
from support.runs import distil, flags, refused, silent

from fbpc_ray import api
from fbpc_ray.commands import experts, main, planning
from fbpc_ray.commands.parsing import start_of
from fbpc_ray.core import cores, memory, sizes
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.presets import preset
from fbpc_ray.core.sizes import Seconds
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import initial_state
from fbpc_ray.execution import advice, memory_estimate, sizing, timing
from fbpc_ray.execution.session import load_data, network_specs, open_session
from fbpc_ray.execution.timing import Measured, Timings

TINY = (
    "--backend", "serial", "--no-tracking", "--width", "8", "--expert-count", "1", "--expert-epochs", "2", "--steps",
    "1", "--chain-epochs", "2", "--num-chains", "1", "--posterior-steps", "2", "--threads", "1",
)  # fmt: skip
"""Flags that make a run of seconds, and leave batches and rates to the choice."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 noisy images of 8x8 in two classes, of which 18 and 6 are train and test."""
    root, source = tmp_path_factory.mktemp("data") / "my-images", np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 3)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(0, 128, (8, 8, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cores, "available", lambda: 2)


def printed(capsys, *words) -> dict:
    """Return the JSON of --print-config, which is alone on standard output."""
    capsys.readouterr()
    main.main(["distill", *words, "--print-config"])
    return json.loads(capsys.readouterr().out)


def test_sizes_are_chosen_where_no_flag_names_them(images, capsys):
    """The settings of core/sizes.py, a table of them on standard error; a flag wins, whatever its value."""
    data = ("--data", f"folder:{images}")
    chosen = sizes.choose(sizes.Facts(18, 2, (3, 8, 8), 6, cores=2), sizes.LEVELS["laptop"]).settings()
    assert chosen["expert_batch_size"] == 4
    values = printed(capsys, *data)
    assert {name: values[name] for name in chosen} == chosen
    values = printed(capsys, *data, "--width=128", "--alpha", "100")
    assert {name: values[name] for name in chosen if values[name] != chosen[name]} == {"width": 128, "alpha": 100}
    main.main(["distill", *data, "--width", "128", "--print-config"])
    table = capsys.readouterr().err
    assert re.search(r"^sizes for 18 training images of 2 classes, 8x8, on 2 CPU cores \(--preset lap", table, re.M)
    assert "(by a formula; --dry-run times this machine); the limit is 4 min" in table
    assert re.search(r"^--expert-batch-size +4 +256 ", table, re.M)
    assert not re.search(r"^--width ", table, re.M)


def test_presets_of_any_data(images, capsys):
    data = ("--data", f"folder:{images}")
    quick, laptop, paper = (printed(capsys, *data, "--preset", name) for name in ("quick", "laptop", "paper"))
    assert quick["steps"] < laptop["steps"] < paper["steps"] == 1000
    assert (paper["expert_count"], paper["expert_epochs"], paper["width"]) == (100, 50, 128)
    assert printed(capsys, "--preset", "laptop", "--ipc", "10")["batch_size"] == 100  # of digits
    assert printed(capsys, "--data", "digits")["expert_epochs"] == preset("digits").experts.expert_epochs


def test_the_printed_configuration_is_a_preset(images, tmp_path, capsys):
    values = printed(capsys, "--data", f"folder:{images}", "--steps", "7")
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert printed(capsys, "--preset", "mine.json") == values
    assert printed(capsys, "--preset", "mine.json", "--steps", "8") == values | {"steps": 8}


def test_a_run_keeps_its_sizes_when_it_is_resumed(images, tmp_path, capsys, monkeypatch):
    """config.json holds them: another machine, and the preset of the first command, choose nothing again."""
    words = ("--data", f"folder:{images}", "--out", str(tmp_path / "run"), *TINY)
    distil(*words)
    stored = read_config(tmp_path / "run")
    chosen = (stored.experts.expert_batch_size, stored.distillation.batch_size, stored.evaluation.chain_every)
    assert chosen == (4, 2, 1)
    monkeypatch.setattr(cores, "available", lambda: 64)
    monkeypatch.setattr(sizes, "choose", None)
    capsys.readouterr()
    for more in (("--resume",), ("--resume", "auto"), ("--resume", "--preset", "laptop")):
        distil(*words, *more, "--steps", "2")
        assert "sizes for" not in capsys.readouterr().out
    assert read_config(tmp_path / "run").updated(steps=1) == stored


def test_the_python_api_chooses_the_same(images, tmp_path, capsys):
    """The same sizes, to the bit of the coreset."""
    distil("--data", f"folder:{images}", "--out", str(tmp_path / "run"), *TINY)
    settings = read_config(tmp_path / "run").flat()
    lines = []
    values = {name: settings[name] for name in ("width", "expert_count", "expert_epochs", "steps", "posterior_steps")}
    coreset = api.distill(f"folder:{images}", log=lines.append, threads=1, **values)
    assert (coreset.images == api.load_coreset(tmp_path / "run" / "coreset" / "coreset.safetensors").images).all()
    assert any("sizes for 18 training images" in line for line in lines)


def test_a_sweep_starts_from_the_same_choice(images, capsys):
    """Of the images that its validation split leaves."""
    data = ("--data", f"folder:{images}")
    capsys.readouterr()
    main.main(["tune", *data, "--print-config"])
    assert json.loads(capsys.readouterr().out) == printed(capsys, *data, "--validation", "0.1")


def test_the_smallest_sizes_say_that_they_are_above_the_limit():
    """Photographs, for which --image-size is the way out, and 200 classes of small images, for which it is not."""
    level, lines = sizes.LEVELS["laptop"], []
    for facts in (
        sizes.Facts(1000, 10, (3, 224, 224), 200),
        sizes.Facts(9**6, 200, (3, 64, 64), 9**4),
        sizes.Facts(9, 2, (3, 8, 8), 2),
    ):
        chosen = sizing.Chosen(sizes.choose(facts, level), level, None)
        lines.append(sizing._time(facts, chosen))
        planned = sizing._planned_time(facts, chosen)
        assert planned.startswith(
            "chosen for at most 4 min; " if chosen.fits else "the smallest sizes, which are above"
        )
    way_out = "with the smallest sizes; for less time give "
    assert all("(by a formula)" in line for line in lines)
    assert lines[0].endswith(f", above the limit of 4 min, {way_out}--image-size 32, fewer images or a smaller --ipc")
    assert lines[1].endswith(f", above the limit of 4 min, {way_out}fewer images or a smaller --ipc")
    assert lines[2].endswith("; the limit is 4 min")


def test_a_run_in_one_process_has_its_own_estimate(images, capsys):
    """The choice is the same: the backend changes no result. With a last layer, networks are trained for each seed."""
    data = ("--data", f"folder:{images}", "--print-config")
    tables = []
    for backend in ("ray", "serial"):
        capsys.readouterr()
        main.main(["distill", *data, "--backend", backend])
        tables.append(capsys.readouterr().err)
    chosen = sizes.choose(sizes.Facts(18, 2, (3, 8, 8), 6, cores=2), sizes.LEVELS["laptop"])
    total, serial = (describe_seconds(seconds) for seconds in (chosen.seconds.total, chosen.serial))
    assert f"take about {total} (by a formula" in tables[0]
    assert f"take about {total} with Ray, {serial} in this process (by a formula" in tables[1]
    assert tables[0].splitlines()[2:] == tables[1].splitlines()[2:]


def test_a_time_budget_takes_the_largest_that_fits(images, capsys, monkeypatch):
    """By the measured seconds of a rung, not by the formula's, of which a probe here finds the tenfold."""
    timed = []

    def measure(session, device, cores):
        facts = sizes.Facts(18, 2, (3, 8, 8), 6, cores=2)
        c = session.config
        rung = next(
            rung for rung in sizes.LADDER
            if (rung.width, rung.steps, rung.expert_count)
            == (c.networks.width, c.distillation.steps, c.experts.expert_count)
        )  # fmt: skip
        timed.append(rung)
        return Measured([], Seconds(*(10 * part for part in sizes.estimate(facts, rung, "cpu"))))

    monkeypatch.setattr(sizing, "measure", measure)
    facts = sizes.Facts(18, 2, (3, 8, 8), 6, cores=2)
    totals = [10 * sizes.estimate(facts, rung, "cpu").total for rung in sizes.LADDER]
    values = printed(capsys, "--data", f"folder:{images}", "--time-budget", f"{totals[3] + 1:.0f}s")
    assert (values["width"], values["steps"]) == (sizes.LADDER[3].width, sizes.LADDER[3].steps)
    assert timed[-1] == sizes.LADDER[3]
    assert len(timed) <= 3  # one probe tells how wrong the formula is
    values = printed(capsys, "--data", f"folder:{images}", "--time-budget", "1s")
    assert values["steps"] == sizes.LADDER[0].steps


def test_a_plan_has_one_estimate(images, capsys, monkeypatch):
    """That of a probe: the one in the plan, or the one that chose the sizes, which is not made twice."""
    probes = []

    def measure(session, device, cores):
        probes.append(session.config)
        return Measured([Timings(1, 1, 100, 1, 1, 1)], Seconds(1000, 1000, 1000 + len(probes)))

    monkeypatch.setattr(sizing, "measure", measure)
    monkeypatch.setattr(planning, "measure", measure)
    words = ("--data", f"folder:{images}", "--backend", "serial", "--compiled", "off", "--dry-run")
    distil(*words)
    text = capsys.readouterr().out
    assert "chosen for at most 4 min; the plan below has the time on this machine" in text
    assert "evaluation take about" not in text
    assert re.search(r"^total +50 min  estimated from passes timed here, right to a factor of two$", text, re.M)
    assert "above the 4 min that a formula chose the sizes for; `--time-budget 240s` chooses them by the timing" in text
    assert len(probes) == 1
    distil(*words, "--time-budget", "3009s")
    text = capsys.readouterr().out
    total = describe_seconds(3000 + len(probes))
    assert re.search(f"^total +{total} ", text, re.M)
    assert "evaluation take about" not in text and "above the" not in text
    assert len(set(probes)) == len(probes)  # no rung is timed twice


def test_a_rung_that_memory_cannot_hold_is_passed_over(images, monkeypatch):
    """Here every rung of a width above 16."""
    open_session = sizing.open_session

    def refuse_wide(config, *more):
        if config.networks.width > 16:
            raise UserError("--width: too wide for this memory")
        return open_session(config, *more)

    monkeypatch.setattr(sizing, "measure", lambda *arguments: Measured([], Seconds(1, 1, 1)))
    monkeypatch.setattr(sizing, "open_session", refuse_wide)
    config, request = start_of(["--data", f"folder:{images}", "--time-budget", "1h"])
    config = config.updated(data=f"folder:{images}")
    sized = sizing.with_sizes(config, load_data(config, print), request, print)
    assert (sized.networks.width, sized.distillation.steps) == (16, 60)


def test_a_resumed_run_and_a_preset_file_choose_nothing(images, finished_run):
    data = ["--data", f"folder:{images}"]
    assert start_of(data)[1] == ("", {"data"}, 0.0)
    request = start_of([*data, "--no-tracking", "--width=8"])[1]
    assert request is not None
    assert request.flags == {"data", "tracking", "width"}
    assert start_of(["--out", str(finished_run), "--resume", "--time-budget", "1h"])[1] is None
    assert start_of([*data, "--preset", "cifar10-ipc1"])[1] is None


def test_a_bad_budget_is_one_line(images, capsys):
    assert "--time-budget: must be a duration" in refused(capsys, "--data", f"folder:{images}", "--time-budget", "soon")


@pytest.mark.parametrize("name", ["width", "ipc", "expert-batch-size"])
def test_a_size_of_zero_is_one_line_before_sizes_are_chosen(images, capsys, name):
    assert refused(capsys, "--data", f"folder:{images}", f"--{name}", "0") == (
        f"error: --{name}: must be 1 or more, got 0"
    )


def test_a_bad_budget_with_a_preset_is_one_line(images, capsys):
    both = ("--time-budget", "5m", "--preset", "quick")
    assert "leave out one of them" in refused(capsys, "--data", f"folder:{images}", *both)


def test_a_plan_says_what_a_run_would_do(small, digits, tmp_path, capsys):
    """Data, networks, seconds of each part, disk, memory, notes and files; nothing is written."""
    words = flags(small, out=str(tmp_path / "dry"), experts=str(tmp_path / "none"), expert_batch_size=1000)
    before = sorted(tmp_path.rglob("*"))
    distil(*words, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert "digits: 10 classes of grey images, 8x8 pixels" in text
    train, test = (np.bincount(split.labels) for split in (digits.train, digits.test))
    assert f"1,437 training images, {train.min()} to {train.max()} per class; no validation images" in text
    assert f"360 test images, {test.min()} to {test.max()} per class" in text
    assert re.search(r"^coreset +10 images, 1 per class, by fbpc$", text, re.M)
    assert re.search(r"convnet-in: 1,\d\d\d parameters, width 8, depth 2", text)
    assert re.search(r"^experts +\S.* 4 experts to train, 0 are in 2 folders$", text, re.M)
    assert re.search(r"^distillation +\S.* 4 steps, each with 2 MAP solves of about \d+ Adam steps", text, re.M)
    assert re.search(r"^chains +\S.* 8 chains of 20 epochs", text, re.M)
    assert re.search(r"^total .* right to a factor of two; Ray starts in 10 to 20 s more$", text, re.M)
    assert re.search(r"^memory +about \S+ [GM]B: 3 processes", text, re.M)  # this one and two of Ray
    assert re.search(r"^disk +\d+ kB for experts; ", text, re.M)
    assert "note: each expert gets only 6 SGD steps" in text
    assert str(tmp_path / "dry") in text
    assert "config.json, result.json" in text
    assert text.rstrip().endswith("dry run: nothing was written")


def test_a_plan_ends_with_the_error_of_the_run(images, capsys):
    """More images per class than there are: the plan comes first, then the line that the run would give."""
    line = refused(capsys, "--data", f"folder:{images}", "--ipc", "12", "--dry-run", "--backend", "serial")
    assert "has 9 images, ipc is 12: lower --ipc" in line


@pytest.mark.parametrize(
    "words, note",
    [
        (("--ipc", "5"), "the coreset has 10 images, the training set 18"),
        # Two standard errors of the difference of two accuracies near one half: 200 sqrt(2 x .25 / 6) points.
        ((), "6 test images are few: accuracies 58 points apart may be equal"),
        (("--expert-epochs", "40", "--start-epoch", "1"), "only 5 SGD steps at --start-epoch 1 .* --start-epoch 5"),
    ],
)
def test_notes_of_a_run_that_will_disappoint(images, capsys, words, note):
    monkey = ("--backend", "serial", "--steps", "1", "--width", "8")
    distil("--data", f"folder:{images}", *monkey, *words, "--dry-run")
    assert re.search(f"^note: .*{note}", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    "method, used",
    [("fbpc", "views gamma_window map_init"), ("bpc-fkl", "views"), ("bpc-rkl", "rkl_estimator"), ("vbpc", "")],
)
def test_a_note_names_what_the_method_does_not_use(small, digits, method, used):
    given = {"views": 8, "gamma_window": 2, "map_init": "warm", "rkl_estimator": "authors", "alpha_decay": 9}
    config = small.updated(method=method, start_rule="before", **given)
    used = {*used.split(), *([] if method == "vbpc" else ["alpha_decay"])}
    flags_unused = {f"--{name.replace('_', '-')}" for name in given.keys() - used}
    (line,) = (note for note in advice.notes(open_session(config, silent, digits)) if "does not use" in note)
    first, _, rest = line.partition(" does not use ")
    assert first == f"note: --method {method}" and set(rest.split(" and ")) == flags_unused
    plain = advice.notes(open_session(small.updated(method=method, start_rule="before"), silent, digits))
    assert not any("does not use" in note for note in plain)


def test_other_commands_plan_their_parts(images, finished_run, capsys):
    main.main(["experts", "--data", f"folder:{images}", "--backend", "serial", "--width", "8", "--dry-run"])
    text = capsys.readouterr().out
    assert re.search(r"^experts +\S.* \d+ experts to train, 0 are in ", text, re.M)
    assert re.search(r"^--expert-batch-size +4 ", text, re.M)
    assert not re.search(r"^coreset ", text, re.M)
    assert not re.search(r"^--(alpha|steps|chain-epochs) ", text, re.M)
    assert "chains  " not in text
    main.main(["evaluate", str(finished_run), "--backend", "serial", "--chain-epochs", "30", "--dry-run"])
    text = capsys.readouterr().out
    assert re.search(r"^chains +\S.* 8 chains of 30 epochs", text, re.M)
    assert "to train" not in text


def test_the_plan_of_an_evaluation_is_of_the_coresets_that_it_scores(digits, tmp_path, capsys):
    """Of classes of several sizes, or of more images than the data has, there are no random images beside it."""
    first, labels = initial_state(digits, 2, 5)
    words = ("--data", "digits", "--backend", "serial", "--width", "8", "--chain-epochs", "20", "--chain-every", "10",
             "--architectures", "convnet-in", "--num-chains", "3")  # fmt: skip
    for index, size, chains in (
        (range(20), "20 images, 2 per class", "6 chains of 20 epochs, half on random images"),
        (range(19), "19 images, 1 to 2 per class", "3 chains of 20 epochs, and"),
        (range(2000), "2,000 images, 200 per class", "3 chains of 20 epochs, and"),
    ):
        rows = [number % 20 for number in index]
        given = Coreset(first.images[rows], labels[rows], digits.mean, digits.std, digits.classes)
        coreset.save(given, tmp_path / "given.safetensors")
        main.main(["evaluate", "--coreset", str(tmp_path / "given.safetensors"), *words, "--dry-run"])
        text = capsys.readouterr().out
        assert re.search(f"^coreset  {size}$", text, re.M)
        assert re.search(rf"^chains +\S.* {chains}", text, re.M)


def test_the_plan_of_an_evaluation_downloads_nothing_and_needs_no_initial_coreset(finished_run, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    settings = read_config(folder).updated(initial_coreset=str(tmp_path / "gone.npz"))
    (folder / "config.json").write_text(json.dumps(settings.flat()))
    words = (str(folder), "--backend", "serial", "--architectures", "convnet-in", "--num-chains", "1", "--dry-run")
    main.main(["evaluate", *words])
    assert re.search("^coreset  10 images, 1 per class, by fbpc$", capsys.readouterr().out, re.M)
    settings = settings.updated(data="cifar10", data_root=str(tmp_path / "data"))
    (folder / "config.json").write_text(json.dumps(settings.flat()))
    line = refused(capsys, *words, "--download", command="evaluate")
    assert "download it with --download" in line and not (tmp_path / "data").exists()
    assert "there is no --ood to resize" in refused(capsys, *words, "--ood-resize", command="evaluate")


def test_errors_of_ood_data_name_no_flag_that_the_command_lacks(finished_run, tmp_path, capsys):
    """--image-size and --image-column are of the data of a distillation; --ood has files alone, and --ood-resize."""
    for number in range(4):
        write_images(tmp_path / "mixed" / "ab"[number % 2] / str(number), pixels(1, size=8 + number))
    write_parquet(tmp_path / "a.parquet", [encoded(image) for image in pixels(4)], [0, 1] * 2, image="photo")
    of_run = (str(finished_run), "--backend", "serial", "--dry-run")
    of_table = ("grid", "--cifar10", "digits", "--backend", "serial", "--dry-run", "--out", str(tmp_path / "out"))
    for command, words in (("evaluate", of_run), ("reproduce", of_table)):
        line = refused(capsys, *words, "--ood", f"folder:{tmp_path / 'mixed'}", command=command)
        assert line.endswith("; all images must have one size: resize them, or add --ood-resize")
        line = refused(capsys, *words, "--ood", f"parquet:{tmp_path / 'a.parquet'}", command=command)
        assert (
            line.endswith("; rename the column")
            and "no column img or image or imgs or images (found photo, label)" in line
        )


def test_a_run_whose_images_have_several_sizes_now_is_one_line(finished_run, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for number in range(4):
        write_images(tmp_path / "mixed" / "ab"[number % 2] / str(number), pixels(1, size=8 + number))
    RunDirectory(folder).write_config(read_config(folder).updated(data=f"folder:{tmp_path / 'mixed'}"))
    line = refused(capsys, str(folder), "--backend", "serial", command="evaluate")
    assert line.endswith("; all images must have one size: resize them")


def test_a_preset_without_experts_trains_none(tmp_path, capsys):
    (tmp_path / "vbpc.json").write_text(json.dumps({"method": "vbpc"}))
    line = refused(capsys, "--preset", "./vbpc.json", command="experts")
    assert "its method, vbpc, takes no experts" in line


def test_experts_ignore_the_settings_of_a_preset_that_they_do_not_use(images, small, tmp_path, capsys, monkeypatch):
    """Stores for other files, and values that fit no distillation: the command line can't repeat or change them."""
    unused = {
        "initial_coreset": "s3://mine/a.npz", "out": "s3://mine/run", "start_epoch": 9, "val_every": 5,
        "chain_every": 50, "chain_epochs": 20, "ipc": 2,
    }  # fmt: skip
    monkeypatch.setattr(planning, "measure", lambda *_: Measured([Timings(1, 1, 1, 1, 1, 1)] * 2, Seconds(1, 1, 1)))
    preset = small.updated(**unused, data=f"folder:{images}", experts=str(tmp_path / "experts"), backend="serial")
    (tmp_path / "mine.json").write_text(json.dumps(preset.flat()))
    main.main(["experts", "--preset", "./mine.json", "--dry-run"])
    assert re.search(r"^experts +\S.* 4 experts to train, 0 are in 2 folders$", capsys.readouterr().out, re.M)


def test_experts_alone_are_checked_and_timed(capsys, monkeypatch):
    """A batch of theirs that cannot fit is refused; what a distillation needs, and --ipc of no class, is not."""
    words = ("--data", "digits", "--architectures", "convnet-in", "--backend", "serial", "--device", "cpu", "--dry-run")
    config = preset("digits").updated(architectures=("convnet-in",), expert_batch_size=8, real_batch_size=256)
    config = config.updated(width=256, backend="serial", device="cpu")
    data = load_data(config, silent)
    images, specs = len(data.train.labels), network_specs(config, data)
    alone, run = (
        memory_estimate.estimate(config, specs, phases, images=images, coreset=10)
        for phases in (["experts"], ["distillation"])
    )
    assert run > 1.5 * alone
    monkeypatch.setattr(memory, "available", lambda: (alone + run) / 2)
    monkeypatch.setattr(timing, "sampling", None)  # what chains and MAP solves are timed by
    monkeypatch.setattr(timing, "map_solve", None)
    small = ("--width", "256", "--expert-batch-size", "8", "--ipc", "1000")
    main.main(["experts", *words, *small])
    text = capsys.readouterr().out
    assert re.search(r"^experts +\S.* 4 experts to train, 0 are in ", text, re.M)
    assert not re.search(r"^coreset ", text, re.M) and "compile" not in text
    line = refused(capsys, *words, "--width", "256", "--expert-batch-size", "512", command="experts")
    assert line.startswith("error: --expert-batch-size 512: passes of expert training need about")


def test_experts_are_those_of_a_distillation_of_as_many_images(images, capsys, monkeypatch):
    """A limit of time that width 128 meets with one image per class, and not with nine."""
    facts = sizes.Facts(18, 2, (3, 8, 8), 6, cores=2)
    wide = [sizes.estimate(facts._replace(ipc=ipc), sizes.LADDER[-2], "cpu").total for ipc in (1, 9)]
    monkeypatch.setitem(sizes.LEVELS, "laptop", sizes.LEVELS["laptop"]._replace(seconds=sum(wide) / 2))
    trained: list[Config] = []
    monkeypatch.setattr(planning, "describe", lambda session, **parts: trained.append(session.config))
    words = ("--data", f"folder:{images}", "--backend", "serial")
    for ipc in ("1", "9"):
        chosen = printed(capsys, *words, "--ipc", ipc)
        main.main(["experts", *words, "--ipc", ipc, "--dry-run"])
        assert f"these are the experts of `fbpc distill --ipc {ipc}`" in capsys.readouterr().out
        flat = trained[-1].flat()
        assert {name: flat[name] for name in experts.SHOWN} == {
            name: tuple(chosen[name]) if name == "architectures" else chosen[name] for name in experts.SHOWN
        }
    main.main(["experts", *words, "--dry-run"])
    assert trained[2] == trained[0]
    assert trained[0].networks.width > trained[1].networks.width
