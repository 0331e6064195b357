"""The commit that a result names."""

import subprocess
from pathlib import Path

import pytest

from fbpc_ray.core import provenance


def test_a_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is not in the repository, such as a run's, makes no difference."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fbpc_ray" / "core" / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str:
        return provenance.capture("cpu").commit

    assert commit() == "unknown"
    (tmp_path / "a.py").write_text("one")
    git("init")
    git("add", "a.py")
    git("commit", "--no-gpg-sign", "-m", "first")
    (tmp_path / "run.json").write_text("{}")
    head = git("rev-parse", "HEAD")[:12]
    assert commit() == head
    (tmp_path / "a.py").write_text("two")
    assert commit() == f"{head}+changes"
