"""The frames: round trips, refusals with the right close code, and hostile bytes."""

import pickle
import random
import resource
import time

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offbook.client import wire
from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.client.wire import BAD_DATA, REFUSED, TOO_BIG, WireError

META = PolicyMeta(
    name="pourer",
    observation=ObservationSpec(state=(("joints", 7), ("objects", 4)), cameras={"front": (32, 48)}),
    action=ActionSpec(size=2, low=(-1.0, -2.0), high=(1.0, 2.0)),
    chunk=8,
)


def observation(seed: int = 0, side: tuple[int, int] = (32, 48)) -> Observation:
    stream = np.random.default_rng(seed)
    return Observation(
        sessions=("trial-1",),
        state=stream.normal(size=(1, 11)).astype(np.float32),
        images={"front": stream.integers(0, 256, (1, *side, 3), dtype=np.uint8)},
        time=np.array([0.25]),
    )


def messages() -> list[dict]:
    return [
        wire.hello(META, "sub-1", "raw"),
        wire.ready("jpeg"),
        wire.ready("raw", META),
        wire.reset("trial-1", "pour the cup"),
        wire.obs("trial-1", 3, observation(), deadline_ms=33.3, images="raw"),
        wire.obs("trial-1", 3, observation(), deadline_ms=33.3, images="png"),
        wire.act("trial-1", 3, np.ones((8, 2), np.float32)),
        wire.end("trial-1", "done"),
        wire.error("busy", "come back later"),
        wire.error("policy_error", "it fell over", "trial-1"),
    ]


def refusal(message: dict | bytes | str, **options: object) -> WireError:
    frame = msgpack.packb(message, default=wire._pack) if isinstance(message, dict) else message
    with pytest.raises(WireError) as caught:
        wire.decode(frame, **options)
    return caught.value


@pytest.mark.parametrize("message", messages(), ids=lambda m: m["type"])
def test_every_message_comes_back_as_it_was_sent(message):
    back = wire.decode(wire.encode(message))
    assert set(back) == set(message)
    for key, value in message.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(back[key], value)
            assert back[key].dtype == value.dtype
        elif key == "meta":
            assert PolicyMeta.from_json(back[key]) == META
        elif key != "images" or isinstance(value, str):
            assert back[key] == value


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_lossless_codecs_bring_every_pixel(codec):
    sent = observation(7)
    frame = wire.encode(wire.obs("trial-1", 0, sent, deadline_ms=10, images=codec))
    got = wire.read_observation(wire.decode(frame), META)
    np.testing.assert_array_equal(got.images["front"], sent.images["front"])
    np.testing.assert_array_equal(got.state, sent.state)
    assert got.images["front"].flags.writeable
    assert got.state.flags.writeable


def test_jpeg_is_smaller_and_close():
    ramp = np.linspace(0, 255, 32 * 48 * 3).reshape(1, 32, 48, 3).astype(np.uint8)
    sent = Observation(sessions=("s",), state=np.zeros((1, 11), np.float32), images={"front": ramp}, time=np.zeros(1))
    message = wire.decode(wire.encode(wire.obs("s", 0, sent, deadline_ms=10, images="jpeg")))
    assert len(message["images"]["front"].data) < ramp.nbytes / 2
    got = wire.read_observation(message, META).images["front"].astype(int)
    assert np.abs(got - ramp).mean() < 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int32, np.int64, np.float32, np.float64, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_any_array_of_the_known_types_survives(array):
    packed = msgpack.unpackb(msgpack.packb(array, default=wire._pack))
    back = wire._unpack(packed)
    np.testing.assert_array_equal(back, array)
    assert back.shape == array.shape
    assert back.dtype == array.dtype


def test_views_and_foreign_byte_orders_are_sent_right():
    strided = np.arange(16, dtype=">f4").reshape(4, 4)[::2, ::2].astype(">f4")
    back = wire._unpack(msgpack.unpackb(msgpack.packb(strided.T, default=wire._pack)))
    np.testing.assert_array_equal(back, strided.T)


ARRAY = {"d": b"\0" * 8, "t": "f4", "s": [1, 2]}
BAD_ARRAYS = {
    "shape over its bytes": {"s": [2, 2]},
    "shape that would overflow 64 bits": {"s": [2**40, 2**40]},
    "many large dimensions": {"s": [2**30, 2**30, 2**30, 2**30]},
    "negative dimension": {"s": [-1, -2]},
    "five dimensions": {"s": [1, 1, 1, 1, 2]},
    "boolean dimension": {"s": [True, 2]},
    "fractional dimension": {"s": [1.0, 2]},
    "object dtype": {"t": "O"},
    "structured dtype": {"t": "f4,f4"},
    "text for bytes": {"d": "12345678"},
    "a dtype that is a list": {"t": ["f4"]},
    "an extra key": {"x": 1},
}


