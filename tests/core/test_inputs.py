"""Files of users and of others: regular files only, JSON within limits, checksums that differ are refused."""

import json
import os
import socket
from pathlib import Path

import pytest

from fbpc_ray.core import files, inputs
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError, reason_of


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is a FIFO"),
        (lambda path: path.symlink_to("/dev/null"), "is a device"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(make, kind, tmp_path):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(UserError, match=f"{path}: must be a regular file, {kind}; check the path"):
        inputs.open_regular(path)


def test_a_socket_a_loop_of_links_and_names_that_no_file_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_socket(tmp_path / "socket")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "socket", tmp_path / "loop", tmp_path / ("n" * 256), tmp_path / "gone"):
        with pytest.raises(OSError):  # with a number, of which the command line makes a line
            inputs.open_regular(path)
    for path in (tmp_path / "nul\0", tmp_path / "\ud800"):
        with pytest.raises(UserError, match="not a file name"):
            inputs.open_regular(path)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    (tmp_path / "b").symlink_to("a")
    assert inputs.read_bytes(tmp_path / "b") == b"data"
    with pytest.raises(ValueError, match="4 bytes, expected at most 3"):
        inputs.read_bytes(tmp_path / "b", most=3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is not a number"),
        ("[Infinity]", "Infinity is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ("1e400", "the number 1e400 is too large"),
        ("-1e400", "too large"),
        ("1" + "0" * 400, "too large"),
        ("1" + "0" * 5000, "too large"),
        (str(2**64), "too large"),
        ("[" * 101 + "]" * 101, "nested deeper than 100"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        (r'"\ud800"', "surrogates not allowed"),
        (r'{"\ud800": 1}', "surrogates not allowed"),
        (b'"\xff"', "utf-8"),
        ("", "Expecting value"),
        ("{", "Expecting"),
    ],
)
def test_json_beyond_the_limits_is_a_value_error(text, reason):
    with pytest.raises(ValueError, match=reason):
        inputs.parse_json(text)


@pytest.mark.parametrize(
    "value", [None, True, -(2**63), 2**64 - 1, 1.5, 1e308, 5e-324, "日本\n", [], {"a": [{"b": None}]}]
)
def test_json_within_the_limits_comes_back(value):
    assert inputs.parse_json(json.dumps(value)) == value
    assert inputs.parse_json("[" * 99 + json.dumps(value if not value else 1) + "]" * 99)


def test_a_checked_object_comes_back_and_each_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path, value = tmp_path / "a.json", {"steps": 12, "name": "Zoë", "scores": [0.1, None, 2.5e-7], "on": True}
    files.write_checked_json(path, value)
    assert inputs.read_checked_json(path) == value
    data = path.read_bytes()
    accepted = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert inputs.read_checked_json(path) == value, damaged
            accepted += 1  # a space, a line end, the e of a number
        except ValueError:
            pass
    assert 0 < accepted < len(data)


def test_a_file_of_an_earlier_release_has_no_checksum(tmp_path):
    (tmp_path / "a.json").write_text('{"steps": 12}')
    assert inputs.read_checked_json(tmp_path / "a.json") == {"steps": 12}
    (tmp_path / "a.json").write_text("[12]")
    with pytest.raises(ValueError, match="must be one JSON object"):
        inputs.read_checked_json(tmp_path / "a.json")


def test_spaces_and_the_order_of_members_do_not_count():
    value = inputs.with_checksum({"a": 1, "b": 2.0})
    assert inputs.without_checksum(json.loads(json.dumps(dict(reversed(value.items()))))) == {"a": 1, "b": 2.0}
    with pytest.raises(ValueError, match="its checksum is not that of its content"):
        inputs.without_checksum(value | {"a": 2})


VALUE = {"how": "stopped", "why": "by the scheduler at step 3"}


def test_no_cut_of_a_file_leaves_another_value():
    """Of all cuts of one piece; what lacks a member is refused by its reader."""
    text = json.dumps(inputs.with_checksum(VALUE), indent=2)
    read = 0
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            try:
                value = inputs.without_checksum(inputs.parse_json(text[:start] + text[end:]))
            except (ValueError, AttributeError):  # AttributeError: of a text
                continue
            read += 1
            assert value == VALUE or value.keys() != VALUE.keys(), text[:start] + text[end:]
    assert read > 10


@pytest.mark.parametrize("name", ["checksUm", "checkqum", "cheksum", "hecksum", "check", "checksumchecksum"])
def test_a_damaged_name_of_the_checksum_does_not_make_an_unchecked_file(name):
    with pytest.raises(ValueError, match="its checksum has another name"):
        inputs.without_checksum(VALUE | {name: "crc32:0$745a1d"})


def test_no_setting_is_named_like_the_checksum():
    assert inputs.without_checksum(Config().flat()) == Config().flat()


def test_every_error_has_a_reason_of_one_line():
    """Some libraries raise errors without a message."""
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(ValueError("the first\nthe second")) == "the first"
    assert reason_of(KeyError("spec")) == "it has no 'spec'"
