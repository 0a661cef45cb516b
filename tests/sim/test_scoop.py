"""Scooping: what counts as lifted, what varies, and how far expert and random policy are apart."""

import numpy as np
import pytest

from offbook.errors import ConfigError
from offbook.sim.adapters import make
from offbook.sim.experts import make_expert, random_policy
from offbook.sim.play import play
from offbook.sim.tabletop import arm
from offbook.sim.tabletop.scene import NEW_POSITIONS, SEEN_POSITIONS, SPLITS, Scene, ScoopScene, scenes
from offbook.sim.tabletop.scoop import CLEAR, SPOON_DEPTH, SPOON_FOOT, START, Scoop, spoon_frame, spoonful


@pytest.fixture
def env():
    env = Scoop(image_size=32)
    yield env
    env.close()


@pytest.fixture
def blind():
    env = Scoop(image_size=0)
    yield env
    env.close()


def test_the_spoon_is_where_its_frame_says(blind):
    for radius in (0.034, 0.038):
        blind.reset(seed=0, options={"scene": {"spoon_radius": radius}})
        hand, spoon = arm.forward(blind._data.qpos[:7])[7], blind._data.body("spoon")
        bottom, axis = spoon_frame(radius)
        np.testing.assert_allclose(hand[:3, 3] + hand[:3, :3] @ bottom, spoon.xpos, atol=1e-6)
        np.testing.assert_allclose(hand[:3, :3] @ axis, spoon.xmat.reshape(3, 3)[:, 2], atol=1e-6)


def test_the_spoon_reaches_all_places_in_and_above_the_bowl():
    bottom, axis = spoon_frame(0.036)
    up = np.array([0.0, 0.0, 1.0])
    for x, y in (*SEEN_POSITIONS, *NEW_POSITIONS):
        for height in (0.02, 0.2):
            goal = np.array([x, y, height])
            wanted = {"point": bottom, "axis": axis, "target_point": goal, "target_axis": up}
            joints = arm.reach(START, **wanted, rest=START, iterations=60)
            hand = arm.forward(joints)[7]
            assert np.linalg.norm(hand[:3, 3] + hand[:3, :3] @ bottom - goal) < 2e-3
            assert (hand[:3, :3] @ axis) @ up > 0.999


def test_equal_seeds_give_bit_equal_episodes_whatever_was_played_before(env):
    policy = make_expert("offbook:scoop", 0.99)  # with noise, which is repeated too
    first = next(play([env], policy, [7], max_steps=50))
    list(play([env], policy, [8], max_steps=5))
    list(play([env], policy, [7], max_steps=40))  # of the same scene: what was touched then is not awake still
    again = next(play([env], policy, [7], max_steps=50))
    other = Scoop(image_size=32)
    fresh = next(play([other], policy, [7], max_steps=50))
    other.close()
    assert first.fields["objects"][-1, 6] > 0  # grains were touched
    for name, values in first.fields.items():
        np.testing.assert_array_equal(values, again.fields[name], err_msg=name)
        np.testing.assert_array_equal(values, fresh.fields[name], err_msg=name)


def test_the_first_picture_shows_the_new_scene(env):
    scene_a, scene_b = {"bowl": [0.5, -0.16]}, {"bowl": [0.62, 0.16]}
    before, _ = env.reset(seed=3, options={"scene": scene_a})
    for _ in range(5):
        env.step(START + 0.3)
    after, _ = env.reset(seed=3, options={"scene": scene_b})
    assert np.abs(after["front"].astype(int) - before["front"]).max() > 60
    back, _ = env.reset(seed=3, options={"scene": scene_a})
    for name, values in before.items():
        np.testing.assert_array_equal(back[name], values)