@pytest.mark.faults
@pytest.mark.parametrize("change", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_dishonest_arrays_are_bad_data(change):
    error = refusal({"type": "act", "session": "a", "seq": 1, "chunk": ARRAY | change})
    assert error.code == BAD_DATA
    assert len(error.reason) <= 123


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seq": -1}, "seq"),
        ({"seq": True}, "seq"),
        ({"seq": 1.5}, "seq"),
        ({"seq": 2**60}, "seq"),
        ({"session": ""}, "session"),
        ({"session": "x" * 129}, "session"),
        ({"chunk": np.zeros(2, np.float32)}, "chunk"),
        ({"chunk": np.zeros((1, 2), np.float64)}, "chunk"),
        ({"chunk": [[0.0, 1.0]]}, "chunk"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_fields_are_named(change, field):
    error = refusal({"type": "act", "session": "a", "seq": 1, "chunk": ARRAY} | change)
    assert error.code == REFUSED
    assert field in error.reason


@pytest.mark.parametrize("field", ["t", "deadline_ms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1", None])
def test_times_are_finite_and_not_negative(field, value):
    message = wire.obs("a", 1, observation(), deadline_ms=5, images="raw") | {field: value}
    assert field in refusal(message).reason
    with pytest.raises(WireError, match=field):
        wire.encode(message)


def test_a_sender_may_only_send_its_own_types():
    frame = wire.encode(wire.reset("a", ""))
    assert wire.decode(frame, allowed=wire.FROM_ROBOT)["type"] == "reset"
    assert refusal(frame, allowed=wire.FROM_POLICY).code == REFUSED


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 0},
        {"chunk": 10**9},
        {"name": ""},
        {"action": {"size": 2, "low": [0.0], "high": [1.0, 1.0], "choices": None}},
        {"action": {"size": float("inf"), "low": [], "high": [], "choices": None}},
        {"observation": {"state": [["joints", 10**12]], "cameras": {}}},
        {"observation": {"state": [], "cameras": {"front": [10**6, 10**6]}}},
        {"observation": "all of it"},
    ],
)
@pytest.mark.faults
def test_absurd_policy_descriptions_are_refused(change):
    assert refusal(wire.hello(META, "s", "raw") | {"meta": META.to_json() | change}).code == REFUSED


@pytest.mark.faults
@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", BAD_DATA),
        (b"\xc1", BAD_DATA),
        (b"\x80\x80", BAD_DATA),
        (b"\xdd\xff\xff\xff\xff", BAD_DATA),  # an array that announces four thousand million entries
        (b"\xdf\xff\xff\xff\xff", BAD_DATA),
        (b"\x91" * 5000 + b"\x90", BAD_DATA),  # deeper than the parser goes
        (b"\x81\xa1a" * 8 + b"\x01", REFUSED),  # deeper than we go
        (b"\x81\xa1\xff\x01", BAD_DATA),  # not UTF-8
        (b"\x81\x01\x01", BAD_DATA),  # a key that is a number
        (b"\xd6\xff\0\0\0\0", BAD_DATA),  # a timestamp extension
        (msgpack.packb({str(i): i for i in range(65)}), BAD_DATA),
        (msgpack.packb([[[]] * 200] * 200), REFUSED),
        (pickle.dumps({"type": "reset"}), BAD_DATA),
        ("text", REFUSED),
    ],
)
def test_malformed_frames_get_their_close_code(frame, code):
    assert refusal(frame).code == code


def test_sizes_are_limited_both_ways():
    big = observation(side=(900, 900))
    message = wire.obs("a", 1, big, deadline_ms=5, images="raw")
    with pytest.raises(WireError) as caught:
        wire.encode(message)
    assert caught.value.code == TOO_BIG
    frame = wire.encode(message, wire.frame_limit("raw"))
    assert refusal(frame).code == TOO_BIG
    assert wire.decode(frame, wire.RAW_FRAME_LIMIT)["seq"] == 1


@pytest.mark.faults
@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0 not really", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_broken_images_are_wire_errors(data, codec):
    with pytest.raises(WireError):
        wire.CompressedImage(data, codec, (32, 48, 3)).pixels()


def test_an_image_of_another_size_than_announced_is_refused_before_it_is_unpacked():
    packed = wire.compress(np.zeros((64, 64, 3), np.uint8), "png")
    with pytest.raises(WireError, match="got 64x64"):
        wire.CompressedImage(packed.data, "png", (32, 48, 3)).pixels()


