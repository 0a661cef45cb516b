import os
import subprocess
import sys

import numpy as np
import pytest

from offbook.errors import ConfigError, MissingExtraError
from offbook.sim.adapters import ControlSuite, make
from offbook.sim.experts import make_expert, random_policy
from offbook.sim.play import play
from offbook.sim.spaces import observation_spec, schema_for

# Name, control steps a second, whether the task has a notion of success.
WORLDS = [
    ("gym:Hopper-v5", 125.0, False),
    ("gym:CartPole-v1", 50.0, False),
    ("gym:FrozenLake-v1", 4.0, False),
    ("dmc:walker-walk", 40.0, False),
    ("metaworld:drawer-open-v3", 80.0, True),
    ("minigrid:MiniGrid-DoorKey-5x5-v0", 10.0, True),
    ("minigrid:BabyAI-GoToLocal-v0", 10.0, True),
    ("robotics:FetchReach-v4", 25.0, True),
    ("robotics:PointMaze_UMaze-v3", 50.0, True),
    ("robotics:AdroitHandDoor-v1", 100.0, True),
    ("robotics:FrankaKitchen-v1", 12.0, True),
    ("ale:Pong-v5", 15.0, False),
    ("offbook:pour", 30.0, True),
    ("offbook:scoop", 30.0, True),
    ("offbook:darkpoint", 10.0, True),
    ("offbook:keyed-door", 4.0, True),
]


@pytest.mark.parametrize(("env_id", "control_hz", "knows_success"), WORLDS)
def test_each_world_plays_by_the_same_rules(env_id, control_hz, knows_success, capfd):
    env = make(env_id)
    policy = random_policy(env)
    first = next(play([env], policy, [5], max_steps=8))
    list(play([env], policy, [6], max_steps=5))
    again = next(play([env], policy, [5], max_steps=8))
    schema = schema_for(env, env_id)
    assert env.metadata["control_hz"] == pytest.approx(control_hz)
    assert isinstance(env.prompt, str)
    assert (first.success is not None) == knows_success
    for field in schema.fields:
        values = first.fields[field.name]
        assert values.dtype.name == field.dtype
        assert values.shape[1:] == field.shape
        np.testing.assert_array_equal(values, again.fields[field.name], err_msg=field.name)
    assert schema.observation_spec() == observation_spec(env.observation_space)
    env.close()
    env.close()
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_other_seeds_give_other_episodes():
    for env_id in ("dmc:walker-walk", "metaworld:drawer-open-v3", "robotics:FetchReach-v4"):
        env = make(env_id)
        one, two = play([env], random_policy(env), [5, 6], max_steps=1)
        leaves = [name for name in one.fields if name not in ("action", "reward")]
        assert any((one.fields[name][0] != two.fields[name][0]).any() for name in leaves), env_id
        env.close()


@pytest.mark.parametrize("env_id", ["gym:Hopper-v5", "dmc:walker-walk", "metaworld:drawer-open-v3"])
def test_worlds_of_mujoco_can_show_a_picture(env_id):
    env = make(env_id, image_size=32)
    before, _ = env.reset(seed=1)
    after = before
    for _ in range(10):
        after, *_ = env.step(env.action_space.high)
    assert before["image"].shape == (32, 32, 3)
    assert np.ptp(before["image"]) > 50
    assert (before["image"] != after["image"]).any()
    assert env.render().shape == (240, 320, 3)
    env.close()


def test_metaworld_succeeds_with_its_script_and_success_stays():
    env = make("metaworld:drawer-open-v3")
    stopping = make("metaworld:drawer-open-v3", stop_on_success=True)
    policy = make_expert("metaworld:drawer-open-v3")
    [stopped] = play([stopping], policy, [3], keep=False)
    assert stopped.success
    assert stopped.terminated
    [going_on] = play([env], policy, [3], max_steps=stopped.steps + 30, keep=False)
    assert going_on.success
    assert going_on.truncated
    np.testing.assert_array_equal(stopped.rewards, going_on.rewards[: stopped.steps])
    env.close()
    stopping.close()


def test_a_lower_grade_fails_at_metaworld():
    env = make("metaworld:reach-v3", stop_on_success=True)
    scores = {}
    for grade in (1.0, 0.0):
        policy = make_expert("metaworld:reach-v3", grade)
        scores[grade] = sum(bool(p.success) for p in play([env], policy, range(5), max_steps=120, keep=False))
    assert scores[1.0] == 5
    assert scores[0.0] < 5
    env.close()


def test_minigrid_speaks_its_mission_and_counts_only_reward_as_success():
    env = make("minigrid:MiniGrid-Empty-5x5-v0")
    observation, info = env.reset(seed=0)
    assert env.prompt == "get to the green goal square"
    assert observation["view"].reshape(7, 7, 20)[..., :11].sum() == 49
    assert info["success"] is False
    right, forward = 1, 2
    for action in (forward, forward, right, forward, forward):
        observation, reward, terminated, _, info = env.step(action)
    assert terminated
    assert reward > 0
    assert info["success"] is True
    assert observation["direction"].tolist() == [0, 1, 0, 0]
    env.close()


