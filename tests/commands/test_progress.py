"""On a terminal a bar with rate and time left, and lines above it; elsewhere lines alone."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Callable

import pytest
from support.runs import flags

from fbpc_ray.commands import main
from fbpc_ray.core import progress
from fbpc_ray.core.config import Sweep
from fbpc_ray.tracking.protocol import NullTracker
from fbpc_ray.tuning import monitor, trial
from fbpc_ray.tuning import sweep as tuning
from fbpc_ray.tuning.plan import write_plan
from fbpc_ray.tuning.trial import ValidationResult

QUICK = {"backend": "serial", "steps": 4, "num_chains": 1, "chain_epochs": 4, "chain_every": 2}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """What somebody at a terminal sees of a call, on both streams."""

    def watch(doing: Callable[[], object]) -> str:
        reader_end, terminal_end = pty.openpty()
        termios.tcsetwinsize(terminal_end, (40, 110))
        parts: list[bytes] = []

        def read() -> None:
            while True:
                try:
                    data = os.read(reader_end, 65536)
                except OSError:  # Linux's way to say that the other end is closed
                    return
                if not data:
                    return
                parts.append(data)

        reader = threading.Thread(target=read)
        reader.start()
        with open(terminal_end, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:  # noqa: PTH123  a number
            patch.setattr("sys.stdout", terminal)
            patch.setattr("sys.stderr", terminal)
            doing()
        reader.join(300)
        os.close(reader_end)
        return b"".join(parts).decode()

    return watch


def bars(text: str, what: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", text) if re.match(rf"{what}: .*%\|", line)]


def assert_says_rate_and_time_left(found: list[str]) -> None:
    """1/4 [00:07<00:21, 7.20s/ trajectory]; until the first is done, 0/4 [00:00<?, ? trajectory/s]."""
    assert found
    assert all(re.search(r"\d+/\d+ \[\d\d:\d\d<(\?|\d\d:\d\d), +(\?|[\d.]+)( \w+/s|s/ \w+)", line) for line in found)


def test_experts_distillation_and_evaluation_have_their_bars(small, tmp_path, seen):
    words = flags(small, **QUICK, experts=str(tmp_path / "experts"), out=str(tmp_path / "run"))
    text = seen(lambda: main.main(["distill", *words]))
    for what in ("experts", "distil", "evaluate"):
        assert_says_rate_and_time_left(bars(text, what))
    again = seen(lambda: main.main(["experts", "--experts", str(tmp_path / "experts"), *flags_of_experts(small)]))
    assert "experts: 4 of 4 trajectories are there" in again
    assert not bars(again, "experts")  # nothing to wait for


def flags_of_experts(small) -> list[str]:
    e, n = small.experts, small.networks
    return ["--backend", "serial", "--expert-count", "2", "--expert-epochs", str(e.expert_epochs), "--width",
            str(n.width), "--architectures", *n.architectures]  # fmt: skip


def test_a_table_has_its_bars_and_whole_lines_above_them(small, tmp_path, seen):
    words = ["table1", "--cifar10", "digits", "--ipc", "1", "--only", "Random", "--distill-seeds", "1", "--num-chains",
             "2", "--override", "width=8", "chain_epochs=4", "chain_every=2", "--out", str(tmp_path / "out"),
             "--backend", "serial", "--no-tracking"]  # fmt: skip
    text = seen(lambda: main.main(["reproduce", *words]))
    for what in ("distil", "evaluate"):
        assert_says_rate_and_time_left(bars(text, what))
    assert [line for line in re.split(r"[\r\n]", text) if re.fullmatch(r"coreset random-ipc1-\w+", line)]


def test_a_sweep_counts_the_steps_of_all_trials(small, tmp_path, seen):
    """A stopped trial's other steps count as done: nobody waits for them."""
    base = small.updated(validation=0.1, out=str(tmp_path / "sweep"), steps=4)
    result = tuning._prepare(base, Sweep(grid=("alpha=1,10",)), tmp_path / "sweep", False, False, False)
    write_plan(result.folder, result.plan, result.base)

    def look(number: int, step: int) -> ValidationResult:
        return ValidationResult(step, 1.0, 0.5, 0.1, 0.2, [])

    def act() -> None:
        board = monitor.SweepMonitor(result, NullTracker(), None)
        board.start()
        for number, step in ((0, 1), (1, 1), (0, 2)):
            board.trial_validated(number, look(number, step))
        trial.write_record(tmp_path / "sweep" / "trials" / "00001", trial.Record([0], [look(1, 1)]))
        board.trial_ended(1, "")
        board.trial_validated(0, look(0, 3))
        assert board._progress is not None
        board._progress._bar.refresh()
        board.close_bar()

    text = seen(act)
    assert "trial 1 stopped: at step 1 of 4: nll worse than the median" in text
    counts = [int(count) for line in bars(text, "sweep") for count in re.findall(r"(\d+)/8 \[", line)]
    assert sorted(counts) == counts
    assert counts[-1] == 7  # 3 of trial 0, all 4 of trial 1


