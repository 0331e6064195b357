"""One flipped bit in a file of a sweep, or of posterior samples, is refused by the name of the file."""

import pytest
from support.fuzz import Reader, forget, plain, sweep_readers

from fbpc_ray.core.errors import UserError

NAMES = ("best.json", "sweep.json", "trial.json", "ended.json", "posterior samples")


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
    return {reader.name: reader for reader in sweep_readers(tmp_path_factory.mktemp("sweep") / "first")}


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_refused_or_changes_nothing(name, readers):
    reader = readers[name]
    content, expected = reader.path.read_bytes(), plain(reader.read())
    refused = 0
    positions = range(0, len(content), max(1, len(content) // 300))
    for at in positions:
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        reader.path.write_bytes(damaged)
        forget()
        try:
            assert plain(reader.read()) == expected, f"byte {at}"  # white space
        except UserError as error:
            assert reader.path.name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(positions) / 2
    reader.path.write_bytes(content)


def test_files_without_a_checksum_are_read(readers):
    """Those of earlier releases."""
    for name in NAMES[:4]:
        reader = readers[name]
        content, expected = reader.path.read_text(), plain(reader.read())
        first, checksum, *rest = content.splitlines(keepends=True)
        assert checksum.startswith('  "checksum": "crc32:')
        reader.path.write_text("".join([first, *rest]))
        assert plain(reader.read()) == expected
        reader.path.write_text(content)
