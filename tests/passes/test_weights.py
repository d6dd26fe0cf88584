"""Weights on their way from file to file, against numpy on the whole array."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from manifests.errors import ConversionError
from passes.export.weights import Rows, WeightBytes, write_bytes


def pack(codes: np.ndarray) -> np.ndarray:
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8))
    return (flat[::2] | flat[1::2] << 4).astype(np.uint8)


def written(tmp_path, data: np.ndarray, **how) -> bytes:
    source = tmp_path / "source"
    source.write_bytes(b"head" + data.tobytes())
    place = WeightBytes(source, 4, data.nbytes, **how)
    record = write_bytes(tmp_path / "target", b"", [(place, 64)], 64 + place.final_size)
    content = (tmp_path / "target").read_bytes()
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert content[:64] == bytes(64)
    return content[64:]


# The first is larger than what is converted at a time.
@pytest.mark.parametrize(("rows", "columns"), [(2000, 700), (7, 5), (3, 4), (1, 3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_signed_codes_become_unsigned_in_wider_rows(tmp_path, rows, columns, bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    middle = 1 << bits - 1
    stored = pack((codes + middle) % (1 << bits)) if bits == 4 else (codes + middle).astype(np.uint8)
    width = columns + 4 + columns % 2
    expected = np.zeros((rows, width), np.uint8)
    expected[:, :columns] = codes
    result = written(tmp_path, stored, stored=f"I{bits}", wanted=f"U{bits}", rows=Rows(columns, 1, width))
    assert result == (pack(expected) if bits == 4 else expected).tobytes()


def test_signed_codes_become_unsigned_where_they_lie(tmp_path):
    codes = np.arange(-128, 128).astype(np.int8)
    assert written(tmp_path, codes, stored="I8", wanted="U8") == (codes.astype(int) + 128).astype(np.uint8).tobytes()


def test_values_are_repeated_for_every_block(tmp_path):
    scales = np.arange(12, dtype=np.float16).reshape(6, 2)
    result = written(tmp_path, scales, stored="F16", wanted="F32", rows=Rows(2, 3, 6))
    assert result == scales.repeat(3, axis=1).astype(np.float32).tobytes()


def test_packed_values_can_be_unpacked(tmp_path):
    points = np.arange(15, dtype=np.uint8).reshape(5, 3)
    assert written(tmp_path, pack(points), stored="U4", wanted="U8", rows=Rows(3, 1, 3)) == points.tobytes()


def test_a_short_file_is_noticed(tmp_path):
    (tmp_path / "source").write_bytes(bytes(10))
    for rows in (None, Rows(4, 1, 6)):
        place = WeightBytes(tmp_path / "source", 0, 16, "U8", "U8", rows)
        with pytest.raises(ConversionError, match="shorter than its graph says"):
            write_bytes(tmp_path / "target", b"", [(place, 0)], place.final_size)
