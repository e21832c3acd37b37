"""Masked diffusion on sequences that can be listed: trained posteriors against enumeration."""

from dataclasses import asdict, replace

from torch import Tensor, nn

from rtb_rl.baselines import DenoisingPosterior, DenoisingSettings
from rtb_rl.core import (
    FixedOrder,
    IndependentReveals,
    MaskedDiffusion,
    RandomOrder,
    RevealLaw,
    Sampler,
    kl_reinforce_loss,
    linear_masking,
    log_weight,
    published_rl_loss,
)
from rtb_rl.exactness.fit import Effort, Row, fit_toy, found, row
from rtb_rl.exactness.tables import FAMILIES, InconsistentTokens, PointLogZ
from rtb_rl.tasks.toy import TokenSpace, Toy, token_floors, token_task
from rtb_rl.tasks.toy.floors import Projection, learned_reveal, shared_schedule
from rtb_rl.training.loop import train
from rtb_rl.training.mix import Mix
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.settings import FinetuneSettings

VOCABULARY, LENGTH = 3, 4
REFERENCE_LEVELS = (1, 2, 4, 8, 16, 64)
REFERENCE = {
    "consistent prior": (0.596, 0.366, 0.216, 0.118, 0.062, 0.016),
    "inconsistent prior, learned reveal": (0.122, 0.153, 0.120, 0.077, 0.045, 0.013),
    "inconsistent prior, shared schedule": (0.122, 0.170, 0.152, 0.126, 0.105, 0.086),
}
"""An earlier enumeration of one instance a row (V = 3, L = 4), of a law and seed not written down:
best total variation at `REFERENCE_LEVELS`. See `token_floors`.
"""
INDEPENDENT_LEVELS = (4, 16)
PROJECTIONS: dict[str, Projection] = {
    "shared schedule": shared_schedule,
    "reveals learned": learned_reveal,
}
SETTINGS = FinetuneSettings(
    beta_warmup=30,
    conditions=32,
    mix=Mix(on_policy=8, data=0),
    levels_per_path=None,
    learning_rate=0.1,
    last_learning_rate=0.02,
    log_z_learning_rate=0.05,
    average_decay=0.99,
)
PATHS = SETTINGS.conditions * SETTINGS.mix.total
OFF_POLICY = Mix(on_policy=4, prior=4, data=0)
"""Where the posterior can be exact, paths from anywhere lead to it; the prior's see what it drops.
"""


def fixed_order(run: Run, effort: Effort, seed: int) -> list[Row]:
    """One reveal a step in a fixed order, where a loss of zero can be reached: RTB, and others.

    DDPP-LB stays away from it: it fits all masked tokens at once, as if they were independent.
    """

    def reinforce(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float) -> Tensor:
        return kl_reinforce_loss(log_weight(log_reward, log_ratio, beta), PATHS)

    def published(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, beta: float) -> Tensor:
        return published_rl_loss(log_ratio, log_reward, 1.0)

    def toy() -> Toy:
        return _toy(FixedOrder([2, 0, 3, 1]), seed)

    on_policy = replace(SETTINGS, updates=effort.token_updates)
    off_policy = replace(on_policy, mix=OFF_POLICY)
    rtb = toy()
    posterior = fit_toy(stage_of(run, "rtb", off_policy, seed), rtb, off_policy, seed=seed)
    log_z_error = found(rtb, posterior, seed=seed, draws=5000)["log_z_error"]
    rows = [
        row("tokens, fixed order, RTB: TV", seed, exact_error(rtb, posterior), 0.01),
        row("tokens, fixed order, RTB: |log Z error|", seed, log_z_error, 0.01),
    ]
    others = {
        "KL-REINFORCE": reinforce,
        "published RL loss (control, must exceed 0.1)": published,
    }
    for name, objective in others.items():
        other, stage = toy(), stage_of(run, name.split(" (")[0], on_policy, seed)
        posterior = fit_toy(stage, other, on_policy, seed=seed, objective=objective)
        rows.append(row(f"tokens, fixed order, {name}: TV", seed, exact_error(other, posterior)))
    other = toy()
    posterior = fit_denoising(
        stage_of(run, "DDPP-LB", on_policy, seed), other, on_policy, seed=seed
    )
    rows.append(row("tokens, fixed order, DDPP-LB: TV", seed, exact_error(other, posterior)))
    return rows


