"""Where the code published with arXiv 2405.20971 departs from the paper: offline RL.

Rows 1-4 of the list that test_published_mistakes.py begins.
"""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    ConditionalLogZ,
    Denoiser,
    Diffusion,
    GaussianDiffusion,
    GroupMeanLogZ,
    RandomOrder,
    ScaledPrediction,
    Schedule,
    log_ratio,
    rollout,
    schedules,
)
from rtb_rl.core.gaussian import large_spread
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import MLP, LangevinDenoiser, LearnedSpread, ResidualMLP
from rtb_rl.rl import ActionNetwork, load_dataset
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.posteriors import prior, task
from rtb_rl.rl.posteriors.posterior import posterior_model
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.tasks.toy import (
    GaussianDenoiser,
    PosteriorMaker,
    TabularCorrection,
    chain_of,
    learned_spread,
    mixture_chain,
    mixture_posterior,
    random_mixture,
    shared_spread,
    squared_reward,
    tilt,
    token_task,
)
from rtb_rl.training import Finetuner, FinetuneSettings, Mix
from rtb_rl.training.mix import LearnedLogZ
from rtb_rl.training.paths import Part, PathSource


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn((count, size), generator=seeded(seed))


class Quadratic:
    """Q = -|a - 1 / 2|^2 / 2, times a factor."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        return -self.factor * (action - 0.5).square().sum(1) / 2


NO_REWARD = Quadratic(0.0)


def some_prior() -> ActionDiffusion:
    """Two actions given one number, by a network of random weights."""
    network = ActionNetwork(levels=4, width=16, blocks=1)
    model = ActionDiffusion(1, 2, network, generator=seeded())
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=seeded(1))
    return model.requires_grad_(False)


PRIOR = some_prior()
MIXTURE = mixture_chain(random_mixture(2, 3, generator=seeded()), 4, generator=seeded())
DATA = load_dataset(
    dict(
        observations=rows(200, 1).numpy(),
        actions=(0.3 * rows(200, 2, 1)).clamp(-1, 1).numpy(),
        rewards=np.zeros(200, dtype=np.float32),
        terminals=np.ones(200, dtype=bool),
        timeouts=np.zeros(200, dtype=bool),
    )
)


def finetuner(critic: Critic, log_z: LearnedLogZ, mix: Mix, *, moved: float = 0.0) -> Finetuner:
    """Of a posterior whose weights are those of the prior, each plus `moved`."""
    posterior = posterior_model(PRIOR, critic, langevin=False).denoiser
    for parameter in posterior.parameters():
        parameter.data.add_(moved)
    made = task.offline_rl_task(DATA, PRIOR.diffusion, PRIOR.denoiser, posterior, critic)
    settings = FinetuneSettings(beta_warmup=1, conditions=16, mix=mix)
    return Finetuner(made, log_z, settings, generator=seeded(2))


def network_log_z() -> ConditionalLogZ:
    return ConditionalLogZ(MLP(1, 1, width=8, generator=seeded(3)))


Beginning = tuple[Diffusion, Denoiser, Denoiser, Condition]
"""A diffusion, its prior, the posterior that training begins with, and conditions."""


def policy(*, langevin: bool) -> Beginning:
    model = posterior_model(PRIOR, Quadratic(), langevin=langevin)
    return PRIOR.diffusion, PRIOR.denoiser, model.denoiser, rows(8, 1)


def mixture(make: Callable[..., PosteriorMaker]) -> Beginning:
    diffusion, reference = MIXTURE
    posterior = make(width=8, blocks=1, generator=seeded())(reference, diffusion, 0)
    return diffusion, reference, posterior, None


def tokens() -> Beginning:
    made = token_task(2, 3, RandomOrder(3), generator=seeded()).task
    return made.diffusion, made.prior, made.posterior, None


def test_row_01_the_posterior_starts_at_the_prior(catches):
    """RL start: a copy of the prior is added to the prior, and the Langevin term is random."""

    def log_ratio_is_zero(begin: Callable[[], Beginning]):
        diffusion, reference, posterior, condition = begin()
        path = rollout(diffusion, posterior, condition, 8, generator=seeded())
        ratio = log_ratio(diffusion, posterior, reference, path)
        assert torch.equal(ratio, torch.zeros_like(ratio))

    of_policy, of_tokens = LearnedSpread.forward, TabularCorrection.forward

    def doubled(self: LearnedSpread, *args) -> ScaledPrediction:
        prediction = of_policy(self, *args)
        return prediction._replace(x0=2 * prediction.x0)

    def doubled_logits(self: TabularCorrection, *args) -> Tensor:
        return (2 * of_tokens(self, *args)).log_softmax(-1)

    def not_at_zero(kind: type[nn.Module], name: str) -> Callable[..., None]:
        begin = kind.__init__

        def begin_anywhere(self: nn.Module, *args, **options) -> None:
            begin(self, *args, **options)
            nn.init.constant_(self.get_parameter(name), 0.1)

        return begin_anywhere

    check = partial(log_ratio_is_zero, partial(policy, langevin=False))
    catches(check, LearnedSpread, "forward", doubled)
    check = partial(log_ratio_is_zero, partial(policy, langevin=True))
    catches(check, LangevinDenoiser, "__init__", not_at_zero(LangevinDenoiser, "scale"))
    for make in (shared_spread, learned_spread, mixture_posterior):
        check = partial(log_ratio_is_zero, partial(mixture, make))
        catches(check, ResidualMLP, "__init__", not_at_zero(ResidualMLP, "last.bias"))
    catches(partial(log_ratio_is_zero, tokens), TabularCorrection, "forward", doubled_logits)


def test_row_02_data_paths_carry_the_reward(catches):
    """RL off-policy loss: 64 noisings of one action form a group, from which its reward cancels."""

    def reward_changes_the_loss(make_log_z: Callable[[], LearnedLogZ], mix: Mix):
        with_reward, without = (
            float(finetuner(critic, make_log_z(), mix, moved=0.1).update(0)["rtb/loss"])
            for critic in (Quadratic(3.0), NO_REWARD)
        )
        assert min(with_reward, without) > 1e-3  # there is something to learn from, right or wrong
        assert abs(with_reward - without) > 1e-2

    draw, noised = PathSource.draw, PathSource._noised

    def noisings_of_one_point(self: PathSource) -> list[Part]:
        last = draw(self)[-1]
        path = last.path
        return [noised(self, path.x0, path.condition, last.log_reward) for _ in range(3)]

    def without_reward(self: PathSource, x0: Tensor, condition: Condition, log_reward: Tensor):
        return noised(self, x0, condition, 0 * log_reward)

    grouped = partial(reward_changes_the_loss, partial(GroupMeanLogZ, 3), Mix(1, 1, 1))
    catches(grouped, PathSource, "draw", noisings_of_one_point)
    learned = partial(reward_changes_the_loss, network_log_z, Mix(on_policy=0, data=1))
    catches(learned, PathSource, "_noised", without_reward)


def test_row_03_no_jacobian_in_the_reward(catches):
    """RL target: an additional factor prod(1 - a^2), a tanh Jacobian added to the reward."""
    u = 1.8 + 0.5 * rows(200_000, 1)

    def without_reward_the_law_stays():
        made = task.offline_rl_task(
            DATA, PRIOR.diffusion, PRIOR.denoiser, PRIOR.denoiser, NO_REWARD
        )
        weight = made.log_reward(u, torch.zeros_like(u)).softmax(0)
        mean = float((weight * u[:, 0].tanh()).sum())
        assert mean == pytest.approx(0.919, abs=0.001)  # the mistake makes it 0.837

    log_reward_of = task.critic_log_reward

    def squashed(critic: Critic):
        log_reward = log_reward_of(critic)
        return lambda x0, c: log_reward(x0, c) + (1 - x0.tanh().square()).log().sum(1)

    catches(without_reward_the_law_stays, task, "critic_log_reward", squashed)


def test_row_04_the_chain_ends_in_noise(catches):
    """RL chain: betas of 1000 steps over 75 levels keep signal 0.674, and x[0] depends on x[K]."""

    def exact_score_samples_the_data_whatever_the_start():
        schedule = schedules.linear_schedule(75)
        with warnings.catch_warnings(action="ignore"):
            diffusion = GaussianDiffusion(schedule, (1,), large_spread(schedule))
        one = torch.ones(1, dtype=torch.float64)
        chain = chain_of(diffusion, GaussianDenoiser(schedule, one, one / 4))
        assert float(chain.final(0 * one, one)[0]) == pytest.approx(1, abs=0.01)
        _, value = tilt(chain, squared_reward(3 * one, 1.8 * one))
        assert (value.curvature**2 / 2 + value.slope**2).sqrt() < 0.01  # std of log E[r | x[K]]

    def unscaled(levels: int) -> Schedule:
        beta = torch.linspace(1e-4, 0.02, levels, dtype=torch.float64)
        return Schedule(torch.cat([torch.ones(1).double(), (1 - beta).cumprod(0).sqrt()]))

    catches(exact_score_samples_the_data_whatever_the_start, schedules, "linear_schedule", unscaled)

    def no_signal_is_left():
        for levels in (2, 10, 75):
            network = ActionNetwork(levels=levels, width=8)
            model = ActionDiffusion(3, 2, network, generator=seeded())
            assert model.diffusion.signal_left == 0

    catches(no_signal_is_left, prior, "zero_terminal_signal", lambda schedule: schedule)
