"""Files that nobody sweeps as long as they are written, and a folder that one process at a time writes to."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.processes import raised_at_once

from fbpc_ray.commands import main
from fbpc_ray.core import cache, files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.storage import place
from fbpc_ray.distillation.run_directory import RunDirectory


def test_a_folder_has_one_process_at_a_time(tmp_path):
    folder = tmp_path / "a" / "run"
    with files.exclusive_directory(folder):
        (folder / "kept").write_text("x")
        with (
            pytest.raises(UserError, match=r"another process uses .*/a/run: wait until it ends"),
            files.exclusive_directory(folder),
        ):
            pass
        code = (
            "import sys; from pathlib import Path; from fbpc_ray.core import files\n"
            "with files.exclusive_directory(Path(sys.argv[1])): print('in')"
        )
        process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        assert "UserError: another process" in process.stderr
        assert (folder / files.LOCK).exists()  # those that were refused have not removed it
    assert [entry.name for entry in folder.iterdir()] == ["kept"]
    process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert process.stdout == "in\n"


def test_what_a_killed_process_left_keeps_nobody_out_and_an_empty_folder_goes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / files.LOCK).touch()
    with files.exclusive_directory(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_file_that_was_removed_while_it_was_opened_is_opened_again(tmp_path, monkeypatch):
    """Another process ends between our opening the file and our locking it: the lock is on the file that is there."""
    path, lock = tmp_path / files.LOCK, files.fcntl.flock
    calls = []

    def late(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.exclusive_directory(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another process"), files.exclusive_directory(tmp_path):
            pass


def test_a_folder_whose_last_user_takes_it_away_is_made_again(tmp_path):
    """Eight threads, each with its turn in a folder that is empty in the end, and so goes: all get it, or are told."""
    turns = []

    def take():
        for _ in range(200):
            with contextlib.suppress(UserError), files.exclusive_directory(tmp_path / "run"):
                turns.append(1)

    assert not raised_at_once(take, 8)
    assert turns
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file/run", "link"])
@pytest.mark.parametrize("flag", ["--out", "--experts"])
def test_a_file_in_the_place_of_a_folder_is_one_line(flag, place, tmp_path, monkeypatch, capsys):
    """A file where a folder should be, and a link to nowhere; both are still there afterwards."""
    monkeypatch.setenv("FBPC_HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    words = [flag, str(tmp_path / place), "--backend", "serial", "--no-tracking", "--expert-count", "1"]
    with pytest.raises(SystemExit) as stop:
        main.main(["distill", *words])
    assert stop.value.code in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(rf"error: .*{tmp_path / place.partition('/')[0]}.*: (choose|give|there is) ", line)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "nowhere").exists()


def test_a_file_is_not_swept_while_it_is_written_and_is_after_its_writer_was_killed(tmp_path):
    path = tmp_path / ".a.tmp"
    with files.locked_temp_file(path) as file:
        files.remove_stale_temp_files(tmp_path, ".*.tmp")
        file.write(b"all of it")
        files.remove_stale_temp_files(tmp_path, ".*.tmp")
    assert path.read_bytes() == b"all of it"
    files.remove_stale_temp_files(tmp_path, ".*.tmp")
    assert not path.exists()


def test_a_sweep_between_a_files_making_and_its_lock_costs_nothing(tmp_path):
    """One thread sweeps without a pause: now and then it comes between the two, or has the lock that we want."""
    over = threading.Event()

    def sweep():
        while not over.is_set():
            files.remove_stale_temp_files(tmp_path, ".*.tmp")

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for index in range(2000):
            path = tmp_path / f".{index}.tmp"
            with files.locked_temp_file(path) as file:
                file.write(b"x")
                path.replace(tmp_path / "whole")
    finally:
        over.set()
        sweeper.join()
    assert (tmp_path / "whole").read_bytes() == b"x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]


def test_an_object_store_keeps_nobody_out():
    with files.exclusive_directory(place("s3://bucket/run")), files.exclusive_directory(place("s3://bucket/run")):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    """flock fails with the errors of NFS without locks and of FUSE: the blocks run, and no soft lock file stays."""
    for number in files.NO_LOCKS:

        def fail(file, how, number=number):
            raise OSError(number, "no locks")

        monkeypatch.setattr(files.fcntl, "flock", fail)
        with files.exclusive_directory(tmp_path / "run"), files.exclusive_directory(tmp_path / "run"):
            (tmp_path / "run" / "kept").touch()
        with files.file_lock(tmp_path / "a"), files.file_lock(tmp_path / "a", shared=True):
            pass
        with files.locked_temp_file(tmp_path / ".b.tmp") as file:
            file.write(b"x")
        files.remove_stale_temp_files(tmp_path, ".*.tmp")
        assert (tmp_path / ".b.tmp").exists()
        (tmp_path / ".b.tmp").unlink()


def test_a_lock_waits_for_its_holder_and_shared_ones_do_not_wait_for_each_other(tmp_path):
    """A second process gets the lock when the first is killed; two shared locks are held at once."""
    code = (
        "import sys, time; from pathlib import Path; from fbpc_ray.core import files\n"
        "with files.file_lock(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "in\n"
    entered = []

    def wait():
        with files.file_lock(tmp_path / "a"):
            entered.append(1)

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiter.join(0.3)
    assert not entered
    holder.kill()
    holder.wait()
    holder.stdout.close()
    waiter.join(300)
    assert entered
    with files.file_lock(tmp_path / "a", shared=True), files.file_lock(tmp_path / "a", shared=True):
        pass


def test_a_folder_is_trusted_if_nobody_else_can_change_it_or_put_another_in_its_place(tmp_path):
    """Folders of a sticky one, such as /tmp, are; a link of another user there, or an ancestor open to all, is not."""
    path = tmp_path / "a" / "b" / "c" / "compiled"
    path.mkdir(parents=True, mode=0o700)
    assert cache.open_to_others(path) is None
    for folder, mode in ((path, 0o770), (path, 0o1777), (path.parent, 0o775), (tmp_path / "a", 0o777)):
        before = folder.stat().st_mode
        folder.chmod(mode)
        assert cache.open_to_others(path) == folder
        folder.chmod(before)
    (tmp_path / "a").chmod(0o1777)
    assert cache.open_to_others(path) is None
    (tmp_path / "link").symlink_to(path)
    assert cache.open_to_others(tmp_path / "link" / "below") is None
    if os.geteuid() == 0:
        os.lchown(tmp_path / "link", 12345, 12345)
        assert cache.open_to_others(tmp_path / "link" / "below") == tmp_path / "link"


def test_scratch_files_of_killed_writers_are_removed_at_the_next_start(tmp_path):
    for name in (".result.json.0f.tmp", "checkpoint/.state.safetensors.0f.tmp", "coreset/.coreset.safetensors.0f.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.tmp").write_text("x")
    RunDirectory(tmp_path).remove_leftovers()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.tmp"]


def test_a_folder_of_a_killed_writer_is_removed_and_that_of_a_live_one_stays(tmp_path):
    """And what has another name, or is a link."""
    target = tmp_path / "export[1]"
    for name in (".export[1].0f0f.tmp", ".export[1].png.tmp/deep", ".export1.0f0f.tmp", "export[1].0f0f.tmp"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".export[1].file.tmp").write_text("half")
    (tmp_path / ".export[1].link.tmp").symlink_to(tmp_path / ".export1.0f0f.tmp")
    with files.locked_temp_folder(tmp_path / ".export[1].live.tmp") as live:
        (live / "a").write_text("x")
        files.remove_leftovers_of(target)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {".export[1].live.tmp", ".export[1].link.tmp", ".export1.0f0f.tmp", "export[1].0f0f.tmp"}
        assert (live / "a").read_text() == "x"


def test_a_file_that_is_written_is_not_swept(tmp_path, monkeypatch):
    """Not until it has its name."""
    replace = Path.replace

    def sweep_first(path, target):
        files.remove_leftovers_of(tmp_path / "x")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", sweep_first)
    files.write_bytes(tmp_path / "x", b"all of it")
    assert (tmp_path / "x").read_bytes() == b"all of it"