@pytest.mark.parametrize(
    "change",
    [
        {"bowl": [0.5, 0.1]},
        {"bowl_radius": 0.095},
        {"bowl_height": 0.05},
        {"spoon_radius": 0.04},
        {"grain_radius": 0.0085},
        {"grains": 30},
        {"bowl_colour": [0.1, 0.9, 0.1]},
        {"spoon_colour": [0.9, 0.1, 0.1]},
        {"grain_colour": [0.1, 0.1, 0.9]},
        {"light_colour": [0.2, 0.2, 0.2]},
        {"light_from": [-0.9, 0.9, 0.4]},
        {"camera_shift": [0.05, 0.0, 0.0]},
    ],
)
def test_every_variation_of_the_scene_is_seen(env, change):
    usual, _ = env.reset(seed=1, options={"scene": {}})
    changed, _ = env.reset(seed=1, options={"scene": change})
    assert (usual["front"] != changed["front"]).any()
    geometric = set(change) & {"bowl", "bowl_radius", "bowl_height", "spoon_radius"}
    assert (usual["objects"] != changed["objects"]).any() == bool(geometric)


def test_friction_keeps_a_heap_from_flowing_apart(blind):
    slopes = []
    for friction in (0.05, 1.0):
        blind.reset(seed=1, options={"scene": {"friction": friction}})
        assert np.abs(blind._data.qvel).max() < 0.2
        slopes.append(blind._grains()[:, 2].std())
    assert slopes[1] > 1.05 * slopes[0]


def placed(env, lean, height):
    """Eight grains in the spoon, which leans by an angle and has the lowest point of its bottom at a height."""
    env.reset(seed=0, options={"scene": {"bowl": [0.56, 0.0]}})
    bottom, axis = spoon_frame(0.036)
    goal = np.array([0.5, 0.0, height + SPOON_FOOT * 0.036 * np.sin(lean)])
    wanted = {"point": bottom, "axis": axis, "target_point": goal, "rest": START, "iterations": 200}
    env._data.qpos[:7] = arm.reach(START, target_axis=np.array([np.sin(lean), 0.0, np.cos(lean)]), **wanted)
    env._mujoco.mj_kinematics(env._model, env._data)
    spoon = env._data.body("spoon")
    inside = np.array([[0.015 * np.cos(i), 0.015 * np.sin(i), 0.012 + 0.002 * i] for i in range(8)])
    env._grains()[:8] = spoon.xpos + inside @ spoon.xmat.reshape(3, 3).T
    return env._info()


@pytest.mark.parametrize("lean", [0.0, 0.3])
def test_grains_count_when_the_lowest_point_of_the_spoon_is_clear_of_the_rim(blind, lean):
    full = spoonful(0.036, 0.0098)
    assert full == 7
    above = placed(blind, lean, 0.06 + CLEAR + 0.002)
    assert above == {"score": 1.0, "success": True, "lifted": 8, "in_spoon": 8}
    # Some out of the spoon: beside it, below it, and far above it.
    spoon = blind._data.body("spoon")
    away = np.array([[0.04, 0.0, 0.01], [0.0, 0.0, -0.01], [0.0, 0.0, SPOON_DEPTH + 0.05]])
    blind._grains()[:3] = spoon.xpos + away @ spoon.xmat.reshape(3, 3).T
    assert blind._info()["score"] == pytest.approx(5 / full)
    below = placed(blind, lean, 0.06 + CLEAR - 0.002)
    assert (below["score"], below["success"], below["lifted"]) == (0.0, False, 0)
    assert below["in_spoon"] == 8


def test_a_level_spoon_holds_what_the_geometry_says():
    # The room below the rim, summed up slice by slice.
    radii = np.linspace(SPOON_FOOT * 0.036, 0.036, 2001)
    room = np.mean(np.pi * radii**2) * SPOON_DEPTH
    assert spoonful(0.036, 0.002) == pytest.approx(0.6 * room / (4 / 3 * np.pi * 0.002**3), abs=2)
    assert spoonful(0.042, 0.008) > spoonful(0.036, 0.008) > spoonful(0.036, 0.012) > 0


