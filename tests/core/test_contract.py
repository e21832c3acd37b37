"""One contract suite over a table of all Diffusions, written against the protocol only.

A new Diffusion joins by one more `Case`: how to draw points of its space, how to make a valid
prediction from points, and which features of a point tell two laws apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Generator, Tensor

from rtb_rl.core import (
    Diffusion,
    FixedOrder,
    GaussianDiffusion,
    IndependentReveals,
    MaskedDiffusion,
    RandomOrder,
    RevealLaw,
    Schedule,
    cosine_masking,
    cosine_schedule,
    linear_masking,
    linear_schedule,
    log_snr_schedule,
    vp_schedule,
    zero_terminal_signal,
)
from rtb_rl.core.gaussian import calibrated_spread, large_spread, small_spread

Spread = Callable[[Schedule, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Case:
    """A diffusion on its space."""

    diffusion: Diffusion
    points: Callable[[int, Generator], Tensor]
    """Draws of clean points: [count, *event]."""
    predict: Callable[[Tensor], Tensor]
    """The prediction that each row's clean point is the given one."""
    average: Callable[[Tensor], Tensor]
    """The best prediction where the given points are equally likely, for one row."""
    blend: Callable[[Tensor, Tensor, float], Tensor]
    """The prediction that lies this share of the way from the first to the second."""
    features: Callable[[Tensor], Tensor]
    """Numbers whose means tell two laws apart: [count, features]."""
    certain: frozenset[str] = frozenset()
    """The draws that leave nothing to chance."""


def small(schedule: Schedule, event: tuple[int, ...]) -> Tensor:
    return small_spread(schedule, floor=1e-3)


def large(schedule: Schedule, event: tuple[int, ...]) -> Tensor:
    return large_spread(schedule)


def calibrated(schedule: Schedule, event: tuple[int, ...]) -> Tensor:
    generator = Generator().manual_seed(5)
    x0 = torch.randn((64, *event), generator=generator, dtype=torch.float64)
    diffusion = GaussianDiffusion(schedule, event, large_spread(schedule))
    return calibrated_spread(
        diffusion, lambda x, level, condition: 0.5 * x, x0, None, generator=generator
    )


def moments(x: Tensor) -> Tensor:
    flat = x.flatten(1)[:, :3]
    return torch.cat([flat, flat.square()], 1)


def gaussian(schedule: Schedule, event: tuple[int, ...], spread: Spread) -> Case:
    def points(count: int, generator: Generator) -> Tensor:
        return 1 + 0.5 * torch.randn((count, *event), generator=generator, dtype=torch.float64)

    diffusion = GaussianDiffusion(schedule, event, spread(schedule, event), dtype=torch.float64)
    return Case(
        diffusion,
        points,
        predict=lambda x0: x0,
        average=lambda x0: x0.mean(0, keepdim=True),
        blend=torch.lerp,
        features=moments,
    )


VOCABULARY, LENGTH = 3, 5


