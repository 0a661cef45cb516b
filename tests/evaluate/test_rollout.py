from dataclasses import replace

import line_world
import numpy as np
import pytest
from line_world import walker
from PIL import Image

from offbook.client.protocol import ActionSpec, FunctionPolicy, ObservationSpec, PolicyMeta
from offbook.data.clips import probe
from offbook.errors import ConfigError, PolicyError
from offbook.evaluate.figures import draw_evaluations
from offbook.evaluate.rollout import evaluate_policy, pictures_for
from offbook.evaluate.stats import bounded_mean, clopper_pearson
from offbook.evaluate.trials import compare, compare_all
from offbook.runs.seeding import evaluation_seeds, training_seeds


def evaluated(stride=0.5, **settings):
    return evaluate_policy(line_world.NAME, walker(stride), **({"episodes": 12} | settings))


def test_summary_of_known_episodes():
    result = evaluated()
    assert [episode.seed for episode in result.results] == evaluation_seeds(0, 12)
    assert not set(evaluation_seeds(0, 12)) & set(training_seeds(0, 1000))
    # In six steps of 0.5 the walk gets to 1 from starts above -2.
    starts = [float(np.random.Generator(np.random.PCG64(e.seed)).uniform(-3, 0)) for e in result.results]
    assert [episode.success for episode in result.results] == [start >= -2 for start in starts]
    assert result.summary["success"] == clopper_pearson(sum(start >= -2 for start in starts), 12)
    assert result.summary["score"] == bounded_mean(np.clip(np.array(starts) + 3, 0, 1), 0.0, 1.0)
    assert result.metric == "score"
    assert [e.return_ for e in result.results] == [float(bool(e.success)) for e in result.results]
    assert evaluated(seed=1).results != result.results


def test_how_many_play_at_once_makes_no_difference():
    assert evaluated(parallel=1) == evaluated(parallel=5) == evaluated(parallel=50)


def test_processes_make_no_difference():
    action = ActionSpec(size=1, low=(-2.0,), high=(2.0,))
    meta = PolicyMeta(name="push", observation=ObservationSpec(state=(("observation", 3),)), action=action)
    policy = FunctionPolicy(meta, lambda state, images: 2 * state[:1])
    alone, both = (evaluate_policy("gym:Pendulum-v1", policy, episodes=5, max_steps=20, jobs=jobs) for jobs in (1, 2))
    assert alone == both
    assert "success" not in alone.summary
    assert alone.metric == "return"
    assert {episode.steps for episode in alone.results} == {20}


def test_videos_of_the_first_episodes(tmp_path):
    result = evaluated(video_dir=tmp_path / "clips", videos=2, parallel=3)
    assert [episode.video for episode in result.results[:3]] == [
        tmp_path / "clips" / "episode-000.mp4",
        tmp_path / "clips" / "episode-001.mp4",
        None,
    ]
    for episode in result.results[:2]:
        clip = probe(episode.video)
        assert (clip.frames, clip.height, clip.width, clip.fps) == (episode.steps + 1, 20, 30, 5.0)
    assert len(list((tmp_path / "clips").iterdir())) == 2


def test_an_environment_that_cannot_draw_gives_no_videos(tmp_path):
    result = evaluated(video_dir=tmp_path / "clips", settings={"blind": True}, episodes=2)
    assert {episode.video for episode in result.results} == {None}
    assert not (tmp_path / "clips").exists()


def test_scenes_arrange_each_episode():
    scenes = [{"start": -2.5}, {"start": 0.0}, {"start": -2.0}]
    result = evaluated(scenes=scenes, episodes=3)
    assert [episode.success for episode in result.results] == [False, True, True]
    assert [episode.steps for episode in result.results] == [6, 2, 6]
    assert result.to_json()["scenes"] == scenes
    with pytest.raises(ConfigError, match="expected 2, one for each"):
        evaluated(scenes=scenes, episodes=2)


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"parallel": 0}, {"max_steps": 0}, {"jobs": 0}])
def test_counts_that_make_no_sense(bad):
    with pytest.raises(ConfigError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        evaluated(**bad)


@pytest.mark.faults
def test_a_policy_for_another_robot_is_refused_with_both_sides():
    with pytest.raises(ConfigError, match=r"'joints' of size 7, got .*place.*1"):
        evaluate_policy(line_world.NAME, walker(1.0, part=("joints", 7)), episodes=1)
    policy = walker(1.0)
    policy.meta = replace(policy.meta, action=ActionSpec(size=2, low=(-1.0,) * 2, high=(1.0,) * 2))
    with pytest.raises(ConfigError, match=r"actions of size 2.*got size 1"):
        evaluate_policy(line_world.NAME, policy, episodes=1)


@pytest.mark.faults
def test_a_policy_that_answers_nan_is_named():
    with pytest.raises(PolicyError, match=r"'walker'.*finite action"):
        evaluated(float("nan"), episodes=1)


def test_pictures_only_for_those_who_look():
    assert pictures_for("offbook:pour", ObservationSpec()) == {"image_size": 0}
    assert pictures_for("gym:Hopper-v5", ObservationSpec(cameras={"image": (48, 48)})) == {"image_size": 48}
    assert pictures_for("ale:Pong-v5", ObservationSpec(cameras={"observation": (210, 160)})) == {"image_size": 0}


def test_paired_comparison():
    fast, slow = evaluated(0.9), replace(evaluated(0.4), policy="slow")
    comparison = compare(fast, slow)
    only_fast = sum(bool(a.success) and not b.success for a, b in zip(fast.results, slow.results, strict=True))
    assert only_fast > 0
    assert (comparison.first_only, comparison.second_only) == (only_fast, 0)
    assert comparison.p_value == pytest.approx(min(1.0, 2 * 0.5**only_fast))
    difference = np.mean([a.score - b.score for a, b in zip(fast.results, slow.results, strict=True)])
    assert comparison.difference.value == pytest.approx(difference)
    assert comparison.verdict == "walker better"
    assert compare(slow, fast).verdict == "walker better"
    assert compare(fast, replace(fast, policy="twin")).verdict == "not separated"
    pairs = compare_all([fast, slow, replace(fast, policy="twin")])
    assert [(pair.first, pair.second) for pair in pairs] == [("walker", "slow"), ("walker", "twin"), ("slow", "twin")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "the same episodes"),
        ({"episodes": 3}, "the same episodes"),
        ({"settings": {"blind": True}}, "the same settings"),
        ({"scenes": [{"start": -1.0}] * 4}, "the same scenes"),
    ],
)
def test_only_the_same_episodes_are_compared(other, message):
    with pytest.raises(ConfigError, match=message):
        compare(evaluated(episodes=4), evaluated(**({"episodes": 4} | other)))


def test_the_figure_is_a_picture(tmp_path):
    one = evaluated(episodes=1)
    draw_evaluations(tmp_path / "one.png", [one])
    draw_evaluations(tmp_path / "two.png", [one, replace(one, policy="twin")])
    sizes = []
    for name in ("one.png", "two.png"):
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] > 300
    assert sizes[1][1] > sizes[0][1]
