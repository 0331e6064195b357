"""`fbpc doctor`: each thing that can be missing or broken is a line with its fix, and never a traceback."""

import os
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Literal

import pytest

from fbpc_ray.commands import doctor, doctor_places, main
from fbpc_ray.commands.doctor import Library, cuda_finding, try_library
from fbpc_ray.commands.doctor_places import Finding, token_finding

ROOT = Path(__file__).parents[2]


def module(folder: Path, name: str, code: str) -> None:
    """A library that stands before the one that is installed."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)


def run(*words: str, **environment: str) -> tuple[int, dict[str, str], str]:
    """(exit status, {the word after the state, without colon: its line}, all that was printed) of the command."""
    process = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    lines = {line.split()[1].strip(":,"): line for line in process.stdout.splitlines() if line[:6].strip() in STATES}
    return process.returncode, lines, process.stdout + process.stderr


STATES = ("ok", "note", "fix")
QUICK = ("numpy", "torch", "torchvision", "ray", "mlflow", "pyarrow", "matplotlib", "safetensors", "sklearn", "PIL")


def test_broken_libraries_are_lines_and_the_status_says_so(tmp_path):
    """Each in its own way: an exception of several lines, a process that dies, one that is not there, a wrong answer.
    By `python -m fbpc_ray.commands.doctor`, which needs none of them."""
    for name in QUICK:
        module(tmp_path / "before", name, "")
    module(tmp_path / "before", "safetensors", "import os; os.abort()")
    module(tmp_path / "before", "torchvision", "raise RuntimeError('line\\noperator torchvision::nms does not exist')")
    module(tmp_path / "before", "ray", "import nothing_of_this_name")
    module(tmp_path / "before", "mlflow", "import sys; print('secret'); sys.exit(3)")
    for name in ("tyro", "filelock"):
        module(tmp_path / "before", name, f"raise ImportError('no {name}')")
    places = {"HOME": str(tmp_path), "FBPC_HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}/before:{ROOT}"}
    status, lines, printed = run("-m", "fbpc_ray.commands.doctor", "--deep", **places)
    assert status == 1 and "Traceback" not in printed and "to fix" in printed
    assert lines["safetensors"].startswith("fix") and "signal 6" in lines["safetensors"]
    assert lines["torch"].startswith("fix") and "no attribute" in lines["torch"]
    assert lines["torchvision"].startswith("fix") and "nms does not exist" in lines["torchvision"]
    assert "pair" in lines["torchvision"]
    assert lines["ray"].startswith("note") and "nothing_of_this_name" in lines["ray"] and "serial" in lines["ray"]
    assert lines["mlflow"].startswith("note") and "untracked" in lines["mlflow"] and "secret" not in printed
    for name in ("tyro", "filelock"):
        assert lines[name].startswith("fix") and f"no {name}" in lines[name]
    assert lines["tqdm"].startswith("ok") and lines["Python"].startswith("ok")
    assert lines["CUDA"].startswith("note")
    assert not list(tmp_path.glob(".fbpc-doctor*"))


def finding_of(library: Library, lowest: str, seconds: float = doctor.DEEP_SECONDS) -> doctor.Finding:
    finding = try_library(library, lowest, seconds)
    assert finding
    return finding


@pytest.mark.slow
def test_what_is_installed_here_works():
    """The libraries that hold the bits, in their own processes; nms is really called."""
    bounds = doctor.requirements()
    for library in doctor.LIBRARIES:
        if library.name in ("torchvision", "pyarrow"):
            line = finding_of(library, bounds[library.name])
            assert line.state == "ok", line
            assert ("compiled operators run" in line.message) == (library.name == "torchvision")


def test_lowest_versions_are_those_of_the_project(monkeypatch):
    """Read beside the code, and where that isn't, from what was installed; each important library has one."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = doctor.requirements()
    assert (
        bounds["torch"]
        == next(requirement for requirement in wanted if requirement.startswith("torch>")).partition(">=")[2]
    )
    assert (
        bounds["ray"]
        == next(requirement for requirement in wanted if requirement.startswith("ray[")).partition(">=")[2]
    )
    assert {library.name for library in doctor.LIBRARIES} == set(bounds)
    monkeypatch.setattr(doctor, "__file__", "/nowhere/fbpc_ray/commands/doctor.py")
    assert set(doctor.requirements()) == set(bounds), "not the extras of who develops it"


