"""Collected data against episodes that are known beforehand, and policies against their formula."""

import json
import math

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import save_file

from rtb_rl.errors import InputError
from rtb_rl.rl.data import behaviour, collect
from rtb_rl.rl.episodes.evaluation import derived_seed, evaluate
from rtb_rl.rl.episodes.rollout import roll_out

ENV_ID = "Countdown-v0"
BOX = (np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))
SHIPPED = behaviour.BEHAVIOURS_PATH
NAMES = ("early0", "early1", "medium", "expert")


class Countdown(gymnasium.Env):
    """Lasts 2 to 9 steps by its seed, cut after 6; pays the first action."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(*BOX)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.time = int(self.np_random.integers(2, 10)), 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        assert self.time < min(self.length, 6), "stepped after its end"
        self.time += 1
        observation = np.array([self.length, self.time])
        return observation, float(action[0]), self.time == self.length, self.time == 6, {}


@pytest.fixture(autouse=True)
def countdown(monkeypatch, tmp_path):
    gymnasium.register(ENV_ID, f"{__name__}:Countdown")
    monkeypatch.setitem(behaviour.ENVIRONMENTS, "countdown", ENV_ID)
    monkeypatch.setattr(behaviour, "BEHAVIOURS_PATH", tmp_path / "behaviours")
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    write_behaviours(tmp_path / "behaviours/countdown.safetensors")
    yield
    del gymnasium.registry[ENV_ID]


def write_behaviours(path, observation_size=2, action_size=2):
    """Random weights; policy number i has its biases of `mean` at i - 2, to tell them apart."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"layer0": (64, observation_size), "layer1": (64, 64)}
    sizes |= {"mean": (action_size, 64), "log_std": (action_size, 64)}
    tensors, metadata = {}, {}
    for number, name in enumerate(NAMES):
        for layer, size in sizes.items():
            tensors[f"{name}.{layer}.weight"] = 0.1 * torch.randn(size, generator=generator)
            tensors[f"{name}.{layer}.bias"] = torch.randn(size[:1], generator=generator)
        tensors[f"{name}.mean.bias"] = torch.full((action_size,), float(number - 2))
        metadata[name] = json.dumps({"step": 10 * number, "mean_return": 1.5})
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return tensors


class Label:
    """Acts with a number that never comes twice, to trace every row; ignores its generator."""

    def __init__(self):
        self.calls = 0

    def act(self, observations, *, generator):
        self.calls += 1
        first = torch.arange(len(observations)) / 1e5 + self.calls / 1e3
        return torch.stack([first, torch.zeros(len(observations))], 1)


def known_lengths(seed, number):
    env = Countdown()
    return [int(env.reset(seed=derived_seed(seed, 1, i))[0][0]) for i in range(number)]


@pytest.mark.parametrize("num_environments", [1, 4, 20])
@pytest.mark.parametrize("steps", [1, 37, 200])
def test_roll_out_takes_whole_episodes_in_order_of_start_and_cuts_the_last(steps, num_environments):
    taken = []
    policy = Label()
    episodes = roll_out(
        policy,
        ENV_ID,
        steps=steps,
        seed=3,
        num_environments=num_environments,
        progress=taken.append,
    )
    natural = known_lengths(3, len(episodes))
    whole = [min(length, 6) for length in natural]
    lengths = [len(episode) for episode in episodes]
    assert sum(lengths) == sum(taken) == steps
    assert lengths[:-1] == whole[:-1] and 1 <= lengths[-1] <= whole[-1]
    for episode, length, own in zip(episodes, lengths, natural, strict=True):
        np.testing.assert_array_equal(episode.observations[:, 0], own)
        np.testing.assert_array_equal(episode.observations[:, 1], np.arange(length + 1))
        np.testing.assert_array_equal(episode.rewards, episode.actions[:, 0].astype(float))
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
        assert episode.terminations[-1] == (length == own)
        assert episode.truncations[-1] != episode.terminations[-1]
    rewards = np.concatenate([episode.rewards for episode in episodes])
    assert len(np.unique(rewards)) == steps