def test_where_there_is_no_terminal_lines_alone_are_written(small, tmp_path, monkeypatch):
    output, aside = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.stderr", aside)
    main.main(["distill", *flags(small, **QUICK, out=str(tmp_path / "run"))])
    assert aside.getvalue() == ""
    assert "distilled: step 4" in output.getvalue()
    assert not re.search(r"[\r\x1b]", output.getvalue())


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of progress after each unit."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SHARE", 0.0)


RATE = r"\((\d+) %\)(, loss -?[\d.]+)?, [\d.e-]+ s/(\w+), (\d+ s|under a second) left"


def counted(text: str, what: str, unit: str) -> list[str]:
    """The counts of the lines of a work, each of which must have rate and time left once a part is done."""
    lines = [line for line in text.splitlines() if line.startswith(f"{what}: {unit} ")]
    counts = [line for line in lines if not line.endswith(" so far")]
    assert all(re.fullmatch(rf"{what}: {unit} \d+/\d+ {RATE}", line) for line in counts), lines
    return list(dict.fromkeys(line.split()[2] for line in lines))


def test_lines_of_experts_distillation_and_chains(small, tmp_path, capsys, every_line):
    """Units that run report their share, so that a count comes more than once."""
    words = flags(small, **QUICK, experts=str(tmp_path / "experts"), out=str(tmp_path / "run"))
    main.main(["distill", *words])
    text = capsys.readouterr().out
    assert counted(text, "experts", "trajectory")[-4:] == ["1/4", "2/4", "3/4", "4/4"]
    assert counted(text, "distil", "step")[-4:] == ["1/4", "2/4", "3/4", "4/4"]
    assert counted(text, "evaluate", "chain")[-4:] == ["1/4", "2/4", "3/4", "4/4"]
    assert len(re.findall(r"distil: step \d/4 \(\d+ %\), loss ", text)) == 4
    assert "experts: trajectory 0/4 (8 %), " in text  # the first epoch of three
    assert "evaluate: chain 0/4 (1 %), " in text  # the first sample of two: 60 of 840 images, predictions included


def test_lines_of_a_table(small, tmp_path, capsys, every_line):
    words = ["table1", "--cifar10", "digits", "--ipc", "1", "--only", "Random", "--distill-seeds", "1", "--num-chains",
             "2", "--override", "width=8", "chain_epochs=4", "chain_every=2", "--out", str(tmp_path / "out"),
             "--backend", "serial", "--no-tracking"]  # fmt: skip
    main.main(["reproduce", *words])
    text = capsys.readouterr().out
    assert counted(text, "distil", "coreset")[-1] == "1/1"
    assert counted(text, "evaluate", "chain")[-2:] == ["1/2", "2/2"]


def test_lines_of_a_sweep(small, tmp_path, capsys, every_line):
    base = small.updated(validation=0.1, out=str(tmp_path / "sweep"), steps=4)
    result = tuning._prepare(base, Sweep(grid=("alpha=1,10",)), tmp_path / "sweep", False, False, False)
    board = monitor.SweepMonitor(result, NullTracker(), None)
    board.start()
    for number, step in ((0, 1), (1, 1), (0, 4)):
        board.trial_validated(number, ValidationResult(step, 1.0, 0.5, 0.1, 0.2, []))
    board.close_bar()
    assert counted(capsys.readouterr().out, "sweep", "step") == ["1/8", "2/8", "5/8"]


@pytest.mark.slow
def test_the_first_line_comes_before_torch_is_imported(tmp_path):
    """Within 2 s of CPU; here by the order of the lines: `loading` stands before what Python says of torch's import."""
    words = [sys.executable, "-X", "importtime", "-u", "-m", "fbpc_ray", "distill", "--dry-run", "--data", "digits"]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    first = lines.index("loading torch ...")
    assert not any(re.search(r"\| +(torch|ray|mlflow)(\.|$)", line) for line in lines[:first])
    assert any(re.search(r"\| +torch$", line) for line in lines[first:])