def test_old_and_missing_libraries():
    ok = Library("pyarrow", "pass")
    assert finding_of(ok, "1.0").state == "ok"
    line = finding_of(ok, "999.1")
    assert line.state == "fix" and "older than 999.1" in line.message and "pip install 'pyarrow>=999.1'" in line.fix
    line = finding_of(Library("no-such-library", "pass", "goes without"), "1.0")
    assert line.state == "note" and "not installed; goes without" in line.message and "no-such-library>=1.0" in line.fix
    assert finding_of(Library("pyarrow", "1 / 0"), "").message.endswith(
        "does not work (ZeroDivisionError: division by zero)"
    )
    assert doctor._numbers("2.14.1+cu128") == (2, 14, 1) > doctor._numbers("2.9") and doctor._numbers("3.0") == (3,)


def test_a_library_that_hangs_is_broken_or_the_machine_is_busy():
    hanging = Library("pyarrow", "import time; time.sleep(60)")
    line = finding_of(hanging, "", seconds=0.5)
    assert line.state == "fix" and "no answer" in line.message
    assert try_library(hanging, "", seconds=0.5, deep=False) is None


def test_without_deep_every_library_is_reported_within_a_time(monkeypatch):
    """Whatever hangs: Ray and the compiler are not tried; the libraries have one time together, and one note."""
    hanging = [entry._replace(code="import time; time.sleep(300)") for entry in doctor.LIBRARIES]
    start_process, given = doctor._run, dict[int, float]()

    def run_and_count(code: str, seconds: float) -> tuple[str, str]:
        thread = threading.get_ident()
        given[thread] = given.get(thread, 0.0) + max(seconds, 0.0)
        return start_process(code, seconds)

    monkeypatch.setattr(doctor, "_run", run_and_count)
    monkeypatch.setattr(doctor, "LIBRARIES", hanging)
    monkeypatch.setattr(doctor, "CUDA", hanging[0].code)
    monkeypatch.setattr(doctor, "SECONDS", 1.0)
    monkeypatch.setattr(doctor, "_compiler_error", lambda program: pytest.fail("compiled"))
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/bin/{program}")
    lines = {line.message.split()[0].strip(":"): line for line in doctor.findings()}
    assert len(given) == 2 and max(given.values()) <= 1 + 1e-6  # the seconds that each thread may wait, in all
    assert lines["ray"].state == "ok" and "--deep imports it" in lines["ray"].message
    assert lines["C++"].state == "ok" and "--deep" in lines["C++"].message
    names = [library.name for library in hanging if library.name != "ray"]
    note = lines["numpy,"]
    assert note.state == "note" and note.fix == "fbpc doctor --deep waits longer"
    assert note.message == f"{', '.join(names)}: no answer within 1 s for all libraries together, the machine is busy"
    assert lines["CUDA"].state == "note" and "no answer within" in lines["CUDA"].message


def test_the_time_for_all_is_within_15_seconds():
    assert doctor.SECONDS <= 12  # and the start of Python, and the other checks


@pytest.mark.parametrize(
    ("built", "devices", "error", "here", "state", "message"),
    [
        (None, [], "", False, "note", "use the CPU"),
        (None, [], "", True, "note", "built without"),
        ("13.0", [], "", False, "note", "no GPU here"),
        ("13.0", [], "Found no NVIDIA driver on your system", False, "note", "no GPU here"),
        ("13.0", ["NVIDIA H100, 85 GB"], "", True, "ok", "H100"),
        ("13.0", [], "driver too old", True, "fix", "driver too old"),
        ("13.0", ["K80, 12 GB"], "no kernel image", True, "fix", "no kernel image"),
    ],
)
def test_what_torch_makes_of_gpus(built, devices, error, here, state, message):
    line = cuda_finding({"built": built, "torch": "2.14.1", "devices": devices, "error": error}, here)
    assert line.state == state and message in str(line)


def compiler() -> Finding:
    (finding,) = doctor.compiler()
    return finding


