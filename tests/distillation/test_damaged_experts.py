"""Damaged experts: cut, changed and unreadable files are refused by name."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.errors import refusal
from support.experts import RECIPE, same, snapshot, trajectory

from fbpc_ray.core import cache, inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.expert_store import ExpertStore


def without_snapshot_checksums(path: Path) -> None:
    """Make a manifest one of an earlier release."""
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "snapshot_checksums"}))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, legacy):
    """Over the whole file, every fifth byte inverted: reading is right to the bit, or refused in one line."""
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    if legacy:
        without_snapshot_checksums(tmp_path / "00000.json")
    path = tmp_path / "00000.arrow"
    data = path.read_bytes()
    refused = 0
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        opened = ExpertStore(tmp_path, RECIPE)
        line = refusal(opened.verify, 0)
        assert str(path) in line and "delete it and run again" in line
        try:
            for epoch in range(4):
                assert same(opened.read(0, epoch), snapshot(0, epoch))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "delete it and run again" in str(error)
    assert refused > 30
    assert not legacy or refused == len(range(0, len(data), 5))
    path.write_bytes(data)
    ExpertStore(tmp_path, RECIPE).verify(0)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_file(tmp_path, legacy):
    """A file of another program, whose checksums are right."""
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    path, manifest = tmp_path / "00000.arrow", tmp_path / "00000.json"
    value = snapshot(0, 2)["temperature"].numpy()
    data = path.read_bytes()
    assert data.count(value.tobytes()) == 1
    path.write_bytes(data.replace(value.tobytes(), np.array(np.nan, np.float32).tobytes()))
    facts = json.loads(manifest.read_text())
    with path.open("rb") as file:
        facts["checksum"] = hashlib.file_digest(file, cache.digest).hexdigest()
    changed = snapshot(0, 2) | {"temperature": torch.tensor(float("nan"))}
    facts["snapshot_checksums"][2] = inputs.crc(tensor.numpy().tobytes() for tensor in changed.values())
    manifest.write_text(json.dumps(facts))
    if legacy:
        without_snapshot_checksums(manifest)
    opened = ExpertStore(tmp_path, RECIPE)
    assert refusal(opened.read, 0, 2) == (
        f"{path} is damaged (temperature is not finite at epoch 2): delete it and run again"
    )
    assert same(opened.read(0, 1), snapshot(0, 1))


@pytest.mark.parametrize("name", ["store.json", "00000.json", "00000.arrow"])
def test_a_fifo_or_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, name):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    (tmp_path / name).unlink()
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        assert f"{tmp_path / name}: must be a regular file" in refusal(lambda: ExpertStore(tmp_path, RECIPE).read(0, 0))
        (tmp_path / name).unlink() if make is os.mkfifo else (tmp_path / name).rmdir()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"bytes": 1}'])
def test_a_damaged_manifest_means_no_trajectory(tmp_path, text):
    store = ExpertStore(tmp_path, RECIPE)
    store.write(0, trajectory(0))
    (tmp_path / "00000.json").write_text(text)
    assert store.missing(1) == [0]
    opened = ExpertStore(tmp_path, RECIPE)
    assert "delete it and run again" in refusal(opened.read, 0, 0)
    assert "delete it and run again" in refusal(opened.verify, 0)
