"""Short token sequences with tabular denoisers, where everything is known by enumeration."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import Denoiser, MaskedDiffusion, RevealLaw, RevealPrediction, Sampler
from rtb_rl.core.protocols import Condition
from rtb_rl.tasks.toy.answer import Toy
from rtb_rl.tasks.toy.enumeration import TokenSpace, tilted, total_variation
from rtb_rl.training.task import Task


class TabularDenoiser(nn.Module):
    """Logits for every sequence of tokens and masks: a table [(V + 1)^length, length, V].

    Returns log-probabilities [batch, length, V], of every level alike; without condition.
    """

    logits: Tensor

    def __init__(self, space: TokenSpace, logits: Tensor):
        super().__init__()
        self.space = space
        self.register_buffer("logits", logits)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.logits[self.space.index(x)].log_softmax(-1)


class TabularCorrection(nn.Module):
    """The prior's logits plus a learned table, zero at first; no network limits it."""

    def __init__(self, prior: TabularDenoiser, diffusion: MaskedDiffusion):
        super().__init__()
        self.prior = prior
        self.correction = nn.Parameter(torch.zeros_like(prior.logits))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        row = self.prior.space.index(x)
        return (self.prior.logits[row] + self.correction[row]).log_softmax(-1)


TokenPosteriorMaker = Callable[[TabularDenoiser, MaskedDiffusion], nn.Module]
"""(prior, diffusion) -> a posterior that starts as the prior."""


def token_task(
    vocabulary: int,
    length: int,
    reveals: RevealLaw,
    *,
    posterior: TokenPosteriorMaker = TabularCorrection,
    generator: Generator,
    coupling: float = 2.0,
    reward_scale: float = 2.0,
) -> Toy:
    """A random law p of V^length sequences, tilted by a random log-reward over pairs of positions.

    log p has standard deviation `coupling`, log r `reward_scale`; the prior has the exact
    conditionals of p. Target and log Z are those of the prior's chain: p r / Z where each step
    reveals one token (`exact_posterior` then has residual zero on every path), near it where steps
    reveal several.
    """
    space = TokenSpace(vocabulary, length)
    logits = torch.randn(len(space.clean), generator=generator, dtype=torch.float64)
    law = (coupling * logits).softmax(0)
    log_reward = reward_scale * space.coupled_logits(generator=generator)
    prior = TabularDenoiser(space, space.conditionals(law).log())
    diffusion = MaskedDiffusion(length, vocabulary, reveals)
    return _token_toy(space, diffusion, prior, posterior(prior, diffusion), law, log_reward)


def _token_toy(
    space: TokenSpace,
    diffusion: MaskedDiffusion,
    prior: TabularDenoiser,
    posterior: nn.Module,
    law: Tensor,
    log_reward: Tensor,
) -> Toy:
    """The toy of given tables. `task.evaluate`: total variation "tv" to the target, enumerated.

    "tv" of `errors` counts draws, of which n leave about sqrt(cells / n).
    """
    chain = terminal_law(diffusion, prior)
    target = tilted(chain, log_reward)

    def evaluate(sampler: Sampler) -> dict[str, float]:
        return {"tv": total_variation(terminal_law(diffusion, sampler.denoiser), target)}

    task = Task(
        name="tokens",
        diffusion=diffusion,
        prior=prior,
        posterior=posterior,
        log_reward=lambda x0, condition: log_reward[space.clean_rows(x0)],
        draw_conditions=lambda n, *, generator: (
            None,
            space.draw(law, n, generator=generator),
        ),
        evaluate=evaluate,
        draw_target=lambda condition, n, *, generator: space.draw(target, n, generator=generator),
    )
    return Toy(
        task,
        log_z=lambda condition: (chain.log() + log_reward).logsumexp(0).reshape(1),
        errors=lambda x0, condition: {"tv": total_variation(space.frequencies(x0), target)},
        exact_posterior=_exact_posterior(space, diffusion, target),
    )


def _exact_posterior(
    space: TokenSpace, diffusion: MaskedDiffusion, target: Tensor
) -> TabularDenoiser | None:
    """The conditionals of the target, if their chain ends in it; it doesn't where the tokens that
    a step reveals together depend on each other.
    """
    denoiser = TabularDenoiser(space, space.conditionals(target).log())
    error = total_variation(terminal_law(diffusion, denoiser), target)
    return denoiser if error < 1e-12 else None


@torch.no_grad()
def terminal_law(diffusion: MaskedDiffusion, denoiser: Denoiser) -> Tensor:
    """The exact law of x[0] for a denoiser without condition: [V^length], float64.

    The law of x[K] is propagated through the kernels, of all pairs of sequences where one can
    follow the other. The mask must be the last id, V.
    """
    space = TokenSpace(diffusion.mask, diffusion.length)
    agrees = (space.sequences[:, None] == space.sequences) | space.masked[:, None]
    before, after = agrees.all(-1).nonzero(as_tuple=True)
    law = torch.zeros(len(space.sequences), dtype=torch.float64)
    law[-1] = 1
    for k in range(diffusion.levels, 0, -1):
        level = torch.full((len(space.sequences),), k)
        prediction = denoiser(space.sequences, level, None)
        kernel = diffusion.kernel(_rows(prediction, before), space.sequences[before], level[before])
        flow = law[before] * kernel.log_prob(space.sequences[after]).exp().double()
        law = torch.zeros_like(law).index_add(0, after, flow)
    return law[space.clean_index]


def _rows(prediction: Tensor | RevealPrediction, rows: Tensor) -> Tensor | RevealPrediction:
    if isinstance(prediction, RevealPrediction):
        return RevealPrediction(*(part[rows] for part in prediction))
    return prediction[rows]
