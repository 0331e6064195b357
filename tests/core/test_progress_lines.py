"""Progress where there is no terminal: at most a line each 30 s, at least one each minute, by a fake clock."""

import io
import itertools
import os
import pty
import re
import sys
import termios
import time

import pytest

from fbpc_ray.core import progress
from fbpc_ray.core.progress import Progress, Watch


class FakeClock:
    """A clock that a test moves; `lines` are what was written, each with its time."""

    def __init__(self) -> None:
        self.now, self.lines = 0.0, list[tuple[float, str]]()
        self.watch = Watch(lambda: self.now, threaded=False)

    def log(self, line: str) -> None:
        self.lines.append((self.now, line))
        self.watch.printed()

    def open(self, what: str, total: int | None, unit: str, done: int = 0) -> Progress:
        return Progress(what, total, unit, done, log=self.log, watch=self.watch)

    def wait(self, seconds: float) -> None:
        """Let the time pass, with a look at the clock each second, as the thread takes it."""
        for _ in range(int(seconds)):
            self.now += 1
            self.watch.tick()

    @property
    def longest_silence(self) -> float:
        times = [0.0, *(when for when, _ in self.lines), self.now]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_a_line_says_step_loss_rate_and_time_left(clock):
    """40 steps of 4 s: 8 of 40 after 32 s, 32 of them left; 55 s later, in the ninth step, as much less is left."""
    work = clock.open("distil", 40, "step")
    for number in range(1, 9):
        clock.wait(4)
        work.update(loss=f"{number / 10:.3f}")
    assert clock.lines == [(32.0, "distil: step 8/40 (20 %), loss 0.800, 4 s/step, 2 min 8 s left")]
    clock.wait(55)
    assert clock.lines[1:] == [(87.0, "distil: step 8/40 (20 %), loss 0.800, 4 s/step, 1 min 13 s left")]


def test_a_resumed_work_counts_its_own_steps_for_the_rate(clock):
    work = clock.open("distil", 40, "step", done=20)
    clock.wait(31)
    work.update(10)
    assert clock.lines == [(31.0, "distil: step 30/40 (75 %), 3.1 s/step, 31 s left")]


@pytest.mark.parametrize("seconds", [0.5, 1, 7, 29, 61, 600, 3600])
def test_a_long_work_is_never_silent_for_a_minute_nor_writes_twice_in_30_s(clock, seconds):
    """200 units of any length; those below a second are taken as pairs."""
    work = clock.open("experts", 200, "trajectory")
    count = max(1, round(1 / seconds))
    for _ in range(0, min(200, int(20000 / seconds)), count):
        clock.wait(seconds * count)
        work.update(count)
    times = [when for when, _ in clock.lines]
    assert clock.longest_silence < 60
    assert all(after - before >= 30 for before, after in itertools.pairwise(times))


def test_within_a_minute_lines_wait_for_5_percent(clock):
    """A hundred steps of 8 s: 30 s are 4 %, so each line is 5 steps after the one before; 20 s each: 55 s rule."""
    work = clock.open("distil", 100, "step")
    for _ in range(20):
        clock.wait(8)
        work.update()
    assert [when for when, _ in clock.lines] == [40, 80, 120, 160]
    slow = FakeClock()
    work = slow.open("distil", 1000, "step")
    for _ in range(20):
        slow.wait(20)
        work.update()
    assert [when for when, _ in slow.lines] == [55, 110, 165, 220, 275, 330, 385]


def test_before_the_first_unit_ends_the_seconds_are_shown(clock):
    clock.open("evaluate", 6, "chain")
    clock.wait(120)
    assert clock.lines == [
        (55.0, "evaluate: chain 0/6 (0 %), 55 s so far"), (110.0, "evaluate: chain 0/6 (0 %), 1 min 50 s so far"),
    ]  # fmt: skip


def test_the_share_of_a_running_unit_counts(clock):
    """Half a chain in 50 s: 100 s a chain, 3.5 to go."""
    work = clock.open("evaluate", 4, "chain")
    clock.wait(50)
    work.set_part(0.5)
    assert clock.lines == [(50.0, "evaluate: chain 0/4 (12 %), 100 s/chain, 5 min 50 s left")]
    clock.wait(10)
    work.update()
    assert work.done == 1
    assert work.line(clock.now) == "evaluate: chain 1/4 (25 %), 60 s/chain, 3 min left"