def random_order(run: Run, effort: Effort, seed: int) -> list[Row]:
    """One reveal a step in random order, a prior with consistent conditionals: exact as well."""
    toy = _toy(RandomOrder(LENGTH), seed)
    settings = replace(SETTINGS, updates=effort.token_updates, mix=OFF_POLICY)
    posterior = fit_toy(stage_of(run, "rtb", settings, seed), toy, settings, seed=seed)
    return [row("tokens, random order, RTB: TV", seed, exact_error(toy, posterior), 0.01)]


def several_reveals(run: Run, effort: Effort, seed: int) -> list[Row]:
    """Floors of factorised steps against an earlier table, and posteriors against their floors."""
    rows = []
    for floor in token_floors(
        REFERENCE_LEVELS,
        vocabulary=VOCABULARY,
        length=LENGTH,
        instances=effort.floor_instances,
        generator=generator_for(seed, "token floors"),
    ):
        name = f"token floor, {floor.family}, T = {floor.levels}"
        rows.append(row(f"{name}: TV", seed, floor.tv))
        if floor.family in REFERENCE:
            earlier = REFERENCE[floor.family][REFERENCE_LEVELS.index(floor.levels)]
            difference = abs(floor.tv / earlier - 1)
            rows.append(row(f"{name}: |TV / reference - 1|", seed, difference, 0.2))
    for levels in INDEPENDENT_LEVELS:
        rows += _independent_reveals(run, effort, seed, levels)
    return rows


def _independent_reveals(run: Run, effort: Effort, seed: int, levels: int) -> list[Row]:
    """Trained posteriors of an inconsistent prior, which profits from learning when to reveal."""
    diffusion = MaskedDiffusion(
        LENGTH, VOCABULARY, IndependentReveals(linear_masking(levels), LENGTH)
    )
    problem = InconsistentTokens(diffusion, generator=generator_for(seed, "inconsistent"))
    settings, name = replace(SETTINGS, updates=effort.token_updates), f"tokens, T = {levels}"
    rows = []
    for family, maker in FAMILIES.items():
        toy, stage = problem.toy(maker), stage_of(run, f"{family}-{levels}", settings, seed)
        posterior = fit_toy(stage, toy, settings, seed=seed)
        rows.append(row(f"{name}, {family}, trained: TV", seed, exact_error(toy, posterior)))
    for family, project in PROJECTIONS.items():
        rows.append(row(f"{name}, {family}, floor: TV", seed, problem.floor(project)))
    return rows


def fit_denoising(run: Run, toy: Toy, settings: FinetuneSettings, *, seed: int) -> nn.Module:
    """The posterior denoiser trained with DDPP-LB on its own draws (the average of its weights)."""
    chosen = DenoisingSettings(
        updates=settings.updates,
        beta=settings.beta,
        conditions=settings.conditions,
        paths=settings.mix.total,
        data=0,
        refresh=1,
        replay_capacity=PATHS,
        learning_rate=settings.learning_rate,
        last_learning_rate=settings.last_learning_rate,
        log_z_learning_rate=settings.log_z_learning_rate,
        gradient_clip=settings.gradient_clip,
        average_decay=settings.average_decay,
    )
    trainer = DenoisingPosterior(
        toy.task,
        PointLogZ(TokenSpace(VOCABULARY, LENGTH)),
        chosen,
        generator=generator_for(seed, "denoising posterior"),
    )
    train(
        run,
        trainer.update,
        trainer.parts,
        steps=settings.updates,
        description=run.directory.name,
    )
    return trainer.average.module


def exact_error(toy: Toy, posterior: nn.Module) -> float:
    """Total variation of the trained chain to the exact posterior, by enumeration."""
    return toy.task.evaluate(Sampler(toy.task.diffusion, posterior))["tv"]


def stage_of(run: Run, name: str, settings: FinetuneSettings, seed: int) -> Run:
    return run.stage(name.replace(" ", "-"), {"seed": seed, **asdict(settings)})


def _toy(reveals: RevealLaw, seed: int) -> Toy:
    return token_task(VOCABULARY, LENGTH, reveals, generator=generator_for(seed, "tokens"))
