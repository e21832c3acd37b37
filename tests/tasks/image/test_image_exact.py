"""The exact rung: what is known of the posterior, where it starts, and that training gets there."""

import math
from dataclasses import replace

import pytest
import torch

from rtb_rl.core import Sampler, penalty_of, residual
from rtb_rl.errors import InputError
from rtb_rl.tasks.image.exact import ExactSettings, exact_problem, fit_exact
from rtb_rl.tasks.image.images import ImageDataset
from rtb_rl.training.run import Run

TINY = ExactSettings(smoothing=0.4, levels=8, width=32, draws=2000)
TINY = replace(
    TINY,
    finetune=replace(TINY.finetune, updates=70, beta_warmup=20, conditions=96, learning_rate=3e-3),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Constant(torch.nn.Module):
    """The table, whatever the points."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, points):
        return self.table


@pytest.fixture
def problem():
    """Five points in the corners of a square, doubled: classes of 1, 1 and 3 points."""
    corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [0.5, 0.5]]).repeat(1, 2)
    images = corners.reshape(5, 1, 2, 2)
    data = ImageDataset("corners", images, torch.tensor([0, 1, 2, 2, 2]), ("a", "b", "c"))
    return exact_problem(data, (0, 2), TINY, seed=0)


def test_log_z_and_masses_are_shares_of_the_points(problem):
    assert problem.reward.log_z == pytest.approx(math.log(4 / 5))
    assert problem.masses.tolist() == [0.25, 0.0, 0.75]


def test_the_posterior_starts_as_the_prior(problem):
    x = torch.randn(20, 1, 2, 2, generator=generator())
    level = torch.arange(20) % TINY.levels + 1
    assert problem.task.posterior(x, level, None).equal(problem.task.prior(x, level, None))


def test_weights_of_the_points_asked_for_make_the_exact_posterior(problem):
    """With weight zero elsewhere the denoiser is that of the points asked for, at every level."""
    task, smoothed = problem.task, problem.reward.smoothed
    chosen = torch.isin(problem.reward.labels, torch.tensor(problem.reward.classes))
    task.posterior.network = Constant(torch.where(chosen, 0.0, -1e3)[:, None])
    x = torch.randn(40, 1, 2, 2, generator=generator(1))
    level = torch.arange(40) % TINY.levels + 1
    signal, noise = (
        table[level].flatten(1) for table in (task.diffusion.signal, task.diffusion.noise)
    )
    x64, signal, noise = x.double(), signal.double(), noise.double()
    exact = problem.reward.posterior.expected_clean(x64, signal, noise)
    assert torch.allclose(task.posterior(x, level, None).double(), exact, atol=2e-3)
    assert not torch.allclose(smoothed.expected_clean(x64, signal, noise), exact, atol=0.1)


def test_kept_weights_follow_the_network(problem):
    """Without a gradient the answer is the same as with one, before and after a change."""
    posterior = problem.task.posterior
    x = torch.randn(30, 1, 2, 2, generator=generator(5))
    level = torch.arange(30) % TINY.levels + 1
    for bias in (0.0, 3.0):
        last = posterior.network.last
        last.weight.data.normal_(generator=generator(6)).mul_(1 + bias)
        with torch.no_grad():
            kept = posterior(x, level, None)
            again = posterior(x, level, None)
        assert kept.equal(again)
        assert kept.equal(posterior(x, level, None).detach())


def test_both_penalties_descend_the_divergence_both_ways():
    """By enumeration, on-policy, with residuals inside the limits: twice the sum of the KLs."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    log_q, log_z = logits.log_softmax(0), 0.7
    weight = target.log() + log_z - log_q
    loss = penalty_of(5.0, 3.0)(residual(torch.tensor(log_z).double(), weight))
    (found,) = torch.autograd.grad((log_q.exp().detach() * loss).sum(), logits, retain_graph=True)
    kl = (log_q.exp() * (log_q - target.log())).sum() + (target * (target.log() - log_q)).sum()
    (expected,) = torch.autograd.grad(2 * kl, logits)
    assert torch.allclose(found, expected)


def test_exact_draws_have_the_masses_and_prior_draws_do_not(problem):
    exact = problem.reward.posterior.sample(5000, generator=generator(2))
    prior = problem.reward.smoothed.sample(5000, generator=generator(3))
    assert problem.histogram_error(exact) < 0.03
    assert problem.histogram_error(prior) == pytest.approx(1 / 5, abs=0.02)


def test_training_finds_log_z_and_the_masses(problem, tmp_path):
    before = Sampler(problem.task.diffusion, problem.task.posterior)
    x0 = before.sample(None, 2000, generator=generator(4))
    assert problem.histogram_error(x0) > 0.15
    found = fit_exact(Run(tmp_path, {}), problem, TINY, seed=0)
    assert found["log_z_error"] < 0.06
    assert found["learned_log_z_error"] < 0.15
    assert found["tv"] < 0.1
    assert found["tv_of_exact_draws"] < 0.03
    assert found["ess"] > 0.5


def test_a_class_without_points_is_refused(problem):
    data = ImageDataset("one", torch.zeros(1, 1, 2, 2), torch.tensor([0]), ("a", "b"))
    with pytest.raises(InputError, match="no point is of class 1"):
        exact_problem(data, (1,), TINY, seed=0)
