"""Folders of runs that name none."""

import re

from fbpc_ray.core.provenance import new_output, without_folders


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    monkeypatch.setattr("fbpc_ray.core.provenance.datetime", _Clock)
    folders = []
    for _ in range(3):
        folders.append(new_output("fbpc", "folder:data/my-images", 10))
        folders[-1].mkdir(parents=True)
    assert [folder.name for folder in folders] == [
        f"20261129-164223-fbpc-my-images-ipc10{end}" for end in ("", "-2", "-3")
    ]
    assert folders[0].parent == tmp_path / "outputs"


def test_the_folder_is_named_by_the_time(tmp_path, monkeypatch):
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    assert re.fullmatch(r"\d{8}-\d{6}-tune-digits-ipc1", new_output("tune", "digits", 1).name)


def test_data_is_named_without_folders_and_the_current_folder_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "pets" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pets")
    names = {"digits": "digits", "folder:/a/cats": "folder:cats", "folder:.": "folder:pets", "folder:./": "folder:pets"}
    assert {data: without_folders(data) for data in names} == names
    monkeypatch.chdir("train")
    assert without_folders("folder:..") == "folder:pets"
    assert new_output("fbpc", "folder:..", 1).name.endswith("-fbpc-pets-ipc1")


class _Clock:
    """Stands still."""

    @staticmethod
    def now():
        from datetime import datetime

        return datetime(2026, 11, 29, 16, 42, 23)
