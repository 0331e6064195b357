"""Flags and files that no run can use: one line, status 2, at once; a number has an upper end too."""

import errno
import io
import math
import os
import sys
from dataclasses import fields

import pytest
from support.runs import foreign_flags, refused

from fbpc_ray.commands import main
from fbpc_ray.commands.arguments import KINDS
from fbpc_ray.core import files, progress
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError, escape_controls
from fbpc_ray.core.ranges import OF_COMMANDS, RANGES, check_flags
from fbpc_ray.core.storage import place
from fbpc_ray.models import custom

HUGE = "1" + "0" * 400


@pytest.mark.parametrize("name", RANGES)
def test_a_number_beyond_any_use_is_refused_with_its_flag(name):
    for value in (10**400, 10**35, 1e300, math.inf, math.nan):
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: must be "):
            check_flags({name: value})


GROUPS = ["image_size", "width", "expert_lr", "chain_epochs", "prefetch", "val_every"]
"""A number of each other group of settings than that of steps and alpha."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("steps", "alpha") for value in (HUGE, "1" + "0" * 35, "1e300", "nan")),
        *((name, HUGE) for name in GROUPS),
    ],
)
def test_so_it_is_on_the_command_line(name, value, capsys):
    flag = f"--{name.replace('_', '-')}"
    assert refused(capsys, flag, value).startswith(f"error: {flag}: must be ")


def test_each_group_of_settings_is_tried_on_the_command_line():
    groups = [{field.name for field in fields(group)} for group in vars(Config()).values()]
    numbers = [names & RANGES.keys() for names in groups]
    assert all(names & {"steps", "alpha", *GROUPS} for names in numbers if names)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("distill", ["--draws-per-step", "100000000"]),
        ("distill", ["--real-batch-size", "10000000000000"]),
        ("distill", ["--threads", "100000"]),
        ("distill", ["--seed", HUGE]),
        ("distill", ["--ipc", "1" + "0" * 5000]),
        ("distill", ["--ipc", "²"]),
        ("distill", ["--start-epoch", HUGE]),
        ("tune", ["--num-trials", HUGE]),
        ("tune", ["--val-chains", "0"]),
        ("reproduce", ["table1", "--cost-steps", HUGE]),
        ("reproduce", ["table1", "--ipc", "1", HUGE]),
        ("evaluate", ["run", "--width", HUGE]),
        ("ui", ["--port", "65536"]),
    ],
)
def test_a_number_beyond_any_use_is_refused_by_each_command(command, words, capsys):
    flag = next(word for word in words if word.startswith("--"))
    assert refused(capsys, *words, command=command).startswith(f"error: {flag}: must be ")


def test_the_ranges_allow_what_the_defaults_and_the_paper_are():
    assert not set(RANGES) & set(OF_COMMANDS)
    for allowed in (*RANGES.values(), *OF_COMMANDS.values()):
        assert not allowed.holds(float("nan"))
        assert not allowed.holds(float("inf"))
        assert not allowed.holds(10**400)
        assert not allowed.holds(-1)
        assert allowed.holds(0.5 if allowed.most <= 1 else 1)


@pytest.mark.parametrize(
    "text", ["a\0b", "n" * 256, "/".join(["n" * 250] * 20), "~nobody-here/x", "caf\udce9", "\ud800"]
)
def test_names_that_no_file_can_have_are_one_line(text, capsys):
    with pytest.raises(UserError):
        place(text)
    for words in (["--out", text], ["--preset", f"{text}/x.json"], ["--json", text, "--out", "x", "--dry-run"]):
        assert refused(capsys, *words)
    assert refused(capsys, text, command="evaluate")
    assert refused(capsys, text, "--format", "npz", command="export")


def test_a_folder_or_a_fifo_in_the_place_of_a_preset_or_a_result_is_one_line(tmp_path, capsys):
    (tmp_path / "a.json").mkdir()
    os.mkfifo(tmp_path / "b.json")
    for name, kind in (("a.json", "a folder"), ("b.json", "a FIFO")):
        line = refused(capsys, "--preset", str(tmp_path / name))
        assert line == f"error: {tmp_path / name}: must be a regular file, is {kind}; check the path"
    assert "--json" in refused(capsys, "--json", str(tmp_path / "a.json"))


@pytest.mark.parametrize("text", ['{"steps": 1e400}', f'{{"steps": {HUGE}}}', '{"alpha": Infinity}', "[" * 99999])
def test_a_preset_beyond_the_limits_is_one_line(text, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert refused(capsys, "--preset", str(tmp_path / "a.json")).startswith(f"error: {tmp_path / 'a.json'}")


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), type("Own", (BaseException,), {})("no")])
def test_an_own_network_that_ends_the_program_is_one_line_and_status_1(error):
    with pytest.raises(UserError) as caught, custom.user_code("nets:build"):
        raise error
    assert caught.value.code == 1
    assert "--architectures nets:build fails" in str(caught.value)
    with pytest.raises(KeyboardInterrupt), custom.user_code("nets:build"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR]
)
def test_an_error_of_the_disk_is_one_line(number, capsys, tmp_path):
    def fail(words):
        raise OSError(number, os.strerror(number), str(tmp_path / "a"))

    with pytest.raises(SystemExit) as left:
        main.run(fail, ["export"])
    assert left.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {os.strerror(number)} ({tmp_path / 'a'}): ")
    assert line.count("\n") == 1
    assert "--resume" not in line  # export has no such flag


@pytest.mark.parametrize("words", ["run the same command with --resume", "run again with --resume"])
def test_what_workers_say_names_resume_where_the_command_has_it(words, capsys):
    def fail(_):
        raise UserError(f"Ray lost a task (a node died): {words}", code=1)

    for command, advice in (("tune", words), ("evaluate", "run the same command again")):
        with pytest.raises(SystemExit):
            main.run(fail, [command, "RUN"])
        line = capsys.readouterr().err.strip()
        assert line == f"error: Ray lost a task (a node died): {advice}"
        assert not foreign_flags(line, command)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_names_out_where_the_command_has_it(number, capsys):
    def fail(_):
        raise OSError(number, os.strerror(number))

    for command in KINDS:
        with pytest.raises(SystemExit):
            main.run(fail, [command])
        line = capsys.readouterr().err.strip()
        assert "choose a writable folder" in line
        assert ("--out" in line) == (command in ("distill", "tune", "export", "reproduce", "report"))


def test_a_full_disk_says_resume_only_once_there_is_a_run(capsys, tmp_path):
    def fail(words):
        raise OSError(errno.ENOSPC, "No space left on device")

    def line(*words):
        with pytest.raises(SystemExit):
            main.run(fail, words)
        return capsys.readouterr().err

    for words in (("distill", "--out", str(tmp_path)), ("distill", f"--out={tmp_path}"), ("--out", str(tmp_path))):
        assert "run the same command again" in line(*words)
    (tmp_path / "config.json").write_text("{}")
    for words in (("distill", "--out", str(tmp_path)), ("distill", f"--out={tmp_path}"), ("--out", str(tmp_path))):
        assert "run the same command with --resume" in line(*words)
    assert "run the same command again" in line("experts", "--out", str(tmp_path))


def test_errors_print_names_escaped(capsys):
    def fail(words):
        raise UserError("bad\n\x1b[31mname\x7f\x9b\u2028caf\udce9 日本: fix it")

    with pytest.raises(SystemExit):
        main.run(fail, [])
    assert capsys.readouterr().err == "error: bad\\n\\x1b[31mname\\x7f\\x9b\\u2028caf\\udce9 日本: fix it\n"
    assert escape_controls("a\tb\nc\x1b", exempt="\n\t") == "a\tb\nc\\x1b"


def test_a_command_that_logs_to_stderr_leaves_standard_output_to_the_next(capsys):
    main.run(lambda words: progress.log_to_stderr(True), [])
    progress.log("next")
    assert capsys.readouterr().out == "next\n"


def test_an_ascii_terminal_gets_escapes(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii", newline="") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    main.run(lambda words: progress.log("run: /tmp/日本"), [])
    with pytest.raises(SystemExit):
        main.run(lambda words: main._exit("é", 1), [])
    for stream in streams:
        stream.flush()
    assert streams[0].buffer.getvalue() == b"run: /tmp/\\u65e5\\u672c\n"
    assert streams[1].buffer.getvalue() == b"error: \\xe9\n"


def test_json_is_written_through_what_is_no_file(tmp_path, capsys):
    """A device, a link and a FIFO stay; without a reader of the FIFO it is one line."""
    (tmp_path / "device").symlink_to("/dev/null")
    files.write_output(str(tmp_path / "device"), {"a": 1})
    assert (tmp_path / "device").is_symlink()
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    files.write_output(str(tmp_path / "link"), {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == '{\n  "a": 1\n}\n'
    (tmp_path / "new").symlink_to("made")
    files.write_output(str(tmp_path / "new"), [])
    assert (tmp_path / "made").read_text() == "[]\n"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="nobody reads this FIFO"):
        files.write_output(str(tmp_path / "fifo"), {})
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    files.write_output(str(tmp_path / "fifo"), {"a": 1})
    assert os.read(reader, 100) == b'{\n  "a": 1\n}\n'
    os.close(reader)
    files.write_output("-", {"a": 1})
    assert capsys.readouterr().out == '{\n  "a": 1\n}\n'
    files.write_output("", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "fifo", "link", "made", "new", "target"]
