"""Where the code published with arXiv 2405.20971 departs from the paper: the loss and its terms.

`test_row_NN_...` checks what is true in row NN of the list of disagreements, and shows that the
check fails once the mistake is put in. The rows on offline RL, on text and on the toy are in the
files named like this one.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    Denoiser,
    Diffusion,
    FixedOrder,
    GaussianKernel,
    ScalarLogZ,
    Trajectory,
    UnmaskingKernel,
    log_ratio,
    log_weight,
    objective,
    residual,
    rollout,
    rollout_against,
    rollout_step_by_step,
)
from rtb_rl.tasks.toy import Toy, gaussian_chain, linear_reward, shared_spread, token_task
from rtb_rl.training import Finetuner, FinetuneSettings, Mix, Run, Task, finetune, paths, run
from rtb_rl.training.paths import PathSource, merge

NOT_HERE = {
    6: "settings: tests/programs checks that what ran is what is written down",
    17: "image Langevin term: image posteriors have none; a guide is learned from rewards",
    18: "image metrics: tests/tasks/image/test_image_metrics.py, each against its formula",
    20: "image baselines: tests/baselines/test_guidance.py, gradients of the likelihood itself",
}


def test_every_row_has_its_test_or_a_reason():
    files = Path(__file__).parent.glob("test_published_mistakes*.py")
    found = re.findall(r"^def test_row_(\d\d)_", "".join(f.read_text() for f in files), re.M)
    assert sorted([*map(int, found), *NOT_HERE]) == list(range(1, 21))


SLOPE = torch.tensor([1.5, -2.0, 0.3], dtype=torch.float64)
LEVELS = 5


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def gaussian(beta: float = 1.0) -> Toy:
    """Data N(1, v) in three coordinates, tilted by exp(beta SLOPE . x)."""
    return gaussian_chain(
        torch.ones(3, dtype=torch.float64),
        torch.tensor([0.25, 1.0, 2.0], dtype=torch.float64),
        linear_reward(beta * SLOPE),
        levels=LEVELS,
        posterior=shared_spread(width=8, blocks=1, generator=seeded(1)),
    )


def exact(toy: Toy) -> nn.Module:
    assert isinstance(toy.exact_posterior, nn.Module)
    return toy.exact_posterior


def exact_residual(toy: Toy) -> float:
    """The largest residual of the exact posterior on paths of its own."""
    task = toy.task
    path, ratio = rollout_against(
        task.diffusion, exact(toy), task.prior, None, 50, generator=seeded()
    )
    weight = log_weight(task.log_reward(path.x0, None), ratio, 1.0)
    return float(residual(toy.log_z(None), weight).abs().max())


def test_row_05_one_temperature(catches):
    """RL temperature: it multiplies the log-ratio in one place and is missing on Q in another."""

    def exact_posterior_has_no_loss():
        for beta in (0.5, 3.0):
            toy = gaussian(beta)
            path, ratio = rollout_against(
                toy.task.diffusion, exact(toy), toy.task.prior, None, 50, generator=seeded()
            )
            log_reward = path.x0.double() @ SLOPE
            assert objective.rtb()(toy.log_z(None), ratio, log_reward, beta) < 1e-8

    def log_z_starts_at_beta_log_r():
        task = dataclasses.replace(gaussian().task, log_reward=lambda x0, c: 0 * x0[:, 0] + 2)
        settings = FinetuneSettings(beta=3.0, beta_warmup=1, conditions=8)
        metrics = Finetuner(task, ScalarLogZ(), settings, generator=seeded()).update(0)
        assert float(metrics["rtb/log_z"]) == pytest.approx(6) and metrics["rtb/loss"] < 1e-9

    def on_the_ratio(log_reward: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
        return log_reward - log_ratio / beta

    def nowhere(log_reward: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
        return log_reward - log_ratio

    for wrong in (on_the_ratio, nowhere):
        catches(exact_posterior_has_no_loss, objective, "log_weight", wrong)
        catches(log_z_starts_at_beta_log_r, finetune, "log_weight", wrong)


def gradient(task: Task, path: Trajectory, levels: Tensor | None = None) -> Tensor:
    """The gradient of the sum of the paths' log-ratios, as fine-tuning takes it: flat."""
    task.posterior.zero_grad()
    weight = torch.ones(path.x.shape[1])
    objective.backward_in_chunks(task.diffusion, task.posterior, path, weight, levels=levels)
    parameters = task.posterior.parameters()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def averaged(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean over the coordinates of x, the last argument, instead of the sum."""
    return lambda *args: method(*args) / args[-1][0].numel()


def test_row_12_the_sum_over_coordinates(catches):
    """Stable Diffusion likelihood: the mean over the latent's coordinates instead of the sum."""

    def exact_posterior_has_no_residual():
        assert exact_residual(gaussian()) < 1e-4

    def exact_tokens_have_no_residual():
        assert exact_residual(token_task(3, 3, FixedOrder([2, 0, 1]), generator=seeded())) < 1e-12

    def gradient_is_that_of_the_log_ratio():
        task = gaussian().task
        path = rollout(task.diffusion, task.prior, None, 8, generator=seeded())
        ratio = log_ratio(task.diffusion, task.posterior, task.prior, path)
        expected = torch.autograd.grad(ratio.sum(), list(task.posterior.parameters()))
        flat = torch.cat([g.flatten() for g in expected])
        torch.testing.assert_close(gradient(task, path), flat, rtol=1e-3, atol=1e-4)

    for check, kernel, name in (
        (exact_posterior_has_no_residual, GaussianKernel, "log_ratio"),
        (exact_tokens_have_no_residual, UnmaskingKernel, "log_ratio"),
        (gradient_is_that_of_the_log_ratio, GaussianKernel, "log_prob"),
    ):
        catches(check, kernel, name, averaged(getattr(kernel, name)))


def drawn_residual(source: PathSource, toy: Toy) -> float:
    """The largest residual on the paths of the next update."""
    drawn = merge(source.draw(), source.settings.conditions)
    weight = log_weight(drawn.log_reward, drawn.log_ratio, 1.0)
    return float(residual(toy.log_z(None), weight).abs().max())


SMALL = FinetuneSettings(conditions=8, beta_warmup=1, mix=Mix(on_policy=4, data=1))


def path_log_prob(diffusion: Diffusion, denoiser: Denoiser, path: Trajectory) -> Tensor:
    total = torch.zeros(path.x.shape[1])
    for k in range(1, path.levels + 1):
        level = torch.full((path.x.shape[1],), k)
        kernel = diffusion.kernel(denoiser(path.x[k], level, path.condition), path.x[k], level)
        total += kernel.log_prob(path.x[k - 1])
    return total


def test_row_13_the_prior_term_of_the_path_itself(catches):
    """Stable Diffusion prior term: the buffer keeps the first rollout's prior log-probabilities."""

    def exact_posterior_has_no_residual_twice():
        toy = gaussian()
        task = dataclasses.replace(toy.task, posterior=exact(toy))
        source = PathSource(task, SMALL, generator=seeded())
        for update in range(2):
            assert drawn_residual(source, toy) < 1e-4, f"update {update}"

    kept: list[Tensor] = []

    def stale(diffusion, denoiser, other, *args, **options) -> tuple[Trajectory, Tensor]:
        path, ratios = rollout_step_by_step(diffusion, denoiser, other, *args, **options)
        kept.append(path_log_prob(diffusion, other, path))
        return path, ratios + kept[-1] - kept[0]

    catches(exact_posterior_has_no_residual_twice, paths, "rollout_step_by_step", stale)


def test_row_14_the_present_policy_and_levels_scaled(catches):
    """Stable Diffusion posterior term: a stale rollout value; a subset of steps without T / B."""

    def residual_is_that_of_the_present_posterior():
        toy = gaussian()
        source = PathSource(toy.task, SMALL, generator=seeded())
        assert drawn_residual(source, toy) > 1  # it starts at the prior
        source.task = dataclasses.replace(toy.task, posterior=exact(toy))
        assert drawn_residual(source, toy) < 1e-4

    kept: list[Tensor] = []

    def stale(*args, **options) -> Tensor:
        kept.append(log_ratio(*args, **options))
        return kept[0]

    catches(residual_is_that_of_the_present_posterior, paths, "log_ratio", stale)

    def subsets_have_the_full_gradient_on_average():
        task = gaussian().task
        path = rollout(task.diffusion, task.prior, None, 8, generator=seeded())
        pairs = torch.combinations(torch.arange(1, LEVELS + 1))
        levels = [pair[:, None].expand(-1, 8) for pair in pairs]
        mean = torch.stack([gradient(task, path, chosen) for chosen in levels]).mean(0)
        torch.testing.assert_close(mean, gradient(task, path), rtol=1e-4, atol=1e-4)

    backward = objective.backward_in_chunks

    def unscaled(diffusion, posterior, path, weight, levels) -> None:
        share = 1.0 if levels is None else len(levels) / path.levels
        backward(diffusion, posterior, path, share * weight, levels=levels)

    catches(subsets_have_the_full_gradient_on_average, objective, "backward_in_chunks", unscaled)


def test_row_19_log_z_and_the_step_come_back(catches, tmp_path_factory):
    """Checkpoints: log Z is saved as 0, and a resumed run starts to count again."""

    def resumed_run_is_where_the_first_one_was():
        directory = tmp_path_factory.mktemp("run")
        first, again = (
            Finetuner(gaussian().task, ScalarLogZ(), SMALL, generator=seeded()) for _ in range(2)
        )
        for step in range(3):
            first.update(step)
        Run(directory, {}).save(3, first.parts)
        assert Run(directory, {}).restore(again.parts) == 3
        log_z, found = (each.log_z(None, torch.zeros(1)) for each in (first, again))
        assert log_z.abs() > 0.01 and torch.equal(log_z, found)

    parts, load = Finetuner.parts.fget, run.load_checkpoint
    assert parts is not None

    def zero(log_z: ScalarLogZ) -> dict[str, Tensor]:
        return {"value": 0 * log_z.value}

    def without_log_z(self: Finetuner) -> dict:
        return {name: part for name, part in parts(self).items() if name != "log_z"}

    def from_the_start(*args, **options) -> tuple[int, dict]:
        loaded = load(*args, **options)
        assert loaded is not None
        return 0, loaded[1]

    check = resumed_run_is_where_the_first_one_was
    catches(check, ScalarLogZ, "state_dict", zero)
    catches(check, Finetuner, "parts", property(without_log_z))
    catches(check, run, "load_checkpoint", from_the_start)
