"""Training-free methods on an image target, at a budget of network calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator

from rtb_rl.baselines.draws import Draws, in_batches
from rtb_rl.baselines.guidance import dps, lgd_mc, noised_logits_guidance
from rtb_rl.baselines.selection import best_of_n, importance_resampling
from rtb_rl.baselines.steering import fk_steering, twisted_smc
from rtb_rl.core import conditions
from rtb_rl.tasks.image.classifier import Classifier
from rtb_rl.tasks.image.images import to_images


@dataclass(frozen=True)
class Budget:
    """What a method may spend: network calls for each delivered draw, draws for each condition."""

    calls: float
    draws: int
    levels: int

    def population(self, price: int) -> int:
        """Points that can be drawn for each delivered one, at `price` calls a level."""
        return max(1, int(self.calls / (price * self.levels)))


def best(*model: Any, budget: Budget, **given: Any) -> Draws:
    """The best of as many draws as the budget has."""
    candidates = max(2, budget.population(1))
    return partial(best_of_n, *model)(budget.draws, candidates=candidates, **given)


def importance(*model: Any, budget: Budget, **given: Any) -> Draws:
    """Resampled from as many draws as the budget has."""
    candidates = budget.draws * budget.population(1)
    return partial(importance_resampling, *model)(budget.draws, candidates=candidates, **given)


def guidance(method: Callable[..., Draws], *model: Any, budget: Budget, **given: Any) -> Draws:
    """Guided draws, whose price is fixed."""
    return method(*model, budget.draws, **given)


def swarm(
    method: Callable[..., Draws],
    price: int,
    *model: Any,
    budget: Budget,
    batch: int | None = None,
    **given: Any,
) -> Draws:
    """For each condition one population as large as the budget allows; as many of it as are asked
    for.

    With `batch`, denoiser and reward see at most so many particles at once, and only conditions
    whose populations fit in it are drawn together: no population is divided.
    """
    diffusion, *functions, condition = model
    each = budget.population(price)
    particles, rows = each * budget.draws, conditions.count(condition) or 1
    together = rows
    if batch is not None:
        functions = [in_batches(function, batch) for function in functions]
        together = max(1, batch // particles)
    found = [
        method(diffusion, *functions, part, particles, particles=particles, **given)
        for part, _ in conditions.split(condition, rows, together)
    ]
    x0, source, log_z, ess = (
        torch.cat([getattr(draws, name) for draws in found])
        for name in ("x0", "source", "log_z", "ess")
    )
    kept = slice(None, None, each) if condition is None else (slice(None), slice(None, None, each))
    return Draws(x0[kept], found[0].calls * each, log_z, ess, source[kept])


def weak(
    classifier: Classifier,
    labels: Sequence[int],
    *parts: Any,
    budget: Budget,
    beta: float,
    generator: Generator,
) -> Draws:
    """The published stand-in for DPS."""
    diffusion, denoiser, _, condition = parts
    return noised_logits_guidance(
        diffusion,
        denoiser,
        lambda x0, condition: classifier(to_images(x0)),
        condition,
        budget.draws,
        classes=labels,
        generator=generator,
    )


FREE: dict[str, Callable[..., Draws]] = {
    "best of N": best,
    "importance resampling": importance,
    "DPS": partial(guidance, dps),
    "LGD-MC": partial(guidance, lgd_mc),
    "twisted SMC": partial(swarm, twisted_smc, 3),
    "FK steering": partial(swarm, fk_steering, 1),
}
WEAK = "DPS as published"


def training_free(
    classifier: Classifier, labels: Sequence[int] | None
) -> dict[str, Callable[..., Draws]]:
    """Name -> method(diffusion, denoiser, log_reward, condition, budget=, beta=, generator=).

    WEAK has no form for each class alone, `labels` None.
    """
    return FREE | ({WEAK: partial(weak, classifier, labels)} if labels else {})
