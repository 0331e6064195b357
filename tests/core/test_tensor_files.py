"""Safetensors files with a checksum: others read them, and a damaged one is refused."""

import os

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from fbpc_ray.core import tensor_files
from fbpc_ray.core.errors import UserError

TENSORS = {"b": torch.arange(5), "a": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_files.dumps(TENSORS, {"step": "7", "who": "Zoë"}))
    return path


def read(path):
    with tensor_files.open_checked(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_it_comes_back_and_others_read_it(path):
    tensors, metadata = read(path)
    others = safetensors.torch.load_file(path)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert torch.equal(others[name], tensor)
    assert metadata == {"step": "7", "who": "Zoë", "checksum": metadata["checksum"]}
    assert path.read_bytes() == tensor_files.dumps(TENSORS, {"who": "Zoë", "step": "7"})


@pytest.mark.parametrize("length", range(8))
def test_tensors_begin_at_a_multiple_of_8_bytes(length):
    data = tensor_files.dumps(TENSORS, {"note": "x" * length})
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert torch.equal(safetensors.torch.load(data)["a"], TENSORS["a"])


def test_each_flipped_bit_and_each_length_is_refused(path):
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises((ValueError, SafetensorError)):
            read(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises((ValueError, SafetensorError)):
            read(path)


def test_a_file_of_an_earlier_release_has_no_checksum(path):
    path.write_bytes(safetensors.torch.save(TENSORS, {"step": "7"}))
    assert read(path)[1] == {"step": "7"}
    path.write_bytes(safetensors.torch.save(TENSORS))
    assert torch.equal(read(path)[0]["b"], TENSORS["b"])


def test_a_file_is_read_once_for_its_checksum(path, monkeypatch):
    calls = []
    monkeypatch.setattr(tensor_files, "crc", lambda parts, crc=tensor_files.crc: calls.append(1) or crc(parts))
    for _ in range(3):
        read(path)
    assert len(calls) == 1
    os.utime(path, (1, 1))
    read(path)
    assert len(calls) == 2


def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="must be a regular file, is a FIFO"):
        tensor_files.open_checked(tmp_path / "x")