def test_behaviour_policy_is_a_squashed_gaussian_in_the_box(tmp_path):
    tensors = write_behaviours(tmp_path / "p.safetensors")
    policies = behaviour.read_behaviours(tmp_path / "p.safetensors", BOX)
    assert tuple(policies) == NAMES
    assert policies["medium"].step == 20 and policies["medium"].mean_return == 1.5
    observations = torch.randn((5, 2), generator=torch.Generator().manual_seed(1))
    actions = policies["expert"].act(observations, generator=torch.Generator().manual_seed(2))
    weights = {key: value.double().numpy() for key, value in tensors.items()}

    def layer(x, name):
        return x @ weights[f"expert.{name}.weight"].T + weights[f"expert.{name}.bias"]

    hidden = np.maximum(layer(observations.double().numpy(), "layer0"), 0)
    hidden = np.maximum(layer(hidden, "layer1"), 0)
    noise = torch.randn((5, 2), generator=torch.Generator().manual_seed(2)).numpy()
    std = np.exp(np.clip(layer(hidden, "log_std"), -20, 2))
    squashed = np.tanh(layer(hidden, "mean") + std * noise)
    np.testing.assert_allclose(actions, [0, 2] + squashed * [1, 2], atol=1e-5)


def test_spread_of_a_behaviour_policy_is_clipped():
    zero = (torch.zeros(1, 1), torch.zeros(1))
    layers = {"layer0": zero, "layer1": zero, "mean": zero}
    one = torch.ones(1)
    for log_std, std in ((50.0, math.exp(2)), (-50.0, math.exp(-20))):
        layers["log_std"] = (torch.zeros(1, 1), torch.tensor([log_std]))
        policy = behaviour.BehaviourPolicy(layers, -one, one, 0, 0.0)
        actions = policy.act(torch.zeros(4000, 1), generator=torch.Generator().manual_seed(0))
        noise = torch.randn((4000, 1), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(actions, torch.tanh(std * noise))


def load(tmp_path, dataset_id, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset(dataset_id)
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    return dataset


def arrays(dataset):
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return {n: np.concatenate([getattr(e, n) for e in dataset.iterate_episodes()]) for n in names}


@pytest.mark.parametrize(
    ("level", "shares"),
    [
        ("medium", {"medium": 101}),
        ("expert", {"expert": 101}),
        ("medium-expert", {"medium": 51, "expert": 50}),
        ("medium-replay", {"early0": 34, "early1": 34, "medium": 33}),
    ],
)
def test_each_policy_of_a_recipe_acts_for_its_share(level, shares, tmp_path, monkeypatch):
    dataset_id = collect.collect(f"countdown-{level}", steps=101, seed=1, datasets_path=tmp_path)
    assert dataset_id == f"local/countdown/{level}-v0"
    dataset = load(tmp_path, dataset_id, monkeypatch)
    policies = behaviour.load_behaviours("countdown")
    expected = []
    for index, (name, steps) in enumerate(shares.items()):
        seed = derived_seed(1, index)
        expected += roll_out(policies[name], ENV_ID, steps=steps, seed=seed)
    assert dataset.total_steps == 101
    for key, values in arrays(dataset).items():
        wanted = np.concatenate([getattr(episode, key) for episode in expected])
        np.testing.assert_array_equal(values, wanted)


def test_random_actions_fill_the_box(tmp_path, monkeypatch):
    collect.collect("countdown-random", steps=2000, seed=1, datasets_path=tmp_path)
    actions = arrays(load(tmp_path, "local/countdown/random-v0", monkeypatch))["actions"]
    np.testing.assert_allclose(actions.mean(0), [0, 2], atol=0.1)
    np.testing.assert_allclose(actions.std(0), np.array([2, 4]) / math.sqrt(12), atol=0.05)


def test_equal_seeds_give_equal_arrays_and_others_other_ones(tmp_path, monkeypatch):
    found = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        settings = {"steps": 60, "seed": seed, "datasets_path": tmp_path / folder}
        dataset_id = collect.collect("countdown-medium", **settings)
        found.append(arrays(load(tmp_path / folder, dataset_id, monkeypatch)))
    for key in found[0]:
        np.testing.assert_array_equal(found[0][key], found[1][key])
    assert not np.array_equal(found[0]["actions"], found[2]["actions"])


def test_metadata_says_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "reference_returns", {"countdown-medium": (-1.0, 3.0)}.get)
    collect.collect("countdown-medium", steps=30, seed=7, datasets_path=tmp_path)
    dataset = load(tmp_path, "local/countdown/medium-v0", monkeypatch)
    metadata = dataset.storage.metadata
    stamp = metadata["rtb_rl"]
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-1.0, 3.0)
    assert dataset.env_spec.id == ENV_ID == stamp["environment"]
    assert (stamp["recipe"], stamp["steps"], stamp["seed"]) == ("countdown-medium", 30, 7)
    assert stamp["versions"]["gymnasium"] == gymnasium.__version__
    assert f"gymnasium {gymnasium.__version__}" in metadata["description"]
    assert "mujoco" in stamp["versions"]


