"""The comparison with the reference: exact draws pass, collapsed ones are seen, errors cover."""

import pytest
import torch

from rtb_rl.baselines.selection import ImportanceReference
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.evaluation import Judge, Judgement, Reference, average_rows, compare
from rtb_rl.tasks.image.images import load_images, to_model_space
from rtb_rl.tasks.image.report import markdown
from rtb_rl.tasks.image.target import class_target

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
EVEN = (0, 2, 4, 6, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(seed, images, labels):
    """A classifier that has learnt something, and is sure of little."""
    classifier = ConvClassifier((1, 8, 8), 10, width=6, generator=seeded(seed))
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    generator = seeded(seed + 10)
    for _ in range(60):
        rows = torch.randint(len(images), (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(classifier(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    classifier.temperature.fill_(2.0)
    return classifier.requires_grad_(False)


@pytest.fixture(scope="module")
def digits():
    return load_images()


@pytest.fixture(scope="module")
def judge(digits):
    reward, other = (trained(seed, digits.images, digits.labels) for seed in (0, 1))
    rewards = [class_target(one, EVEN).log_reward for one in (reward, other)]
    return Judge(other, *rewards)


@pytest.fixture(scope="module")
def halves(digits):
    """Two independent halves of the digits in model space: all there is of the "prior"."""
    order = torch.randperm(len(digits), generator=seeded(2))
    points = to_model_space(digits.images)
    return points[order[:900]], points[order[900:]]


@pytest.fixture(scope="module")
def reference(halves, judge):
    return Reference.of(halves[0], judge, None, beta=1.0)


def exact_draws(halves, judge, count=400, seed=4):
    """Of the posterior, with nothing of the reference in them."""
    other = Reference.of(halves[1], judge, None, beta=1.0)
    return other.draws.resample(count, generator=seeded(seed))[0]


def test_exact_draws_have_no_excess_and_the_distances_of_halves(halves, judge, reference):
    row = compare(exact_draws(halves, judge), reference, judge, generator=seeded(5))
    assert abs(row["log_reward_excess"]) < 3 and abs(row["judged_excess"]) < 3
    assert row["collapsed"] == 0
    assert row["tv"] < 0.08
    assert 0.5 < row["frechet"] / row["frechet_halves"] < 2
    spread = row["diversity"] - row["reference_diversity"]
    assert abs(spread) < 4 * 1.5 * row["diversity_error"]
    assert row["reference_log_reward"] == pytest.approx(float(mean_by_hand(reference)))


def mean_by_hand(reference):
    values = reference.judgement.log_reward.double()
    weight = values.exp() / values.exp().sum()
    return (weight * values).sum()


def test_draws_of_the_prior_fall_short(halves, judge, reference):
    row = compare(halves[1], reference, judge, generator=seeded(5))
    assert row["log_reward_excess"] < -3 and row["judged_excess"] < -3
    assert row["collapsed"] == 0 and row["tv"] > 0.2


def test_mass_on_one_class_is_seen_and_more_reward_is_not_better(digits, judge, reference):
    rewards = judge.log_reward(to_model_space(digits.images), None)
    means = [float(rewards[digits.labels == label].mean()) for label in EVEN]
    best = EVEN[max(range(len(EVEN)), key=lambda index: means[index])]
    alone = to_model_space(digits.of([best]).images)
    row = compare(alone, reference, judge, generator=seeded(5))
    assert row["log_reward"] > row["reference_log_reward"]
    assert row["log_reward_excess"] > 3 and row["collapsed"] == 1
    assert row["tv"] > 0.4 and row["frechet"] > 5 * row["frechet_halves"]
    assert row["diversity"] < row["reference_diversity"]
    unseen = {"log_z": None, "ess": None, "training_calls": 0, "calls": 1.0, "seconds": 0.1}
    lines = markdown({"greedy": row | unseen}).splitlines()
    assert lines[3].startswith("| greedy (collapsed) |") and "**" not in "".join(lines)


def test_errors_of_the_reference_cover_the_truth(halves, judge):
    """Of 300 references of 60 draws each: E[log r], class masses and log Z of all draws."""
    whole = Reference.of(torch.cat(halves), judge, None, beta=1.0)
    held, generator = whole.judgement, seeded(7)
    truth, _ = whole.mean(held.log_reward)
    masses, _ = whole.mean(held.probabilities)
    scores = {"reward": [], "mass": [], "log_z": []}
    for _ in range(300):
        rows = torch.randint(len(held.log_reward), (60,), generator=generator)
        columns = (held.log_reward, held.judged, held.probabilities, held.features)
        part = Judgement(*(column[rows] for column in columns))
        weight = whole.draws.log_weight[:, rows]
        draws = ImportanceReference(whole.draws.x0[:, rows], weight)
        one = Reference(draws, part, None)
        mean, error = one.mean(part.log_reward)
        scores["reward"].append((mean - truth) / error)
        mean, error = one.mean(part.probabilities[:, 0])
        scores["mass"].append((mean - masses[0]) / error)
        scores["log_z"].append(((draws.log_z - whole.draws.log_z) / draws.standard_error)[0])
    for name, found in scores.items():
        z = torch.stack(found)
        assert 0.88 < float((z.abs() < 2).double().mean()) <= 0.99, name
        assert abs(float(z.mean())) < 0.5, name


def test_beta_sharpens_the_reference(halves, judge, reference):
    sharp = Reference.of(halves[0], judge, None, beta=4.0)
    values = reference.judgement.log_reward
    assert sharp.mean(values)[0] > reference.mean(values)[0]
    assert float(sharp.draws.ess) < float(reference.draws.ess)
    torch.testing.assert_close(sharp.draws.log_weight, 4 * reference.draws.log_weight)


def test_a_constant_reward_is_no_excess(judge, halves):
    def constant(x0, condition):
        return torch.full((len(x0),), -0.1)

    flat = Judge(judge.classifier, constant, constant)
    reference = Reference.of(halves[0][:50], flat, None, beta=1.0)
    row = compare(halves[1][:50], reference, flat, generator=seeded())
    assert abs(row["log_reward_excess"]) < 1 and row["collapsed"] == 0


def test_rows_are_averaged_over_conditions():
    rows = [{"tv": 0.1, "collapsed": 1.0}, {"tv": 0.3, "collapsed": 0.0}]
    found = average_rows(rows)
    assert found["tv"] == pytest.approx(0.2) and found["collapsed"] == 0.5


def test_the_error_of_a_mean_over_conditions_is_that_of_independent_ones():
    rows = [{"judged": 1.0, "judged_error": 0.3}, {"judged": 2.0, "judged_error": 0.4}]
    assert average_rows(rows) == {"judged": 1.5, "judged_error": pytest.approx(0.25)}