def test_the_reward_is_sparse_and_the_episode_ends_when_the_spoon_is_held_up(blind):
    played = next(play([blind], make_expert("offbook:scoop"), [2]))
    assert not played.rewards[:-1].any()
    assert played.rewards[-1] == played.score >= 0.8
    assert (played.success, played.terminated, played.truncated) == (True, True, False)
    assert 60 <= played.steps < 180
    held = played.fields["objects"][-16:, 6]
    assert (held == held[-1]).all()
    assert held[-1] > 0
    # A spoon beside the bowl holds nothing that counts, and does not end an episode.
    blind.reset(seed=0)
    for step in range(180):
        _, reward, terminated, truncated, info = blind.step(START)
        assert (terminated, truncated) == (False, step == 179)
    assert (reward, info["score"], info["success"]) == (0.0, 0.0, False)


def test_expert_and_random_are_far_apart_on_every_split(blind):
    options = [{"scene": scenes(split, 1, 9, "scoop")[0]} for split in SPLITS]
    expert = list(play([blind], make_expert("offbook:scoop"), range(5), options=options, keep=False))
    assert np.mean([played.score for played in expert]) >= 0.85
    floor = next(play([blind], random_policy(blind), [1], keep=False))
    assert floor.score <= 0.05
    hopeless = list(play([blind], make_expert("offbook:scoop", 0.0), range(3), keep=False))
    assert np.mean([played.score for played in hopeless]) <= 0.5


@pytest.mark.slow
def test_anchors_over_forty_seeds(blind):
    seeds = range(1000, 1040)

    def scores(policy):
        return np.array([played.score for played in play([blind], policy, seeds, keep=False)])

    expert, middling, hopeless = (scores(make_expert("offbook:scoop", grade)) for grade in (1.0, 0.6, 0.0))
    assert expert.mean() >= 0.9
    assert scores(random_policy(blind)).mean() <= 0.05
    assert expert.mean() > middling.mean() + 0.05 > hopeless.mean() + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_expert_scoops_whatever_is_new(blind, split):
    options = [{"scene": scene} for scene in scenes(split, 20, 31, "scoop")]
    expert = [p.score for p in play([blind], make_expert("offbook:scoop"), range(20), options=options, keep=False)]
    assert np.mean(expert) >= 0.8


def test_splits_change_what_they_say_and_nothing_else():
    drawn = {split: [ScoopScene.from_json(scene) for scene in scenes(split, 40, 4, "scoop")] for split in SPLITS}
    seen, new = drawn["seen"], drawn["object"]
    for name in ("bowl_radius", "bowl_height", "spoon_radius", "grain_radius", "friction", "bowl_colour"):
        assert not {getattr(scene, name) for scene in seen} & {getattr(scene, name) for scene in new}, name
        same = [{getattr(scene, name) for scene in drawn[split]} for split in ("seen", "position", "lighting")]
        assert same[0] == same[1] == same[2]
    assert {scene.light_colour for scene in seen} == {ScoopScene().light_colour}
    assert len({scene.light_colour for scene in drawn["all"]}) == 40
    # The bowl stands where it stands for pouring.
    assert [scene.bowl for scene in seen] == [tuple(scene["bowl"]) for scene in scenes("seen", 40, 4)]


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ({"cup_radius": 0.034}, "unknown"),
        ({"grains": 5}, r"scene\.grains: expected values from 12 to 60"),
        ({"grains": 20.5}, "type int"),
        ({"friction": float("nan")}, r"scene\.friction"),
    ],
)
def test_scenes_that_make_no_sense_are_refused(blind, scene, message):
    with pytest.raises(ConfigError, match=message):
        blind.reset(seed=0, options={"scene": scene})


def test_the_other_tasks_scene_and_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match="spoon_radius"):
        Scene.from_json(scenes("seen", 1, 0, "scoop")[0])
    with pytest.raises(ConfigError, match="did you mean 'scoop'"):
        scenes("seen", 1, 0, "scop")
    with pytest.raises(ConfigError, match="did you mean 'scoop'"):
        make("offbook:scop")