def test_an_existing_data_set_is_kept_refused_or_overwritten(tmp_path, monkeypatch, capsys):
    settings = {"steps": 30, "datasets_path": tmp_path}
    dataset_id = collect.collect("countdown-medium", seed=1, **settings)
    file = tmp_path / dataset_id / "data/main_data.hdf5"
    before = file.stat().st_mtime_ns
    assert collect.collect("countdown-medium", seed=1, **settings) == dataset_id
    assert "kept" in capsys.readouterr().err
    with pytest.raises(InputError, match="seed 1 not 2"):
        collect.collect("countdown-medium", seed=2, **settings)
    assert file.stat().st_mtime_ns == before
    collect.collect("countdown-medium", seed=2, overwrite=True, **settings)
    assert load(tmp_path, dataset_id, monkeypatch).storage.metadata["rtb_rl"]["seed"] == 2


def test_a_broken_off_collection_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(collect.minari, "create_dataset_from_buffers", fail)
    with pytest.raises(KeyboardInterrupt):
        collect.collect("countdown-medium", steps=30, seed=1, datasets_path=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"behaviours", ".local_countdown_medium-v0.lock"}


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("countdown-best", "medium-replay"),
        ("pong-medium", "hopper"),
        ("medium", "medium-expert"),
        ("walker2d-medium", "only for: countdown"),
    ],
)
def test_unknown_recipes_are_refused_with_those_that_exist(recipe, text, tmp_path):
    with pytest.raises(InputError, match=text):
        collect.collect(recipe, steps=10, seed=0, datasets_path=tmp_path)


def test_wrong_steps_folder_and_id_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (
        {"steps": 0},
        {"datasets_path": tmp_path / "file"},
        {"dataset_id": "no version"},
        {"seed": -1},
    ):
        settings = {"steps": 10, "seed": 0, "datasets_path": tmp_path} | wrong
        with pytest.raises(InputError):
            collect.collect("countdown-medium", **settings)


@pytest.mark.mujoco
@pytest.mark.parametrize("name", ["hopper", "halfcheetah", "walker2d"])
def test_shipped_policies_are_as_good_as_their_file_says(name, monkeypatch):
    monkeypatch.setattr(behaviour, "BEHAVIOURS_PATH", SHIPPED)
    if not (SHIPPED / f"{name}.safetensors").is_file():
        pytest.skip(f"no behaviour policies are shipped for {name}")
    policies = behaviour.load_behaviours(name)
    assert next(iter(policies)).startswith("early") and {"medium", "expert"} <= set(policies)
    returns = {
        key: evaluate(policies[key], behaviour.ENVIRONMENTS[name], episodes=4, seed=0).returns
        for key in ("early0", "medium", "expert")
    }
    means = {key: np.mean(values) for key, values in returns.items()}
    assert means["early0"] < means["medium"] < means["expert"]
    assert means["expert"] == pytest.approx(policies["expert"].mean_return, rel=0.3)


def test_files_that_hold_no_policies_for_the_environment_are_refused(tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("not a tensor")
    with pytest.raises(InputError, match="is not a file of behaviour policies"):
        behaviour.read_behaviours(text, BOX)
    write_behaviours(tmp_path / "wide.safetensors", action_size=3)
    with pytest.raises(InputError, match="actions of 3 numbers, the environment of 2"):
        behaviour.read_behaviours(tmp_path / "wide.safetensors", BOX)
