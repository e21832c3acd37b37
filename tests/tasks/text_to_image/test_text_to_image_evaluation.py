"""The comparison with weighted draws of the prior, against sums written out by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.tasks.text_to_image.evaluation import (
    Measure,
    Measured,
    Reference,
    compare,
    pixel_fields,
)
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList
from rtb_rl.tasks.text_to_image.reference import PriorDraws
from rtb_rl.tasks.text_to_image.report import markdown, reference_row
from rtb_rl.tasks.text_to_image.rewards import CheckedReward
from rtb_rl.tasks.text_to_image.target import LatentReward
from rtb_rl.training.scoring import LOG_REWARD_FLOOR

N = 101


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(log_weight, log_reward, features=None, probabilities=None):
    """Of one prompt, without latents."""
    weight = torch.as_tensor(log_weight, dtype=torch.float64).reshape(1, -1)
    n = weight.shape[1]
    features = torch.eye(n) if features is None else features
    draws = ImportanceReference(torch.zeros(1, n, 1), weight)
    return Reference(draws, Measured(torch.as_tensor(log_reward), features, probabilities))


def test_means_are_weighted_sums_with_the_error_of_the_delta_method():
    weight, values = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, -1.0, 0.5, 2.0])
    mean, error = reference(weight.log(), values).mean(values)
    expected = (5.0 - 2.0 + 1.5 + 8.0) / 10
    squares = sum(w**2 * (v - expected) ** 2 for w, v in zip(weight, values, strict=True))
    assert float(mean) == pytest.approx(expected)
    assert float(error) == pytest.approx(float(squares) ** 0.5 / 10)
    table = torch.stack([values, 2 * values], 1)
    assert reference(weight.log(), values).mean(table)[0].tolist() == pytest.approx([1.25, 2.5])


def test_the_reference_s_diversity_does_not_shrink_with_its_few_effective_draws():
    """Two draws of three have all the weight: their distance, not half of it."""
    few = reference([0.0, 0.0, -math.inf], torch.zeros(3))
    row = compare(few.measured, few)
    assert row["reference_diversity"] == pytest.approx(1.0)


def test_the_weights_of_prior_draws_are_r_to_the_beta():
    """log Z and the effective sample size of two prompts."""
    log_reward = torch.tensor([[0.0, 1.0, 2.0], [-1.0, -1.0, -1.0]])
    found = PriorDraws(torch.zeros(2, 3, 1), log_reward, 0.0).weighted(beta=2.0)
    first = [math.exp(2.0 * value) for value in (0.0, 1.0, 2.0)]
    expected = [math.log(sum(first) / 3), -2.0]
    assert found.log_z.tolist() == pytest.approx(expected)
    share = sum(first) ** 2 / (3 * sum(value**2 for value in first))
    assert found.ess.tolist() == pytest.approx([share, 1.0])


def test_draws_like_those_of_an_even_reference_differ_in_nothing():
    log_reward, probabilities = torch.arange(float(N)), torch.eye(4)[torch.arange(N) % 4].double()
    even = reference(torch.zeros(N), log_reward, probabilities=probabilities)
    row = compare(even.measured, even)
    error = float(log_reward.std()) / N**0.5
    assert (row["low"], row["median"], row["high"]) == (5.0, 50.0, 95.0)
    assert row["log_reward"] == row["reference_log_reward"] == 50.0
    assert row["log_reward_error"] == pytest.approx(error)
    assert row["reference_log_reward_error"] == pytest.approx(error * ((N - 1) / N) ** 0.5)
    assert row["log_reward_excess"] == row["collapsed"] == 0.0
    assert row["tv"] == pytest.approx(0.0, abs=1e-12)
    # orthogonal features: every pair is at cosine distance 1
    assert row["diversity"] == row["reference_diversity"] == 1.0 and row["diversity_error"] == 0.0


@pytest.mark.parametrize(("errors", "collapsed"), [(3.5, 1.0), (2.5, 0.0), (-9.0, 0.0)])
def test_more_reward_than_the_target_has_is_a_collapse(errors, collapsed):
    """Above it by more than three errors of the difference; less reward is another mistake."""
    log_reward = torch.arange(float(N))
    even = reference(torch.zeros(N), log_reward)
    variance = float(log_reward.var())
    shift = errors * (variance / N + variance / N * (N - 1) / N) ** 0.5
    moved = Measured(log_reward + shift, even.measured.features, None)
    row = compare(moved, even)
    assert row["log_reward_excess"] == pytest.approx(errors, rel=1e-5)
    assert row["collapsed"] == collapsed and "tv" not in row
    assert row["median"] == pytest.approx(50 + shift, rel=1e-6)


def test_shares_of_classes_are_those_of_the_weighted_draws():
    weight = torch.tensor([1.0, 1.0, 2.0])
    probabilities = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    held = reference(weight.log(), torch.zeros(3), probabilities=probabilities)
    other = replace(held.measured, probabilities=probabilities[[0, 0, 1]])
    row = compare(other, held)
    assert row["tv"] == pytest.approx(abs((1 + 1 + 0.5) / 3 - (1 + 0.5) / 4))


def test_features_of_pixels_are_colours_of_fields():
    grey = pixel_fields(torch.full((2, 3, 16, 24), 0.5))
    assert grey.shape == (2, 192) and (grey == 0).all()
    fields = torch.rand((2, 3, 8, 8), generator=seeded())
    large = fields.repeat_interleave(4, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(pixel_fields(large), fields.flatten(1) - 0.5)


def measure_of(reward, log_probs=None, batch=2):
    """Of latents that are images, for two prompts."""
    prompts = PromptList(("a cat", "a dog"), ({"scale": 1.0}, {"scale": 3.0}))
    prior = SimpleNamespace(decode=lambda x0: x0)
    found = LatentReward(prior, CheckedReward(reward), prompts)  # type: ignore[arg-type]
    return Measure(found, lambda images: images.flatten(1), log_probs, batch)


def test_images_are_measured_a_few_at_a_time_for_their_prompt():
    seen = []

    def reward(images, prompts, metadata):
        seen.append((len(images), set(prompts)))
        scale = torch.tensor([one["scale"] for one in metadata])
        return scale * images.mean((1, 2, 3))

    x0 = torch.rand((5, 3, 4, 4), generator=seeded())
    measure = measure_of(reward, lambda images: images.mean((2, 3)).log_softmax(1))
    found = measure(x0, 1)
    assert seen == [(2, {"a dog"}), (2, {"a dog"}), (1, {"a dog"})]
    torch.testing.assert_close(found.log_reward, 3 * x0.mean((1, 2, 3)))
    assert torch.equal(found.features, x0.flatten(1))
    assert found.probabilities is not None and found.probabilities.dtype == torch.float64
    torch.testing.assert_close(found.probabilities.float(), x0.mean((2, 3)).softmax(1))
    known = torch.arange(5.0)
    assert measure(x0, 1, known).log_reward is known and len(seen) == 3


def test_an_impossible_image_counts_as_the_floor():
    """As it does in the reference and in training: a mean of minus infinity would say nothing."""
    rewards = [0.0, -math.inf]
    found = measure_of(lambda images, *_: torch.tensor(rewards)[: len(images)])(
        torch.ones(2, 3, 4, 4), 0
    )
    assert found.log_reward.tolist() == [0.0, LOG_REWARD_FLOOR] and found.probabilities is None
    row = compare(found, reference(torch.zeros(2), found.log_reward))
    assert math.isfinite(row["log_reward"]) and math.isfinite(row["log_reward_excess"])


ROW = {
    "log_reward": -0.5,
    "log_reward_error": 0.01,
    "reference_log_reward": -0.52,
    "reference_log_reward_error": 0.02,
    "diversity": 0.6,
    "reference_diversity": 0.61,
    "reference_log_z": -1.5,
    "reference_log_z_error": 0.015,
    "reference_ess": 0.4,
    "log_z": None,
    "collapsed": 0.0,
    "training_calls": 123456,
}


def test_the_table_begins_with_the_reference_and_marks_a_collapse():
    title, _, first, *others = markdown({"a": ROW, "b": {**ROW, "collapsed": 0.6}}).splitlines()
    columns = [one.strip() for one in title.strip("|").split("|")]
    held = dict(zip(columns, (one.strip() for one in first.strip("|").split("|")), strict=True))
    assert held["method"] == "*reference*" and held["E[log r]"] == "-0.520 ± 0.020"
    assert held["log Z"] == "-1.500 ± 0.015" and held["ESS"] == "0.400"
    assert held["TV of classes"] == held["training calls"] == "-"
    assert [line.split("|")[1].strip() for line in others] == ["a", "b (collapsed)"]
    assert "| 123456 |" in others[0] and "-0.500 ± 0.010" in others[0]
    assert reference_row({**ROW, "tv": 0.3})["tv"] == 0.0 and "tv" not in reference_row(ROW)
