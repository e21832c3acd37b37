"""How near posteriors that factorise over positions can come to the exact one, by enumeration.

The exact posterior of a masked chain is its Doob transform, K_k(x, y) h_{k-1}(y) / h_k(x) with
h_0 = r and h_k = K_k h_{k-1}. Where a step reveals several tokens it doesn't factorise. The floor
is the chain of the products of its marginals, the factorised steps with the least forward KL
divergence. All tensors float64; rows of tables [(V + 1)^length, ...] as in `TokenSpace`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from rtb_rl.core import linear_masking
from rtb_rl.tasks.toy.enumeration import TokenSpace, tilted, total_variation

Projection = Callable[[TokenSpace, Tensor, float], Tensor]
"""(space, marginals of the exact step [rows, length, V + 1], reveal probability) -> marginals of a
factorised step. Token V stands for 'stays masked'.
"""


@dataclass(frozen=True)
class TokenFloor:
    """Total variation of a family's best chain of `levels` steps to the exact p r / Z.

    Mean over random instances, and their standard deviation.
    """

    family: str
    levels: int
    tv: float
    deviation: float


def learned_reveal(space: TokenSpace, marginals: Tensor, reveal: float) -> Tensor:
    """The marginals as they are: each position learns when it is revealed, and as what."""
    return marginals


def shared_schedule(space: TokenSpace, marginals: Tensor, reveal: float) -> Tensor:
    """The prior's reveal probability; the marginals of the tokens given that they are revealed."""
    tokens = marginals[..., :-1]
    return factorised_step(space, tokens / tokens.sum(-1, keepdim=True).clamp(min=1e-300), reveal)


def token_floors(
    levels: Sequence[int] = (1, 2, 4, 8, 16, 64),
    *,
    vocabulary: int = 3,
    length: int = 4,
    instances: int = 20,
    generator: Generator,
) -> list[TokenFloor]:
    """Floors of random instances, for linear masking and independent reveals.

    A consistent prior has the true conditionals of a random law p, and errors are to p r / Z, so
    that they count the prior's own factorisation too. An inconsistent prior has arbitrary
    conditionals, as a network does, and errors are to the tilted law of its own chain. The last
    family has the true conditionals of p r / Z, what denoising training on exact samples finds.

    log p is a normal number of standard deviation 2 for each sequence; log r a sum over pairs of
    positions, of 2 for the consistent prior and 1.3 for the other, whose logits have 1.5. These
    laws were picked by hand to come near an earlier table of one instance each, of unknown law and
    seed: for T = 1 2 4 8 16 64

        consistent       .596 .366 .216 .118 .062 .016    here within 7 %
        learned reveal   .122 .153 .120 .077 .045 .013    within 10 % from T = 2 on, 30 % at 1
        shared schedule  .122 .170 .152 .126 .105 .086    up to 60 % above (1.6 deviations)
    """
    space = TokenSpace(vocabulary, length)
    errors: dict[tuple[str, int], list[float]] = {}
    for _ in range(instances):
        for family, chain_error in _random_instance(space, generator):
            for count in levels:
                errors.setdefault((family, count), []).append(chain_error(count))
    floors = []
    for (family, count), values in errors.items():
        tv = torch.tensor(values, dtype=torch.float64)
        floors.append(TokenFloor(family, count, float(tv.mean()), float(tv.std(correction=0))))
    return floors


def _random_instance(
    space: TokenSpace, generator: Generator
) -> list[tuple[str, Callable[[int], float]]]:
    """A consistent and an inconsistent prior: families, and their error by number of levels."""
    logits = torch.randn(len(space.clean), generator=generator, dtype=torch.float64)
    law = (2.0 * logits).softmax(0)
    log_reward = 2.0 * space.coupled_logits(generator=generator)
    target = tilted(law, log_reward)
    tokens = space.conditionals(law)
    best = space.conditionals(target)
    shape = (*space.sequences.shape, space.vocabulary)
    arbitrary = (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)
    milder = 1.3 * space.coupled_logits(generator=generator)

    def consistent(levels: int) -> float:
        chain = projected_chain(space, tokens, log_reward, levels, learned_reveal)
        return total_variation(chain_law(space, chain), target)

    def inconsistent(project: Projection) -> Callable[[int], float]:
        def error(levels: int) -> float:
            chain = projected_chain(space, arbitrary, milder, levels, project)
            prior = chain_law(space, prior_chain(space, arbitrary, levels))
            return total_variation(chain_law(space, chain), tilted(prior, milder))

        return error

    return [
        ("consistent prior", consistent),
        ("inconsistent prior, learned reveal", inconsistent(learned_reveal)),
        ("inconsistent prior, shared schedule", inconsistent(shared_schedule)),
        (
            "conditionals of the target",
            lambda levels: total_variation(
                chain_law(space, prior_chain(space, best, levels)), target
            ),
        ),
    ]


def prior_chain(space: TokenSpace, tokens: Tensor, levels: int) -> list[Tensor]:
    """Factorised steps of a chain that reveals with linear masking; entry k - 1 from level k.

    `tokens`: probabilities [rows, length, V], used where a row is masked.
    """
    reveal = linear_masking(levels).reveal_probability
    return [factorised_step(space, tokens, float(reveal[k])) for k in range(1, levels + 1)]


def factorised_step(space: TokenSpace, tokens: Tensor, reveal: float) -> Tensor:
    """Marginals [rows, length, V + 1]: revealed with one probability, else still masked."""
    stay = torch.full_like(tokens[..., :1], 1 - reveal)
    step = torch.cat([reveal * tokens, stay], -1)
    unchanged = functional.one_hot(space.sequences, space.vocabulary + 1).double()
    return torch.where(space.masked[..., None], step, unchanged)


def projected_chain(
    space: TokenSpace, tokens: Tensor, log_reward: Tensor, levels: int, project: Projection
) -> list[Tensor]:
    """The exact posterior of `prior_chain`, each step replaced by its projection."""
    desirability = torch.zeros(len(space.sequences), dtype=torch.float64)
    desirability[space.clean_index] = log_reward.exp()
    reveal = linear_masking(levels).reveal_probability
    chain = []
    for k, step in enumerate(prior_chain(space, tokens, levels), start=1):
        joint = transitions(step) * desirability
        desirability = joint.sum(1)
        exact = joint / desirability.clamp(min=1e-300)[:, None]
        chain.append(project(space, marginals(space, exact), float(reveal[k])))
    return chain


def transitions(step: Tensor) -> Tensor:
    """Probabilities from row to row of a factorised step: [rows, rows]."""
    product = step[:, 0]
    for position in range(1, step.shape[1]):
        product = (product[:, :, None] * step[:, position, None, :]).flatten(1)
    return product


def marginals(space: TokenSpace, matrix: Tensor) -> Tensor:
    """Each position's marginals of a step from row to row: [rows, length, V + 1]."""
    to = functional.one_hot(space.sequences, space.vocabulary + 1).double()
    return (matrix @ to.flatten(1)).unflatten(-1, to.shape[1:])


def chain_law(space: TokenSpace, chain: list[Tensor]) -> Tensor:
    """The law of the clean sequences at the end of a chain that starts from all mask."""
    law = torch.zeros(len(space.sequences), dtype=torch.float64)
    law[-1] = 1
    for step in reversed(chain):
        law = law @ transitions(step)
    return law[space.clean_index]
