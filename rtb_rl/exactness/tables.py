"""Tables over listed token sequences: posteriors that no network limits, and what they fit."""

from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import MaskedDiffusion, RevealPrediction
from rtb_rl.core.protocols import Condition
from rtb_rl.nn import LearnedReveal
from rtb_rl.tasks.toy import TabularDenoiser, TokenSpace, Toy, terminal_law, total_variation
from rtb_rl.tasks.toy.enumeration import tilted
from rtb_rl.tasks.toy.floors import Projection, chain_law, projected_chain
from rtb_rl.tasks.toy.tokens import TokenPosteriorMaker
from rtb_rl.training.task import Task


class LevelTable(nn.Module):
    """The prior's logits plus a learned table for every level, [K + 1, rows, length, V]; zero at
    first.
    """

    def __init__(self, prior: TabularDenoiser, diffusion: MaskedDiffusion):
        super().__init__()
        self.prior = prior
        shape = (diffusion.levels + 1, *prior.logits.shape)
        self.correction = nn.Parameter(torch.zeros(shape, dtype=prior.logits.dtype))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        row = self.prior.space.index(x)
        return (self.prior.logits[row] + self.correction[level, row]).log_softmax(-1)


class RevealTable(nn.Module):
    """`LevelTable`, and a reveal shift for every level, sequence and position, within +-3.

    The shift that `LearnedReveal` learns is the same for every sequence.
    """

    def __init__(self, prior: TabularDenoiser, diffusion: MaskedDiffusion):
        super().__init__()
        self.tokens = LevelTable(prior, diffusion)
        self.shift = nn.Parameter(torch.zeros_like(self.tokens.correction[..., 0]))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> RevealPrediction:
        shift = self.shift[level, self.tokens.prior.space.index(x)]
        return RevealPrediction(self.tokens(x, level, condition), 3 * torch.tanh(shift / 3))


def reveal_by_position(prior: TabularDenoiser, diffusion: MaskedDiffusion) -> LearnedReveal:
    """`LevelTable` with `LearnedReveal`."""
    network = LevelTable(prior, diffusion)
    return LearnedReveal(network, levels=diffusion.levels, length=diffusion.length)


FAMILIES: dict[str, TokenPosteriorMaker] = {
    "shared schedule": LevelTable,
    "reveals learned by position": reveal_by_position,
    "reveals learned by sequence": RevealTable,
}


class InconsistentTokens:
    """A prior whose predictions contradict each other, as a network's do, and a coupled reward.

    Logits have standard deviation 1.5, log r 1.3. The target is the tilted law of the prior's own
    chain, whose steps reveal independently with linear masking.
    """

    def __init__(self, diffusion: MaskedDiffusion, *, generator: Generator):
        self.diffusion, self.space = diffusion, TokenSpace(diffusion.mask, diffusion.length)
        shape = (*self.space.sequences.shape, diffusion.mask)
        logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.prior = TabularDenoiser(self.space, logits)
        self.log_reward = 1.3 * self.space.coupled_logits(generator=generator)

    @cached_property
    def law(self) -> Tensor:
        """The law of the prior's chain: [V^length]."""
        return terminal_law(self.diffusion, self.prior)

    def error(self, law: Tensor) -> float:
        """Total variation of a law to the target."""
        return total_variation(law, tilted(self.law, self.log_reward))

    def floor(self, project: Projection) -> float:
        """The error of the exact posterior's steps, each projected on factorised ones."""
        tokens, levels = self.prior.logits.softmax(-1), self.diffusion.levels
        chain = projected_chain(self.space, tokens, self.log_reward, levels, project)
        return self.error(chain_law(self.space, chain))

    def toy(self, posterior: TokenPosteriorMaker) -> Toy:
        task = Task(
            "inconsistent_tokens",
            self.diffusion,
            self.prior,
            posterior(self.prior, self.diffusion),
            log_reward=lambda x0, condition: self.log_reward[self.space.clean_rows(x0)],
            evaluate=lambda sampler: {
                "tv": self.error(terminal_law(self.diffusion, sampler.denoiser))
            },
        )
        return Toy(
            task,
            log_z=lambda condition: (self.law.log() + self.log_reward).logsumexp(0).reshape(1),
            errors=lambda x0, condition: {"tv": self.error(self.space.frequencies(x0))},
        )


class PointLogZ(nn.Module):
    """log Z of every sequence of tokens and masks, a table."""

    def __init__(self, space: TokenSpace):
        super().__init__()
        self.space = space
        self.table = nn.Parameter(torch.zeros(len(space.sequences), dtype=torch.float64))

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return self.table[self.space.index(x)]