def test_the_compiler_is_tried(monkeypatch, tmp_path):
    """One that works, one that isn't there, one that fails: without it runs go on, so it's a note."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler().state == "note" and "no-such-compiler not found" in compiler().message
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'omp.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert compiler().state == "note" and "omp.h: No such file" in compiler().message
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++ not found" in compiler().message


def test_folders_that_cannot_be_used(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("FBPC_HOME", "/proc/nowhere")
    monkeypatch.setenv("FBPC_CACHE", str(tmp_path / "shared"))
    monkeypatch.setattr(doctor_places, "LOW_SPACE", 0)  # a disk that has little would be another note
    monkeypatch.setattr(doctor_places, "NO_SPACE", 0)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    home, runs, cache, _ = doctor_places.folders()
    assert home.state == "note" and "is not writable" in home.message
    assert runs.state == "fix" and "/proc/nowhere" in runs.message and "FBPC_HOME" in runs.fix
    assert cache.state == "note" and "others can write" in cache.message and "chmod" in cache.fix
    (tmp_path / "shared").chmod(0o700)
    assert list(doctor_places.folders())[2].state == "ok"
    (tmp_path / "shared" / "compiled").mkdir()
    (tmp_path / "shared" / "compiled").chmod(0o770)
    assert "shared/compiled" in list(doctor_places.folders())[2].fix
    monkeypatch.setenv("FBPC_HOME", "s3://bucket/x")
    monkeypatch.setenv("FBPC_CACHE_GB", "many")
    monkeypatch.setenv("HOME", str(tmp_path / "made" / "later"))
    home, runs, cache, _ = doctor_places.folders()
    assert home.state == "ok" and not (tmp_path / "made").exists()
    assert runs.state == "fix" and "local folder" in str(runs)
    assert cache.state == "fix" and "'many'" in cache.message


def test_a_folder_for_temporary_files_that_is_still_to_be_made(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not" / "there"))
    finding = doctor_places.temporary_finding()
    assert finding.message.startswith("temporary files: ") and str(tmp_path / "not" / "there") in finding.message


def test_a_disk_without_room(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_places, "LOW_SPACE", 1e18)
    assert doctor_places.folder_finding("runs", tmp_path, "fix", "elsewhere").state == "note"
    monkeypatch.setattr(doctor_places, "NO_SPACE", 1e18)
    assert doctor_places.folder_finding("runs", tmp_path, "fix", "elsewhere").state == "fix"


def test_the_token_of_ray(monkeypatch, tmp_path):
    """None of it is printed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_finding({}).state == "note"
    assert token_finding({"RAY_AUTH_MODE": "token"}).state == "fix"
    assert token_finding({"RAY_AUTH_MODE": "tokne"}).state == "fix"
    assert token_finding({"RAY_AUTH_MODE": "disabled"}).state == "note"
    assert token_finding({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "s3cret"}).state == "ok"
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("s3cret")
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert token_finding({"RAY_AUTH_MODE": "token"}).state == "ok"
    assert "export RAY_AUTH_MODE=token" in str(token_finding({}))
    file.chmod(0o644)
    assert "chmod 600" in token_finding({"RAY_AUTH_MODE": "token"}).fix
    file.write_text(" \n")
    assert token_finding({"RAY_AUTH_MODE": "token"}).state == "fix"
    every = [token_finding({"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "s3cret"}) for mode in ("", "token", "disabled")]
    assert not any("s3cret" in str(line) for line in every)


def test_a_line_is_one_line():
    line = Finding("fix", "a\nb", "c\td")
    assert str(line) == "fix   a b: c d"


def test_the_command_exits_with_the_status(monkeypatch, capsys):
    """0 where nothing must be fixed, notes or not; 1 else."""
    cases: list[tuple[Literal["ok", "note", "fix"], int]] = [("ok", 0), ("note", 0), ("fix", 1)]
    for state, status in cases:
        lines = [Finding(state, "it", "how")]
        monkeypatch.setattr(doctor, "findings", lambda deep, lines=lines: iter(lines))
        with pytest.raises(SystemExit) as end:
            main.main(["doctor"])
        assert end.value.code == status
        assert f"{state:<6}it: how" in capsys.readouterr().out
