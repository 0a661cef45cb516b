"""Pickles of plain values and NumPy arrays, written, and read without running anything that is in them.

A pickle is a program for a small machine with a stack, and Python's own reader lets it call whatever it names. The
reader here knows only the instructions that build numbers, words, lists, tuples, dicts and arrays. The few functions
that pickled arrays name are its own stand-ins, so NumPy never sees a state that it did not write, and whatever else a
pickle names is refused by that name. What a file can make it do is bounded by the size of the file: a value may be used
again and again, but copied only until the copies come to some times the file.

`load` reads files of recordings. `read` reads bytes in which further names stand for plain data, each with a stand-in.
"""

import codecs
import io
import mmap
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offbook.errors import DataError

MAX_BYTES = 64 * 2**30
MAX_INSTRUCTIONS = 20_000_000
# Instructions that push what is written behind them, and the types of arrays that are read.
_CONSTANT = re.compile("INT|BININT[12]?|LONG1?|(BIN)?FLOAT|(SHORT_)?(BIN)?(STRING|BYTES|UNICODE)8?|BYTEARRAY8")
_SIMPLE = re.compile(r"[|<>=]?(?:b1|\?|[iu][1248]|f[248]|[SU]\d{1,6})")

_SINGLE: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_SINGLE |= {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


@dataclass(frozen=True)
class ObjectArray:
    """Stands for an array of Python objects, dates, records or the like, which is not read."""


@dataclass
class _Dtype:
    kind: np.dtype[Any] | None

    def order(self, mark: object) -> None:
        if mark == ">" and self.kind is not None:
            self.kind = self.kind.newbyteorder(">")


@dataclass
class _Unfinished:
    """An array between the call that makes it and the state that fills it; `places` are those of the memo."""

    places: list[int] = field(default_factory=list)


@dataclass
class Record:
    """Stands for an object of a class that a reader admits: its attributes, and nothing that it could do."""

    fields: dict[str, Any] = field(default_factory=dict)


class _ForeignError(ValueError):
    """Something in the pickle that is not plain data."""


BROKEN = (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError)
"""What reading raises for bytes that are no pickle, damaged, or not plain data."""


def load(path: Path) -> Any:
    """The value that a pickle holds: numbers, words, lists, tuples, dicts with words or integers as keys, arrays.

    Args:
        path: the file; pickles of Python 2 and 3, of every protocol, with the names of NumPy 1 and 2.

    Raises:
        DataError: there is no such file; it is cut short or damaged; it names something that is not plain data; it is
            larger than `MAX_BYTES` or has more than `MAX_INSTRUCTIONS` instructions.
    """
    where, again = str(path), "copy the file again from where it came from"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if not 0 < size <= MAX_BYTES:
                got = f"{size} bytes"
                raise DataError(where, expected=f"a pickle of 1 to {MAX_BYTES} bytes", got=got, fix=again)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # It has read and readline, which is all that is asked of it.
                return _run(content, len(content), _STAND_INS)
    except OSError as error:
        got = error.strerror or str(error)
        raise DataError(where, expected="a pickle", got=got, fix="give the path of the file") from error
    except _ForeignError as error:
        fix = "nothing of it was run; save the recordings as plain dicts of NumPy arrays"
        raise DataError(where, expected="a pickle of plain data", got=str(error)[:300], fix=fix) from None
    except BROKEN as error:
        got = f"one that is damaged or cut short ({str(error).partition(chr(10))[0] or error!r})"
        raise DataError(where, expected="a whole pickle", got=got, fix=again) from error


def save(value: Any, path: Path) -> None:
    """Writes a pickle that names nothing but `numpy.ndarray` and `numpy.dtype`, which every version of NumPy has.

    Python's own way names functions where the installed NumPy keeps them; before version 1.26 they were elsewhere.

    Args:
        value: numbers, words, lists, tuples, dicts and arrays of numbers.
        path: the file.
    """
    with path.open("wb") as file:
        _Pickler(file, protocol=4).dump(value)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (np.ndarray, ((0,),), value.__reduce__()[2]) if type(value) is np.ndarray else NotImplemented


def read(
    stream: io.BytesIO,
    size: int,
    names: Mapping[tuple[str, str], Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the next pickle in a stream, in which some further names are admitted.

    Args:
        stream: it is left where the pickle ends.
        size: of all of it; no more than some times as much is copied.
        names: by module and name, what is called in their place; a class is called without arguments where an object
            of it is made, and gives a `Record`.
        persistent: what is called with what a pickle says of things that stand outside of it.

    Raises:
        ValueError: something else is named; any of `BROKEN` where the bytes are no whole pickle.

    Example:
        >>> import io, pickle
        >>> read(io.BytesIO(pickle.dumps({"a": [1, 2]})), 30, {})
        {'a': [1, 2]}
    """
    return _run(stream, size, {**_STAND_INS, **names}, persistent)


def _run(
    stream: Any,
    size: int,
    names: Mapping[tuple[str, str], Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    machine = _Machine(2**20 + 4 * size, names, persistent)
    for _ in range(MAX_INSTRUCTIONS):
        code = stream.read(1)
        if code not in _OPCODES:
            raise ValueError(f"no instruction {code!r}" if code else "no end")
        opcode = _OPCODES[code]
        if opcode.name == "STOP":
            return machine.stack.pop()
        if opcode.name == "STRING":
            argument: Any = _string(stream.readline())
        else:
            argument = None if opcode.arg is None else opcode.arg.reader(stream)
        machine.step(opcode.name, argument)
    raise _ForeignError(f"more than {MAX_INSTRUCTIONS} instructions")


def _string(line: bytes) -> str:
    """Bytes as protocol 0 of Python 2 wrote them, which `pickletools` reads only where they are ASCII."""
    text = line[:-1]
    if not (line.endswith(b"\n") and len(text) > 1 and text[:1] == text[-1:] and text[:1] in (b"'", b'"')):
        raise ValueError("a string without quotes")
    content: bytes = codecs.escape_decode(text[1:-1])[0]
    return content.decode("latin-1")


@dataclass(frozen=True)
class _StandIn:
    call: Callable[..., Any]


class _Machine:
    """The stack and the memo; `copies` is how many more letters and entries may be handed to functions."""

    def __init__(
        self,
        copies: int,
        names: Mapping[tuple[str, str], Callable[..., Any]],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.copies, self.names, self.persistent = copies, names, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case _ if name in _SINGLE:
                stack.append(_SINGLE[name]())
            case "LIST" | "TUPLE":
                stack.append(self.since_mark() if name == "LIST" else tuple(self.since_mark()))
            case "DICT":
                stack.append(_fill({}, self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(items[::-1]))
            case "APPEND" | "APPENDS":
                items = self.since_mark() if name == "APPENDS" else [stack.pop()]
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.since_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                _fill(self.top(dict), items)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                place = len(self.memo) if name == "MEMOIZE" else int(argument)
                self.memo[place] = stack[-1]
                if isinstance(stack[-1], _Unfinished):
                    stack[-1].places.append(place)
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "POP":
                stack.pop()
            case "GLOBAL":
                stack.append(self.stand_in(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                if not isinstance(last, str) or not isinstance(module, str):
                    raise _ForeignError("a name that is no word")
                stack.append(self.stand_in(module, last))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, _StandIn) or not isinstance(arguments, tuple):
                    raise _ForeignError("a call of something that is no function")
                self.spend(arguments)
                stack.append(function.call(*arguments))
            case "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                made = function.call() if isinstance(function, _StandIn) and arguments == () else None
                if not isinstance(made, Record):
                    raise _ForeignError("an object that is no plain data")
                stack.append(made)
            case "BUILD":
                if isinstance(stack[-1], dict):
                    self.describe(stack.pop())
                    return
                if not isinstance(stack[-1], tuple):
                    raise _ForeignError("an object with a state of its own")
                self.spend(stack[-1])
                self.build(stack.pop())
            case "BINPERSID" if self.persistent is not None:
                stack.append(self.persistent(stack.pop()))
            case _ if _CONSTANT.fullmatch(name):
                stack.append(argument)
            case _:
                raise _ForeignError(f"the instruction {name}")

    def stand_in(self, module: str, name: str) -> _StandIn:
        """What is called in the place of something that the pickle names."""
        same = {"__builtin__": "builtins"}.get(module, module.replace("numpy._core", "numpy.core"))
        known = self.names.get((same, name))
        if known is None:
            raise _ForeignError(f"one that names {module}.{name}")
        return _StandIn(known)

    def since_mark(self) -> list[Any]:
        """Takes everything above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def top(self, kind: type) -> Any:
        """The container on top of the stack."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"{type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def spend(self, arguments: tuple[Any, ...]) -> None:
        """Counts what a function may go through, for the same words and lists can be given to it many times."""
        parts = [part for part in arguments if isinstance(part, str | list | tuple)]
        self.copies -= len(arguments) + sum(map(len, parts))
        if self.copies < 0:
            raise _ForeignError("one that copies the same values again and again")

    def describe(self, attributes: dict[Any, Any]) -> None:
        """Gives a record its attributes."""
        if not isinstance(self.stack[-1], Record):
            raise _ForeignError("an object with a state of its own")
        self.stack[-1].fields = attributes

    def build(self, state: tuple[Any, ...]) -> None:
        """Gives an array or a dtype its state."""
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            target.order(state[1])
        elif isinstance(target, _Unfinished):
            shape, dtype, fortran, raw = state[-4:]
            self.stack[-1] = _array(raw, dtype, shape, "F" if fortran else "C")
            for place in target.places:
                self.memo[place] = self.stack[-1]
        else:
            raise _ForeignError("an object with a state of its own")


def _fill(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Puts keys and values, by turns, into a dict; hashing nested keys could take for ever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise _ForeignError(f"a dict with a {type(key).__name__} as key")
        target[key] = value
    return target


def _dtype(code: Any, *_: Any) -> _Dtype:
    simple = isinstance(code, str) and _SIMPLE.fullmatch(code)
    return _Dtype(np.dtype(code) if simple else None)


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> np.ndarray | ObjectArray:
    if not isinstance(dtype, _Dtype):
        raise TypeError("an array without a type")
    if dtype.kind is None:
        return ObjectArray()
    if isinstance(raw, str):  # as Python 2 wrote it
        raw = raw.encode("latin-1")
    if not isinstance(raw, bytes | bytearray):
        raise TypeError("an array without bytes")
    flat = np.frombuffer(raw, dtype.kind) if raw else np.zeros(0, dtype.kind)
    array = flat.reshape(tuple(int(size) for size in shape), order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(axes)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    values = _array(raw, dtype, (1,))
    return values if isinstance(values, ObjectArray) else values[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _ForeignError("one that names _codecs.encode for something else than bytes")
    return text.encode("latin-1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Unfinished(),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("numpy", "ndarray"): lambda *_: _Unfinished(),
    ("numpy", "dtype"): _dtype,
    # How protocols 0 to 2 write bytes, and no bytes.
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): lambda: b"",
    ("collections", "OrderedDict"): lambda pairs=(): _fill({}, [part for key, value in pairs for part in (key, value)]),
}
