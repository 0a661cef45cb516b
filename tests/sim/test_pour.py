from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from offbook.errors import ConfigError
from offbook.sim.experts import make_expert, random_policy
from offbook.sim.play import play
from offbook.sim.tabletop import arm
from offbook.sim.tabletop.pour import GRAINS, SPLITS, START, Pour, cup_frame, scenes
from offbook.sim.tabletop.scene import NEW_POSITIONS, SEEN_POSITIONS, Scene


@pytest.fixture
def env():
    env = Pour(image_size=32)
    yield env
    env.close()


@pytest.fixture
def blind():
    env = Pour(image_size=0)
    yield env
    env.close()


def test_the_kinematics_are_those_of_the_simulated_arm(blind):
    blind.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        joints = rng.uniform(arm.LOW, arm.HIGH)
        blind._data.qpos[:7] = joints
        blind._mujoco.mj_kinematics(blind._model, blind._data)
        hand = blind._data.body("hand")
        pose = arm.forward(joints)[7]
        np.testing.assert_allclose(pose[:3, 3], hand.xpos, atol=1e-9)
        np.testing.assert_allclose(pose[:3, :3].ravel(), hand.xmat, atol=1e-9)


def test_inverse_kinematics_reaches_places_above_the_table_and_keeps_the_limits():
    point, axis = cup_frame(0.034)
    up = np.array([0.0, 0.0, 1.0])
    for x, y in (*SEEN_POSITIONS, *NEW_POSITIONS):
        goal = np.array([x, y, 0.25])
        joints = arm.reach(START, point=point, axis=axis, target_point=goal, target_axis=up, rest=START, iterations=60)
        pose = arm.forward(joints)[7]
        assert np.linalg.norm(pose[:3, 3] + pose[:3, :3] @ point - goal) < 2e-3
        assert (pose[:3, :3] @ axis) @ up > 0.999
        assert ((joints >= arm.LOW) & (joints <= arm.HIGH)).all()


def test_equal_seeds_give_bit_equal_episodes_whatever_was_played_before(env):
    policy = random_policy(env)
    first = next(play([env], policy, [7], max_steps=25))
    list(play([env], policy, [8], max_steps=10))
    again = next(play([env], policy, [7], max_steps=25))
    other = Pour(image_size=32)
    fresh = next(play([other], policy, [7], max_steps=25))
    other.close()
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
    np.testing.assert_array_equal(back["front"], before["front"])
    np.testing.assert_array_equal(back["joints"], before["joints"])


@pytest.mark.parametrize(
    "change",
    [
        {"bowl": [0.5, 0.1]},
        {"bowl_radius": 0.1},
        {"cup_radius": 0.04},
        {"bowl_colour": [0.1, 0.9, 0.1]},
        {"light_colour": [0.2, 0.2, 0.2]},
        {"light_from": [-0.9, 0.9, 0.4]},
        {"camera_shift": [0.05, 0.0, 0.0]},
    ],
)
def test_every_variation_of_the_scene_is_seen(env, change):
    usual, _ = env.reset(seed=1, options={"scene": {}})
    changed, _ = env.reset(seed=1, options={"scene": change})
    assert (usual["front"] != changed["front"]).any()
    geometric = set(change) & {"bowl", "bowl_radius", "cup_radius"}
    assert (usual["objects"] != changed["objects"]).any() == bool(geometric)


def test_grains_can_be_seen_in_the_bowl_in_their_colour(env):
    plain, _ = env.reset(seed=1, options={"scene": {"grain_colour": [1.0, 0.0, 1.0]}})
    played = next(play([env], make_expert("offbook:pour"), [1], options=[{"scene": {"grain_colour": [1.0, 0.0, 1.0]}}]))

    def purple(picture):
        red, green, blue = picture[..., 0].astype(int), picture[..., 1].astype(int), picture[..., 2].astype(int)
        return int(((red > green + 80) & (blue > green + 80)).sum())

    assert purple(played.fields["front"][-1]) > purple(plain["front"]) + 3


def test_observations_are_copies_and_inside_the_space(env):
    observation, info = env.reset(seed=2)
    kept = {name: values.copy() for name, values in observation.items()}
    assert env.observation_space.contains(observation)
    assert info == {"score": 0.0, "success": False, "in_cup": 1.0}
    for _ in range(3):
        later, *_ = env.step(START - 0.2)
    assert env.observation_space.contains(later)
    for name, values in kept.items():
        np.testing.assert_array_equal(observation[name], values)
    assert (later["joints"] != observation["joints"]).any()


def test_joints_keep_their_limits_and_speed_whatever_is_asked(blind):
    before = blind.reset(seed=0)[0]["joints"]
    for step in range(40):
        wanted = np.full(7, 100.0 if step < 20 else -100.0)
        joints = blind.step(wanted)[0]["joints"]
        assert ((joints >= arm.LOW.astype(np.float32)) & (joints <= arm.HIGH.astype(np.float32))).all()
        # A servo may run ahead of its target for a moment, never by much.
        assert (np.abs(joints - before) <= 1.5 * arm.MAX_VELOCITY / 30 + 0.02).all()
        before = joints


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.array([0, 0, 0, np.inf, 0, 0, 0.0])])
def test_actions_that_are_no_joint_angles_are_refused_and_the_episode_goes_on(blind, action):
    before = blind.reset(seed=0)[0]["joints"]
    with pytest.raises(ConfigError, match="7 finite joint angles"):
        blind.step(action)
    np.testing.assert_array_equal(blind._observe()["joints"], before)
    blind.step(START)


