"""Messages: what openpi's client packs is read, and nothing that a stranger packs does harm."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import InvalidInputError
from counterflow.serving import MessageLimits, pack, unpack

DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64")


def array(**changes: Any) -> bytes:
    """A message of one array of six float32, with changes; None leaves an entry out."""
    content = {"__ndarray__": True, "data": bytes(24), "dtype": "<f4", "shape": [2, 3], **changes}
    packed: bytes = msgpack.packb({"x": {key.encode(): value for key, value in content.items() if value is not None}})
    return packed


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
    def test_arrays(self, dtype: str, shape: tuple[int, ...]) -> None:
        values = np.asarray(np.random.default_rng(0).standard_normal(shape) * 3).astype(dtype)
        read = unpack(pack({"x": values}))["x"]
        assert read.dtype == values.dtype
        assert read.shape == values.shape
        np.testing.assert_array_equal(read, values)

    def test_scalars_views_and_byte_orders(self) -> None:
        values = np.arange(12, dtype=">f8").reshape(3, 4).T
        read = unpack(pack({"x": values, "n": np.float32(1.5), "f": np.bool_(True)}))
        np.testing.assert_array_equal(read["x"], values)
        assert read["n"] == 1.5
        assert type(read["n"]) is np.float32
        assert read["f"] == np.True_

    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**63)
            | st.floats(allow_nan=False)
            | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
            max_leaves=20,
        )
    )
    def test_plain_values(self, content: Any) -> None:
        assert unpack(pack(content)) == content

    def test_the_layout_is_openpis(self) -> None:
        """As its msgpack_numpy writes it; the test with its own client shows that it is read, too."""
        written = msgpack.unpackb(pack({"x": np.array([[1, 2]], np.int32), "y": np.float32(2)}))
        assert written["x"] == {
            b"__ndarray__": True,
            b"data": b"\x01\0\0\0\x02\0\0\0",
            b"dtype": "<i4",
            b"shape": [1, 2],
        }
        assert written["y"] == {b"__npgeneric__": True, b"data": 2.0, b"dtype": "<f4"}

    @pytest.mark.parametrize(
        "value", [np.array([object()]), np.array(["text"]), np.array([1j]), np.datetime64("2020-01-01"), object(), {1}]
    )
    def test_what_is_not_sent(self, value: Any) -> None:
        with pytest.raises(InvalidInputError, match="can't be written"):
            pack({"x": value})


class TestHostile:
    @pytest.mark.parametrize(
        ("message", "words"),
        [
            (b"", "can't be read"),
            (b"\xc1", "can't be read"),
            (b"\x81", "can't be read"),
            (pack({"x": 1}) + b"\x00", "can't be read"),
            (b"\xdb\xff\xff\xff\xff", "can't be read"),
            (b"\xdd\xff\xff\xff\xff", "can't be read"),
            (b"\xdf\xff\xff\xff\xff", "can't be read"),
            (b"\x91" * 100_000, "can't be read"),
            (b"\xa2\xff\xfe", "can't be read"),
            (msgpack.packb({1: 2}), "can't be read"),
            (msgpack.packb({b"key": 2}), "keys that are not text"),
            (msgpack.packb(msgpack.ExtType(5, b"")), "extension type"),
            (msgpack.packb({"x": msgpack.ExtType(5, b"abc")}), "can't be read"),
            (msgpack.packb([[0] * 200] * 200 + [0] * 200), "can't be read"),
            (msgpack.packb([[[]] * 200] * 200), "more than 4096 maps and lists"),
        ],
        ids=lambda value: None if isinstance(value, bytes) else value,
    )
    def test_malformed(self, message: bytes, words: str) -> None:
        with pytest.raises(InvalidInputError, match=words):
            unpack(message)

    @pytest.mark.parametrize("end", range(0, 60, 7))
    def test_cut_off_anywhere(self, end: int) -> None:
        with pytest.raises(InvalidInputError):
            unpack(array()[:end])

    @given(st.binary(max_size=200))
    def test_noise_is_read_or_refused(self, message: bytes) -> None:
        with suppress(InvalidInputError):
            unpack(message)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"dtype": "|O"}, "has type '|O'; expected one of"),
            ({"dtype": "<U4"}, "expected one of"),
            ({"dtype": "V24"}, "expected one of"),
            ({"dtype": ">f4"}, "expected one of"),
            ({"dtype": "<f4,<f4"}, "expected one of"),
            ({"dtype": ["<f4"]}, "expected one of"),
            ({"dtype": None}, "expected one of"),
            ({"shape": [2, 4]}, r"\(2, 4\) came with 24 bytes; expected 32"),
            ({"shape": [2, -3]}, "none of them empty"),
            ({"shape": [0, 3], "data": b""}, "none of them empty"),
            ({"shape": [2**40, 2**40]}, "none of them empty"),
            ({"shape": [1] * 7, "data": bytes(4)}, "at most 6 dimensions"),
            ({"shape": [2.0, 3.0]}, "whole numbers"),
            ({"shape": [True, True], "data": bytes(4)}, "whole numbers"),
            ({"shape": 6}, "whole numbers"),
            ({"shape": None}, "whole numbers"),
            ({"data": "text"}, "expected bytes"),
            ({"data": None}, "expected bytes"),
        ],
    )
    def test_wrong_arrays(self, changes: dict[str, Any], words: str) -> None:
        assert unpack(array())["x"].shape == (2, 3)
        with pytest.raises(InvalidInputError, match=words):
            unpack(array(**changes))

    @pytest.mark.parametrize("data", ["7", [1], {}, None])
    def test_wrong_scalars(self, data: Any) -> None:
        with pytest.raises(InvalidInputError, match="expected a number"):
            unpack(msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": "<f4"}))

    def test_a_scalar_beyond_its_type(self) -> None:
        with pytest.raises(InvalidInputError, match="can't be read"):
            unpack(msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}))

    def test_any_byte_makes_a_boolean(self) -> None:
        read = unpack(array(dtype="|b1", data=b"\x00\x01\x02\xff\x00\x01"))["x"]
        assert read.astype(int).tolist() == [[0, 1, 1], [1, 0, 1]]

    def test_limits(self) -> None:
        message = pack({"x": np.zeros(100, np.float32), "text": "abc"})
        assert len(message) < 500
        unpack(message, MessageLimits(size=500))
        for limits in (MessageLimits(size=100), MessageLimits(text=2), MessageLimits(entries=1)):
            with pytest.raises(InvalidInputError):
                unpack(message, limits)
        with pytest.raises(InvalidInputError, match="expected 1 or more"):
            MessageLimits(size=0)