def test_control_suite_ends_by_time_only():
    env = ControlSuite("cartpole", "balance", time_limit=0.05)
    env.reset(seed=0)
    *_, terminated, truncated, _ = [env.step(np.zeros(1)) for _ in range(5)][-1]
    assert (terminated, truncated) == (False, True)
    env.close()


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("gmy:Hopper-v5", {}, "did you mean 'gym'"),
        ("Hopper-v5", {}, "no name"),
        ("gym:Hoper-v5", {}, "did you mean 'Hopper-v5'"),
        ("dmc:walker-wlak", {}, "did you mean 'walker-walk'"),
        ("metaworld:drawer-opn-v3", {}, "did you mean 'drawer-open-v3'"),
        ("minigrid:MiniGrid-DoorKey-5x5-v9", {}, "did you mean"),
        ("robotics:FetchReech-v4", {}, "did you mean 'FetchReach"),
        ("ale:Pnog-v5", {}, "did you mean 'Pong-v5'"),
        ("offbook:poor", {}, "did you mean 'pour'"),
        ("gym:Hopper-v5", {"colour": "red"}, "colour"),
        ("dmc:walker-walk", {"colour": "red"}, "colour"),
        ("metaworld:reach-v3", {"colour": "red"}, "colour"),
        ("offbook:pour", {"colour": "red"}, "colour"),
        ("gym:CartPole-v1", {"image_size": 64}, "a world of MuJoCo"),
        ("offbook:keyed-door", {"image_size": 64}, "a world of MuJoCo"),
        ("offbook:darkpoint", {"goal": "hiden"}, "did you mean 'hidden'"),
        ("offbook:darkpoint", {"trials": 0}, "trials: expected an integer of 1 or more, got 0"),
        ("offbook:darkpoint", {"trials": True}, "got True"),
    ],
)
def test_wrong_names_and_settings_are_explained_in_one_line(env_id, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(env_id, **settings)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named():
    with pytest.raises(MissingExtraError, match="Box2D"):
        make("gym:LunarLander-v3")


def test_an_environment_without_an_expert_says_so():
    with pytest.raises(ConfigError, match="without a scripted expert"):
        make_expert("gym:Hopper-v5")
    with pytest.raises(ConfigError, match="did you mean 'reach-v3'"):
        make_expert("metaworld:reach-v4")
    with pytest.raises(ConfigError, match="grade"):
        make_expert("offbook:pour", 1.5)


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, **environment},
        check=False,
    )


def test_what_is_left_open_at_exit_is_closed_quietly_and_gl_is_chosen_by_itself():
    done = python(
        "import os\n"
        "from offbook.sim.adapters import make\n"
        "pour = make('offbook:pour'); pour.reset(seed=0); pour.render()\n"
        "walker = make('dmc:walker-walk', image_size=32); walker.reset(seed=0)\n"
        "hopper = make('gym:Hopper-v5'); hopper.reset(seed=0); hopper.render()\n"
        "print(os.environ['MUJOCO_GL'])\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ("egl", "osmesa")


def test_without_graphics_states_work_and_pictures_are_explained():
    done = python(
        "from offbook.sim.adapters import make\n"
        "from offbook.errors import ConfigError\n"
        "make('offbook:pour', image_size=0).reset(seed=0)\n"
        "make('gym:Hopper-v5').reset(seed=0)\n"
        "try:\n"
        "    make('offbook:pour').reset(seed=0)\n"
        "except ConfigError as error:\n"
        "    print(error)\n",
        MUJOCO_GL="disable",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("MUJOCO_GL=disable")
    assert "libegl1" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_way_to_draw_that_is_not_there_is_explained():
    done = python(
        "from offbook.sim.adapters import make\n"
        "from offbook.errors import ConfigError\n"
        "try:\n"
        "    make('offbook:pour').reset(seed=0)\n"
        "except ConfigError as error:\n"
        "    print(error)\n",
        MUJOCO_GL="nonsense",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MUJOCO_GL=nonsense")
    assert done.stdout.count("\n") == 1


def test_a_command_without_graphics_ends_in_one_line_and_leaves_nothing(tmp_path):
    words = ["data", "record", "offbook:pour", "--episodes", "1", "--out", str(tmp_path / "pour")]
    done = python(f"import sys\nfrom offbook.cli.main import main\nsys.exit(main({words!r}))\n", MUJOCO_GL="disable")
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("offbook: MUJOCO_GL=disable: expected a way to draw without a screen")
    assert "libegl1" in last
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_installation_without_simulators_names_the_extra():
    done = python(
        "import sys\n"
        "sys.modules['gymnasium'] = None\n"
        "from offbook.errors import MissingExtraError\n"
        "try:\n"
        "    import offbook.sim.adapters\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'offbook[sim]'" in done.stdout
