"""Ways to fill a gap: without training, by importance weights, and with a trained posterior."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator

from rtb_rl.baselines import (
    Draws,
    ImportanceReference,
    best_of_n,
    fk_steering,
    svdd,
)
from rtb_rl.baselines.draws import CountedDenoiser
from rtb_rl.baselines.steering import drawn_tokens
from rtb_rl.core import (
    LogReward,
    OnDemand,
    Sampler,
    conditions,
    effective_sample_size,
    elbo,
    importance_log_z,
    log_weight,
    rollout_against,
)
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.evaluation import Infills
from rtb_rl.tasks.language.language_model import LanguageModel
from rtb_rl.tasks.language.posterior import TextPosterior
from rtb_rl.tasks.language.prompts import Prompts
from rtb_rl.tasks.language.rewards import TextReward, token_log_reward

CANDIDATES = 8  # of best of N
SVDD_CANDIDATES = 10  # as published
ROWS = 16  # prompts whose populations are drawn together

TRAINING_FREE = ("prompt (x)", "prompt (x, y)", f"best of {CANDIDATES}", "SVDD", "FK steering")
AUTOREGRESSIVE = "autoregressive (x)"

Method = Callable[[Generator], Infills]


@dataclass(frozen=True)
class GapProblem:
    """A prior, prompts that are held out and a reward: what every method is given."""

    prior: TextPrior
    prompts: Prompts
    reward: TextReward
    draws: int
    """Texts of each prompt."""
    beta: float = 1.0

    @property
    def log_reward(self) -> LogReward:
        return token_log_reward(self.reward, self.prompts)

    def infills(self, method: Callable[..., Draws], generator: Generator) -> Infills:
        """Texts of a method of `rtb_rl.baselines`, given all but the diffusion and the condition.

        Some prompts at a time, so that memory does not grow with their number.
        """
        begun, parts = time.monotonic(), []
        for begin in range(0, len(self.prompts.gaps), ROWS):
            condition = conditions.take(self.prompts.condition, slice(begin, begin + ROWS))
            parts.append(
                method(
                    self.prior.diffusion,
                    log_reward=self.log_reward,
                    condition=condition,
                    n=self.draws,
                    generator=generator,
                )
            )
        x0 = torch.cat([part.x0 for part in parts])
        calls = sum(part.calls * len(part.x0) for part in parts) / len(x0)
        log_z, ess = (
            None if (found := [getattr(p, name) for p in parts])[0] is None else torch.cat(found)
            for name in ("log_z", "ess")
        )
        seconds = (time.monotonic() - begun) / (len(x0) * self.draws)
        return Infills(self.written(x0), calls, seconds, log_z, ess)

    def written(self, x0: torch.Tensor) -> list[list[Any]]:
        """Points [prompts, n, slots] as texts in their gaps."""
        n = x0.shape[1]
        each = conditions.repeat(self.prompts.condition, n)
        assert isinstance(each, dict)
        flat = self.prompts.written(x0.flatten(0, 1), each)
        return [flat[i : i + n] for i in range(0, len(flat), n)]


def training_free(problem: GapProblem, model: LanguageModel | None) -> dict[str, Method]:
    """Name -> method. `model`: the reward's language model, prompted as it is."""
    prior, mask = problem.prior, problem.prior.frame.codec.mask
    left, both = prior.left_only(), prior.both_sides()
    shared = {"denoiser": left, "beta": problem.beta, "clean": drawn_tokens(mask, 2)}
    demanding = {"denoiser": OnDemand(left), "beta": problem.beta}
    methods: tuple[Callable[..., Draws], ...] = (
        partial(plain_draws, denoiser=OnDemand(left)),
        partial(plain_draws, denoiser=OnDemand(both)),
        partial(best_of_n, candidates=CANDIDATES, **demanding),
        partial(svdd, candidates=SVDD_CANDIDATES, **shared),
        partial(fk_steering, particles=problem.draws, **shared),
    )
    found: dict[str, Method] = {
        name: partial(problem.infills, method)
        for name, method in zip(TRAINING_FREE, methods, strict=True)
    }
    if model is not None:
        found[AUTOREGRESSIVE] = partial(autoregressive, problem, model)
    return found


def plain_draws(
    diffusion: Any,
    *,
    denoiser: Any,
    log_reward: LogReward,
    condition: Any,
    n: int,
    generator: Generator,
) -> Draws:
    """Draws of a denoiser's chain as it is."""
    counted = CountedDenoiser(denoiser)
    x0 = Sampler(diffusion, counted).sample(condition, n, generator=generator)
    return Draws(x0, counted.calls / (len(x0) * n))


def autoregressive(problem: GapProblem, model: LanguageModel, generator: Generator) -> Infills:
    """The language model goes on from the left context, as many of its tokens as the gap had."""
    gaps = [gap for gap in problem.prompts.gaps for _ in range(problem.draws)]
    begun = time.monotonic()
    middles = [gap.middle or "" for gap in gaps]
    lengths = [max(1, len(ids)) for ids in model.codec.encode([f" {text}" for text in middles])]
    texts = model.sample([gap.left for gap in gaps], lengths, generator=generator)
    flat = [gap._replace(middle=text) for gap, text in zip(gaps, texts, strict=True)]
    rows = [flat[i : i + problem.draws] for i in range(0, len(flat), problem.draws)]
    return Infills(rows, sum(lengths) / len(lengths), (time.monotonic() - begun) / len(flat))


def weighted_reference(
    problem: GapProblem, reference: ImportanceReference, calls: int, generator: Generator
) -> Infills:
    """Prior draws by weight, which took so many network calls: the truth to compare with."""
    begun = time.monotonic()
    x0 = reference.resample(problem.draws, generator=generator)
    texts = len(x0) * problem.draws
    seconds = (time.monotonic() - begun) / texts
    return Infills(problem.written(x0), calls / texts, seconds, reference.log_z, reference.ess)


def trained(
    problem: GapProblem,
    posterior: TextPosterior,
    generator: Generator,
    *,
    paths: int,
    calls_before: int = 0,
) -> Infills:
    """Draws of a posterior; log Z, ELBO and effective sample size by `paths` more of each prompt.

    Calls are those of a draw: the rows of the posterior's network that were evaluated. To those of
    training `calls_before` are added.
    """
    draw = partial(plain_draws, denoiser=posterior.sampler.denoiser)
    drawn = problem.infills(draw, generator)
    weights = torch.cat(
        [
            path_weights(problem, posterior, begin, paths, generator)
            for begin in range(0, len(problem.prompts.gaps), ROWS)
        ]
    )
    return Infills(
        drawn.gaps,
        drawn.calls,
        drawn.seconds,
        importance_log_z(weights)[0],
        effective_sample_size(weights),
        elbo(weights),
        training_calls=calls_before + posterior.results["network_calls"],
        training_seconds=posterior.results["seconds"],
    )


@torch.no_grad()
def path_weights(
    problem: GapProblem, posterior: TextPosterior, begin: int, paths: int, generator: Generator
) -> torch.Tensor:
    """Log-weights of posterior paths of some prompts: float64 [prompts, paths]."""
    task = posterior.task
    condition = conditions.take(problem.prompts.condition, slice(begin, begin + ROWS))
    rows = conditions.count(condition) or 1
    each = conditions.repeat(condition, paths)
    path, ratio = rollout_against(
        task.diffusion, task.posterior, task.prior, each, rows * paths, generator=generator
    )
    log_reward = problem.log_reward(path.x0, each)
    return log_weight(log_reward, ratio, problem.beta).double().reshape(rows, paths)