def test_slow_units_have_whole_seconds(clock):
    work = clock.open("distil", 3, "coreset")
    clock.wait(4321)
    work.update()
    assert clock.lines[-1] == (4321.0, "distil: coreset 1/3 (33 %), 4,321 s/coreset, 2 h 24 min left")


def test_of_works_inside_each_other_the_innermost_writes(clock):
    """A validation inside a distillation; afterwards the distillation, whose line is overdue, goes on."""
    outer = clock.open("distil", 10, "step")
    clock.wait(20)
    inner = clock.open("evaluate", 2, "chain")
    clock.wait(60)
    inner.close()
    clock.wait(1)
    outer.close()
    assert [(when, line.split(":")[0]) for when, line in clock.lines] == [(55.0, "evaluate"), (81.0, "distil")]


def test_short_works_one_after_the_other_are_no_silence(clock):
    for _ in range(10):
        work = clock.open("evaluate", 2, "chain")
        clock.wait(20)
        work.close()
    assert clock.longest_silence < 60


def test_a_work_of_unknown_size_counts(clock):
    work = clock.open("photos: files seen", None, "file")
    work.update(640)
    clock.wait(31)
    work.update(10)
    assert clock.lines == [(31.0, "photos: files seen: 650 so far")]


def test_a_command_fills_the_minutes_in_which_nothing_is_printed(clock):
    """Such as while Ray starts; other lines count."""
    progress._Command("", None, "", log=clock.log, watch=clock.watch)
    clock.wait(50)
    clock.log("Ray has started")
    clock.wait(60)
    assert clock.lines[1:] == [(105.0, "still working, 1 min 45 s since the start")]


def test_the_thread_writes_while_the_work_reports_nothing(monkeypatch):
    """The real thread and the real clock, with short times."""
    monkeypatch.setattr(progress, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.05)
    lines: list[str] = []
    with Progress("experts", 2, "trajectory", log=lines.append, watch=Watch()):
        deadline = time.monotonic() + 300
        while len(lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(lines) >= 2
    assert re.fullmatch(r"experts: trajectory 0/2 \(0 %\), (under a second|\d+ s) so far", lines[0])  # a busy machine
    count = len(lines)
    time.sleep(0.2)
    assert len(lines) == count


def test_a_terminal_without_columns_is_none(monkeypatch):
    reader_end, terminal_end = pty.openpty()
    with open(terminal_end, "w") as terminal:  # noqa: PTH123  a number
        for size, expected in (((24, 80), True), ((0, 0), False), ((24, 0), False)):
            termios.tcsetwinsize(terminal_end, size)
            assert progress.is_terminal(terminal) is expected
            monkeypatch.setattr(sys, "stdout", terminal)
            monkeypatch.setattr(sys, "stderr", terminal)
            with progress.progress("distil", 2, "step", log=lambda line: None) as work:
                assert (work._bar is not None) is expected
                assert (work._watch is None) is expected
    os.close(reader_end)
    assert not progress.is_terminal(io.StringIO())
    assert not progress.is_terminal(None)


def test_lines_go_to_a_file_beside_a_bar_on_the_terminal(monkeypatch):
    """`fbpc distill > log` at a terminal: the bar is standard error's, the lines are the file's."""
    reader_end, terminal_end = pty.openpty()
    termios.tcsetwinsize(terminal_end, (24, 80))
    with open(terminal_end, "w") as terminal:  # noqa: PTH123  a number
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        with progress.progress("distil", 2, "step") as work:
            assert work._bar is not None
            assert work._watch is not None
        monkeypatch.setenv("TQDM_DISABLE", "0")
        with progress.progress("distil", 2, "step") as work:
            assert work._bar is not None and work._watch is not None
        monkeypatch.setenv("TQDM_DISABLE", "1")
        with progress.progress("distil", 2, "step") as work:
            assert (work._bar, work._watch) == (None, None)
    os.close(reader_end)
