"""Foreign pickles: plain data comes out as Python's own reader gives it, and nothing else comes out at all."""

import collections
import contextlib
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.data.formats import pickles
from offbook.errors import DataError

PLAIN = [
    {
        "matrix": np.arange(6.0).reshape(2, 3),
        "turned": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "every other": np.arange(10.0)[::2],
        "flags": np.array([True, False]),
        "words": np.array(["a", "bcd"]),
        "none of them": np.zeros((0, 3)),
        "number": np.float32(3.5),
        "nothing": None,
        "tuple": (1, -2.5, "x", True, 2**70, b"\xff\x00", b""),
    },
    collections.OrderedDict(a=1, b=[2, [3]]),
]
PLAIN.append(PLAIN[0])


class Command:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_plain_data_of_every_protocol_and_numpy(tmp_path, protocol, module):
    content = pickle.dumps(PLAIN, protocol=protocol)
    if module == "numpy.core" and protocol < 4:  # as NumPy 1 names it; from protocol 4 on the length is written too
        content = content.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "p.pkl").write_bytes(content)
    got = pickles.load(tmp_path / "p.pkl")
    assert got[2] is got[0]
    assert got[1] == {"a": 1, "b": [2, [3]]}
    for name, value in PLAIN[0].items():
        if isinstance(value, np.ndarray | np.generic):
            assert got[0][name].dtype == value.dtype, name
            np.testing.assert_array_equal(got[0][name], value)
        else:
            assert got[0][name] == value, name


def test_arrays_of_objects_stand_for_themselves(tmp_path):
    made = {"a": np.array([None, {}]), "b": np.zeros(2, "datetime64[s]"), "c": np.zeros(2, [("x", "f4")])}
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(made))
    assert set(pickles.load(tmp_path / "p.pkl").values()) == {pickles.ObjectArray()}


def test_a_pickle_of_python_2(tmp_path):
    # {'a': array([1., 2.])} as Python 2 writes it: words and bytes are the same type.
    raw = struct.pack("<2d", 1, 2)
    content = (
        b"(dS'a'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n"
        b"(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nT" + struct.pack("<i", 16) + raw + b"tbs."
    )
    (tmp_path / "p.pkl").write_bytes(content)
    np.testing.assert_array_equal(pickles.load(tmp_path / "p.pkl")["a"], [1.0, 2.0])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Command((os.system, ("touch canary",))), f"names {os.system.__module__}.system"),
        (Command((eval, ("1",))), "names builtins.eval"),
        (Command((getattr, ("a", "upper"))), "names builtins.getattr"),
        (collections.deque([1]), "names collections.deque"),
        ({(1, 2): 3}, "a dict with a tuple as key"),
        ({1, 2}, "the instruction EMPTY_SET"),
        (2 ** (8 * 300), "the instruction LONG4"),
    ],
)
def test_what_is_not_plain_data_is_refused_by_name(tmp_path, value, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps([{"observations": value}], protocol=4))
    with pytest.raises(DataError, match=f"expected a pickle of plain data, got .*{words}"):
        pickles.load(tmp_path / "p.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.pkl"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"not a pickle",
        b"\x80\x04N",  # no end
        b"\x80\x04.",  # nothing to give
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"(cos\nsystem\n.",
        b"\x80\x04}r\xff\xff\xff\x7fh\x00.",  # a place in the memo that Python's reader would reserve memory up to
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",  # a bytearray of 1 TiB, it says
        b"\x80\x04}]s.",  # a list as key
        b"ccollections\nOrderedDict\n(I1000000000000\ntR.",
        b"cbuiltins\nbytes\n(I1000000000000\ntR.",
        b"cnumpy.core.numeric\n_frombuffer\n(I1000000000000\ncnumpy\ndtype\n(S'f8'\ntR(I1\ntS'C'\ntR.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04P1\n.",
    ],
)
def test_damaged_and_hostile_files_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "p.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"expected .*pickle"):
        pickles.load(tmp_path / "p.pkl")


@pytest.mark.faults
def test_cut_files_are_refused(tmp_path):
    content = pickle.dumps(PLAIN)
    file = tmp_path / "p.pkl"
    for size in range(0, len(content), 7):
        file.write_bytes(content[:size])
        with pytest.raises(DataError):
            pickles.load(file)


@pytest.mark.faults
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_changed_bytes_never_do_anything_but_fail(tmp_path_factory, data):
    content = bytearray(pickle.dumps(PLAIN, protocol=data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.pkl"
    file.write_bytes(content)
    with contextlib.suppress(DataError):
        assert pickles.load(file) is not os


@pytest.mark.faults
def test_bombs_meet_limits(tmp_path, monkeypatch):
    file = tmp_path / "p.pkl"
    file.write_bytes(b"\x80\x04]" + b"}a" * 5_000 + b".")
    assert len(pickles.load(file)) == 5_000
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1_000)
    with pytest.raises(DataError, match="more than 1000 instructions"):
        pickles.load(file)
    monkeypatch.setattr(pickles, "MAX_BYTES", 1_000)
    with pytest.raises(DataError, match="1 to 1000 bytes, got 10"):
        pickles.load(file)


def test_bytes_of_python_2_in_protocol_0(tmp_path):
    """As Python 2 wrote `numpy.array([1.5, -2.0])`: its bytes are a quoted word."""
    raw = np.array([1.5, -2.0, 1 / 3]).tobytes()
    quoted = repr(raw)[1:].encode()
    assert b"\\x" in quoted
    (tmp_path / "p.pkl").write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n"
        b"(I1\n(I3\ntp6\ncnumpy\ndtype\np7\n(S'f8'\np8\nI0\nI1\ntp9\nRp10\n"
        b"(I3\nS'<'\np11\nNNNI-1\nI-1\nI0\ntp12\nbI00\nS" + quoted + b"\np13\ntp14\nb."
    )
    assert pickles.load(tmp_path / "p.pkl").tolist() == [1.5, -2.0, 1 / 3]
    for line in (b"S'\\xe9'\n.", b"S'a\n.", b"S'\n.", b"Sa\n.", b"S'a'", b"S'\\x'\n."):
        (tmp_path / "p.pkl").write_bytes(line)
        if line.startswith(b"S'\\xe9"):
            assert pickles.load(tmp_path / "p.pkl") == "\xe9"
        else:
            with pytest.raises(DataError, match="expected a whole pickle"):
                pickles.load(tmp_path / "p.pkl")