def test_observations_must_be_what_the_policy_asked_for():
    message = wire.obs("a", 1, observation(side=(16, 16)), deadline_ms=5, images="raw")
    with pytest.raises(WireError, match="camera 'front'"):
        wire.read_observation(message, META)
    with pytest.raises(WireError, match="'state'"):
        wire.read_observation(message | {"state": np.zeros(3, np.float32)}, META)


def test_sequence_numbers_strictly_increase_within_a_session():
    check = wire.SequenceCheck(most=2)
    for session, seq in (("a", 1), ("b", 1), ("a", 5)):
        check({"type": "act", "session": session, "seq": seq})
    with pytest.raises(WireError) as caught:
        check({"type": "act", "session": "a", "seq": 5})
    assert caught.value.code == REFUSED
    with pytest.raises(WireError, match="at most 2"):
        check({"type": "act", "session": "c", "seq": 1})
    check(wire.end("b", "done"))
    check({"type": "act", "session": "c", "seq": 1})


def test_a_raw_picture_costs_far_less_than_a_compressed_one():
    def seconds(images: str) -> float:
        message = wire.obs("a", 1, observation(side=(224, 224)), deadline_ms=33, images=images)
        frame, times = wire.encode(message, wire.RAW_FRAME_LIMIT), []
        for _ in range(20):
            began = time.perf_counter()
            wire.encode(message, wire.RAW_FRAME_LIMIT)
            read = wire.decode(frame, wire.RAW_FRAME_LIMIT)["images"]["front"]
            if images != "raw":
                read.pixels()
            times.append(time.perf_counter() - began)
        return min(times)

    ratio = seconds("raw") / seconds("png")
    assert ratio < 0.5


def mutate(frame: bytes, stream: random.Random) -> bytes:
    """A few random changes: bits, bytes, cuts, repeats, splices, length fields."""
    data = bytearray(frame)
    for _ in range(stream.randint(1, 4)):
        if not data:
            break
        at = stream.randrange(len(data))
        kind = stream.randrange(6)
        if kind == 0:
            data[at] ^= 1 << stream.randrange(8)
        elif kind == 1:
            data[at] = stream.choice(b"\x00\x7f\x80\x90\xc0\xc1\xc4\xc6\xca\xcb\xd4\xd9\xdb\xdc\xdd\xde\xdf\xff")
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + stream.randint(1, 64)]
        elif kind == 4:
            data[at : at + 4] = stream.randbytes(4)
        else:
            data[at:at] = stream.choice((b"\x91" * 40, b"\x90" * 300, b"\xdf\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff"))
    return bytes(data)


@pytest.mark.faults
def test_twenty_thousand_mutated_frames_raise_nothing_else_and_memory_stays_flat():
    stream = random.Random(20230601)
    frames = [wire.encode(message) for message in messages()]
    codes = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for turn in range(20_000):
        frame = mutate(frames[turn % len(frames)], stream)
        try:
            message = wire.decode(frame)
            if message["type"] == "obs":
                wire.read_observation(message, META)
        except WireError as error:
            codes.append(error.code)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(codes) > 10_000
    assert set(codes) <= {BAD_DATA, REFUSED, TOO_BIG}
    assert grown < 32 * 1024  # KiB


@pytest.mark.faults
def test_a_frame_of_a_million_empty_lists_costs_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = b"\xdc\x01\x00" + b"\x90" * 256
    assert refusal(b"\xdc\x01\x00" + row * 256).code == REFUSED
    assert refusal(b"\x90" * (2 * 2**20)).code == BAD_DATA
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(WireError):
        wire.decode(data)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["type", "d", "t", "s", "c", "meta", "seq", "x"]), inner, max_size=6)
        ),
        max_leaves=12,
    ),
    st.sampled_from(sorted(wire._FIELDS)),
)
def test_any_msgpack_value_in_any_field_is_refused_politely(value, kind):
    with pytest.raises(WireError):
        wire.decode(msgpack.packb(value))
    for field in wire._FIELDS[kind]:
        message = {"type": kind} | dict.fromkeys(wire._FIELDS[kind]) | {field: value}
        with pytest.raises(WireError):
            wire.decode(msgpack.packb(message))


def test_an_error_survives_the_way_between_processes():
    error = WireError(REFUSED, "field 'seq'", expected="a number above 4", got="4")
    back = pickle.loads(pickle.dumps(error))
    assert (back.code, back.reason, str(back)) == (error.code, error.reason, str(error))


def test_text_that_a_terminal_would_obey_does_not_pass():
    frame = wire.encode(wire.error("fault", "\x1b[31mred\0\nline"))
    assert wire.decode(frame)["message"] == " [31mred  line"
    with pytest.raises(wire.WireError, match="printable"):
        wire.validate({"type": "error", "code": "fault", "message": "\x1b[2J"})
