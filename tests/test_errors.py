import pickle

import pytest

from offbook.errors import ConfigError, DataError, MissingExtraError, OffbookError, nearest, needs_extra


def test_message_has_four_parts_in_one_sentence():
    error = DataError("episode 3, field 'action'", expected="shape (7,)", got="(6,)", fix="record it again")
    assert str(error) == "episode 3, field 'action': expected shape (7,), got (6,); record it again."


def test_wrong_use_exits_with_2_and_failure_with_1():
    assert ConfigError.exit_code == 2
    assert DataError.exit_code == OffbookError.exit_code == 1


def test_error_survives_the_way_back_from_a_worker_process():
    error = DataError("a", expected="b", got="c", fix="d")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert (str(again), again.fix) == (str(error), "d")


def test_missing_extra_names_the_install_line():
    with pytest.raises(MissingExtraError, match=r"pip install 'offbook\[sim\]'"), needs_extra("sim"):
        import a_module_that_nobody_has  # noqa: F401


def test_a_fault_in_our_own_code_is_not_taken_for_a_missing_extra():
    with pytest.raises(ModuleNotFoundError, match=r"offbook\.nowhere"), needs_extra("sim"):
        import offbook.nowhere  # noqa: F401


@pytest.mark.parametrize(
    ("name", "hint"), [("hoper", "did you mean 'hopper'?"), ("zzz", "choose one of: hopper, walker")]
)
def test_nearest(name, hint):
    assert nearest(name, ["walker", "hopper"]) == hint