def test_the_reward_is_sparse_and_the_score_exact(blind):
    played = next(play([blind], make_expert("offbook:pour"), [5]))
    assert not played.rewards[:-1].any()
    assert played.rewards[-1] == played.score == 1.0
    assert played.success
    assert played.terminated
    assert not played.truncated
    assert 60 <= played.steps <= 160
    # The score counts grains: recompute it from the positions.
    scene, grains = blind.scene, blind._grains()
    assert len(grains) == GRAINS
    inside = np.hypot(*(grains[:, :2] - scene.bowl).T) < scene.bowl_radius
    assert inside.mean() == played.score


def test_an_idle_arm_keeps_its_cup_full_until_the_time_is_up(blind):
    blind.reset(seed=0)
    for step in range(160):
        _, reward, terminated, truncated, info = blind.step(START)
        assert (terminated, truncated) == (False, step == 159)
    assert info["in_cup"] == 1.0
    assert reward == 0.0
    assert not info["success"]


def test_expert_and_random_are_far_apart_on_every_split(blind):
    for split in SPLITS:
        options = [{"scene": scene} for scene in scenes(split, 2, seed=9)]
        expert = list(play([blind], make_expert("offbook:pour"), [1, 2], options=options, keep=False))
        assert np.mean([played.score for played in expert]) >= 0.9, split
    floor = list(play([blind], random_policy(blind), [1, 2], keep=False))
    assert np.mean([played.score for played in floor]) <= 0.05


def test_a_lower_grade_pours_less(blind):
    seeds = range(6)

    def mean_score(grade):
        return np.mean([p.score for p in play([blind], make_expert("offbook:pour", grade), seeds, keep=False)])

    expert, middling, hopeless = (mean_score(grade) for grade in (1.0, 0.6, 0.0))
    assert expert > middling + 0.05 > hopeless + 0.1


def test_splits_change_what_they_say_and_nothing_else():
    n = 60
    drawn = {split: [Scene.from_json(scene) for scene in scenes(split, n, seed=4)] for split in SPLITS}

    def nearest_place(scene, places):
        return min(np.hypot(scene.bowl[0] - x, scene.bowl[1] - y) for x, y in places)

    for split, drawn_scenes in drawn.items():
        places = NEW_POSITIONS if split in ("position", "all") else SEEN_POSITIONS
        assert max(nearest_place(scene, places) for scene in drawn_scenes) <= 0.0142
    seen, new = drawn["seen"], drawn["object"]
    assert not {scene.bowl_colour for scene in seen} & {scene.bowl_colour for scene in new}
    assert not {scene.bowl_radius for scene in seen} & {scene.bowl_radius for scene in new}
    assert {scene.light_colour for scene in seen} == {Scene().light_colour}
    assert len({scene.light_colour for scene in drawn["lighting"]}) == n
    assert {scene.camera_shift for scene in drawn["position"]} == {(0.0, 0.0, 0.0)}
    assert len({scene.camera_shift for scene in drawn["all"]}) == n
    # Held-out places are well away from the seen ones.
    assert min(nearest_place(scene, SEEN_POSITIONS) for scene in drawn["position"]) > 0.04


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ({"bowls": [0.5, 0.0]}, "did you mean 'bowl'"),
        ({"bowl": [5.0, 0.0]}, r"scene\.bowl: expected values from"),
        ({"bowl": [0.5]}, "2 entries"),
        ({"bowl_radius": "wide"}, "type float"),
        ({"bowl_radius": float("nan")}, r"scene\.bowl_radius"),
    ],
)
def test_scenes_that_make_no_sense_are_refused(blind, scene, message):
    blind.reset(seed=0)
    before = blind.scene
    with pytest.raises(ConfigError, match=message):
        blind.reset(seed=0, options={"scene": scene})
    assert blind.scene == before


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="16 to 1024"):
        Pour(image_size=8)
    with pytest.raises(ConfigError, match="max_steps"):
        Pour(image_size=0, max_steps=0)
    with pytest.raises(ConfigError, match="did you mean 'position'"):
        Pour(image_size=0, split="positions")
    with pytest.raises(ConfigError, match="only 'scene'"):
        Pour(image_size=0).reset(options={"scenes": {}})


def test_the_picture_for_people_is_larger_and_does_not_disturb_the_episode(env):
    quiet = next(play([env], random_policy(env), [4], max_steps=6))
    pictures = []
    watched = next(
        play([env], random_policy(env), [4], max_steps=6, frames=lambda seed, step, env: pictures.append(env.render()))
    )
    assert [picture.shape for picture in pictures] == [(240, 320, 3)] * 7
    np.testing.assert_array_equal(quiet.fields["front"], watched.fields["front"])


def test_one_environment_can_be_played_from_several_threads_by_turns(env):
    def first_picture(seed):
        picture = env.reset(seed=seed)[0]["front"]
        env.render()
        return picture

    here = first_picture(1)
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            np.testing.assert_array_equal(pool.submit(first_picture, 1).result(), here)
    np.testing.assert_array_equal(first_picture(1), here)