def one_hot(tokens: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(tokens, classes).double()


def masked(reveals: RevealLaw, *certain: str) -> Case:
    def points(count: int, generator: Generator) -> Tensor:
        return torch.randint(VOCABULARY, (count, LENGTH), generator=generator)

    return Case(
        MaskedDiffusion(LENGTH, VOCABULARY, reveals),
        points,
        predict=lambda x0: (0.7 * one_hot(x0, VOCABULARY) + 0.1).log(),
        average=lambda x0: one_hot(x0, VOCABULARY).mean(0, keepdim=True).log(),
        blend=lambda first, second, share: first.exp().lerp(second.exp(), share).log(),
        features=lambda x: one_hot(x, VOCABULARY + 1).flatten(1),
        certain=frozenset(("start", *certain)),
    )


SCHEDULES = {
    "linear": linear_schedule(25),
    "cosine": cosine_schedule(5),
    "vp": vp_schedule(6),
    "log_snr": log_snr_schedule(6),
    "zero_terminal": zero_terminal_signal(cosine_schedule(6)),
}
SPREADS = {"small": small, "large": large, "calibrated": calibrated}
CASES = {
    f"{schedule}-{spread}-{'x'.join(map(str, event))}": gaussian(
        SCHEDULES[schedule], event, SPREADS[spread]
    )
    for schedule in SCHEDULES
    for spread in SPREADS
    for event in ((1,), (3,), (2, 4, 4))
}
ORDER = torch.tensor([2, 0, 4, 1, 3])
CASES |= {
    "masked-linear": masked(IndependentReveals(linear_masking(6), LENGTH)),
    "masked-cosine": masked(IndependentReveals(cosine_masking(4), LENGTH)),
    "masked-random_order": masked(RandomOrder(LENGTH)),
    "masked-random_order-2": masked(RandomOrder(LENGTH, per_step=2)),
    "masked-fixed_order": masked(FixedOrder(ORDER), "corrupt", "noise_path"),
    "masked-fixed_order-2": masked(FixedOrder(ORDER, per_step=2), "corrupt", "noise_path"),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def mixed_batch(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy points and predictions at every level at once, and a second set of predictions."""
    level = torch.arange(1, case.diffusion.levels + 1).repeat(2)
    x0 = case.points(len(level), seeded(1))
    x = case.diffusion.corrupt(x0, level, generator=seeded(2))
    first, second = (case.predict(case.points(len(level), seeded(seed))) for seed in (3, 4))
    return x, level, first, second


def test_shapes(case: Case):
    diffusion, event = case.diffusion, tuple(case.diffusion.event_shape)
    x, level, prediction, _ = mixed_batch(case)
    kernel, batch = diffusion.kernel(prediction, x, level), len(level)
    x0 = case.points(batch, seeded())
    assert diffusion.start(3, generator=seeded()).shape == (3, *event)
    path = diffusion.noise_path(x0, generator=seeded())
    assert path.shape == (diffusion.levels + 1, batch, *event)
    assert kernel.sample(generator=seeded()).shape == x.shape
    assert kernel.log_prob(x).shape == (batch,)
    assert diffusion.denoising_loss(prediction, x0, x, level).shape == (batch,)


def test_the_same_generator_gives_the_same_draws(case: Case):
    x, level, prediction, _ = mixed_batch(case)
    diffusion, x0 = case.diffusion, case.points(len(level), seeded())
    draws: dict[str, Callable[..., Tensor]] = {
        "start": partial(diffusion.start, 4),
        "corrupt": partial(diffusion.corrupt, x0, level),
        "noise_path": partial(diffusion.noise_path, x0),
        "sample": diffusion.kernel(prediction, x, level).sample,
    }
    for name, draw in draws.items():
        first, second = draw(generator=seeded(7)), draw(generator=seeded(8))
        assert torch.equal(first, draw(generator=seeded(7)))
        assert torch.equal(first, second) == (name in case.certain)


def test_level_zero_is_clean_data(case: Case):
    x0 = case.points(4, seeded())
    zeros = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(case.diffusion.corrupt(x0, zeros, generator=seeded()), x0)
    assert torch.equal(case.diffusion.noise_path(x0, generator=seeded())[0], x0)


def test_noising_level_by_level_has_the_marginals_of_noising_at_once(case: Case):
    count = 3000
    x0 = case.points(1, seeded()).expand(count, *case.diffusion.event_shape)
    path = case.diffusion.noise_path(x0, generator=seeded(1))
    for level in {1, 2, case.diffusion.levels}:
        rows = torch.full((count,), level)
        at_once = case.features(case.diffusion.corrupt(x0, rows, generator=seeded(2 + level)))
        stepwise = case.features(path[level])
        error = ((at_once.var(0) + stepwise.var(0)) / count).sqrt()
        assert bool(((at_once.mean(0) - stepwise.mean(0)).abs() <= 4.5 * error).all())


def test_levels_mixed_in_one_batch_equal_one_level_at_a_time(case: Case):
    x, level, first, second = mixed_batch(case)
    kernel, other = (case.diffusion.kernel(p, x, level) for p in (first, second))
    x_before = kernel.sample(generator=seeded())
    for row in range(len(level)):
        one = slice(row, row + 1)
        alone, other_alone = (
            case.diffusion.kernel(p[one], x[one], level[one]) for p in (first, second)
        )
        torch.testing.assert_close(alone.log_prob(x_before[one]), kernel.log_prob(x_before)[one])
        torch.testing.assert_close(
            alone.log_ratio(other_alone, x_before[one]), kernel.log_ratio(other, x_before)[one]
        )


def test_log_ratio_is_the_difference_of_log_probs_and_zero_for_equal_predictions(case: Case):
    x, level, first, second = mixed_batch(case)
    kernel, other = (case.diffusion.kernel(p, x, level) for p in (first, second))
    x_before = kernel.sample(generator=seeded())
    difference = kernel.log_prob(x_before) - other.log_prob(x_before)
    torch.testing.assert_close(kernel.log_ratio(other, x_before), difference, rtol=1e-8, atol=1e-8)
    same = case.diffusion.kernel(first.clone(), x, level)
    assert torch.equal(kernel.log_ratio(same, x_before), torch.zeros(len(level)).double())


def test_samples_have_a_finite_density_and_no_graph(case: Case):
    x, level, prediction, _ = mixed_batch(case)
    prediction = prediction.clone().requires_grad_()
    kernel = case.diffusion.kernel(prediction, x, level)
    x_before = kernel.sample(generator=seeded())
    assert not x_before.requires_grad
    log_prob = kernel.log_prob(x_before)
    assert log_prob.requires_grad and bool(log_prob.isfinite().all())


def test_denoising_loss_is_least_at_the_average_of_the_likely_points(case: Case):
    count = 30
    x0 = case.points(count, seeded())
    other = case.average(case.points(2, seeded(1)))
    best = case.average(x0)
    for k in range(1, case.diffusion.levels + 1):
        level = torch.full((count,), k)
        x = case.diffusion.start(1, generator=seeded()).expand_as(x0)

        def loss(share: float, x0=x0, x=x, level=level) -> Tensor:
            prediction = case.blend(best, other, share).expand(count, *best.shape[1:])
            return case.diffusion.denoising_loss(prediction, x0, x, level).mean()

        assert loss(0.0) < min(loss(0.01), loss(-0.01), loss(1.0))


def test_no_parameters_to_train(case: Case):
    parameters = getattr(case.diffusion, "parameters", list)
    assert not list(parameters())
