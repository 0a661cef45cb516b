import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError
from offbook.runs.config import apply_presets, choose_preset, from_json, read_config, to_json, with_presets


@dataclass(frozen=True, kw_only=True)
class Fit:
    steps: int = 100
    rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    kind: Literal["left", "right"] = "left"
    hidden: tuple[int, ...] = (8, 8)
    size: tuple[int, float] = (1, 2.0)
    out: Path | None = None
    fit: Fit = Fit()
    stages: tuple[Fit, ...] = ()
    limit: float | None = None
    either: int | str = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError("limit is negative")


configs = st.builds(
    Config,
    name=st.text(),
    kind=st.sampled_from(["left", "right"]),
    hidden=st.lists(st.integers()).map(tuple),
    size=st.tuples(st.integers(), st.floats(allow_nan=False)),
    out=st.none() | st.sampled_from([Path("a"), Path("/b/c")]),
    fit=st.builds(Fit, steps=st.integers(), rate=st.floats(allow_nan=False)),
    stages=st.lists(st.builds(Fit), max_size=2).map(tuple),
    limit=st.none() | st.floats(min_value=0, allow_nan=False),
    either=st.integers() | st.text(),
    extra=st.dictionaries(st.text(), st.integers() | st.text()),
    rates=st.dictionaries(st.text(), st.floats(allow_nan=False)),
)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(configs)
def test_json_round_trip(config: Config) -> None:
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, r"Config\.nmae: .*did you mean 'name'\?"),
        ({"fit": {"step": 1}}, r"Config\.fit\.step: .*did you mean 'steps'\?"),
        ({"fit": {"steps": "many"}}, r"Config\.fit\.steps: expected a value of type int, got 'many'"),
        ({"fit": {"steps": True}}, "expected a value of type int, got True"),
        ({"fit": 3}, r"Config\.fit: expected an object, got 3"),
        ({"kind": "lef"}, r"Config\.kind: expected one of 'left', 'right', got 'lef'; did you mean 'left'\?"),
        ({"hidden": [1, "b"]}, r"Config\.hidden\[1\]: expected a value of type int"),
        ({"hidden": 3}, r"Config\.hidden: expected a value of type tuple\[int, \.\.\.\], got 3"),
        ({"size": [1]}, r"Config\.size: expected 2 entries, got 1"),
        ({"limit": "x"}, r"Config\.limit: expected a value of type float"),
        ({"either": 1.5}, r"Config\.either: expected a value of type int or a value of type str"),
        ({"limit": -1}, "limit is negative"),
        ({"name": None}, r"Config\.name: expected a value of type str, got None"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_json(Config, {"name": "a", **change})
    assert caught.value.exit_code == 2


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Config\.name: expected a value, got nothing"):
        from_json(Config, {})


def test_to_json_refuses_what_has_no_json_form() -> None:
    with pytest.raises(TypeError, match=r"extra\.f: function has no JSON form"):
        to_json(Config(name="a", extra={"f": lambda: 1}))
    with pytest.raises(TypeError, match="instance of a dataclass"):
        to_json({"a": 1})


def test_preset_suggests_the_nearest() -> None:
    presets = {"smoke": Fit, "tiny": lambda: Fit(steps=5)}
    assert choose_preset(presets, "tiny").steps == 5
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        choose_preset(presets, "smok")


def verb(*, config: Fit = Fit()) -> Fit:
    return config


def test_flags_preset_and_config_replace_the_default(tmp_path: Path) -> None:
    marked = with_presets({"tiny": lambda: Fit(steps=5)})(verb)
    try:
        function, rest = apply_presets(marked, ["a", "--preset", "tiny", "--b"])
        assert (function().steps, rest) == (5, ["a", "--b"])
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"type": "x", "config": {"steps": 9}}))
        function, rest = apply_presets(marked, [f"--config={file}"])
        assert (function().steps, rest) == (9, [])
        for words, message in [
            (["--preset"], "expected a value after it"),
            (["--preset", "tiny", "--config", "x"], "got both"),
            (["--config", str(tmp_path / "none.json")], "No such file"),
        ]:
            with pytest.raises(ConfigError, match=message):
                apply_presets(marked, words)
    finally:
        del verb.__dict__["presets"]
    # A verb without presets keeps the words for itself.
    assert apply_presets(verb, ["--preset", "x"]) == (verb, ["--preset", "x"])


def test_config_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a\.json: expected JSON"):
        read_config(Fit, tmp_path / "a.json")
