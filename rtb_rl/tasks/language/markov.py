"""Infilling in a Markov chain of words, where posterior and log Z have closed forms.

A sequence is x, z, y: a left context, L = `length` free positions and a right context. The prior is
p(z | x), the log-reward log p(y | x, z), so that log Z = log p(y | x). Of x only the last token
counts, and of y only the first for z. T is the matrix of transitions, T^i its i-th power:

    p(y_1 | x) = T^(L+1)[x, y_1]        p(z_i = v | x, y) = T^i[x, v] T^(L+1-i)[v, y_1] / p(y_1 | x)

Tokens are int64 in 0..V-1, laws float64, log-probabilities nats. The rows of a batch share their
length. The forward-backward algorithm: Rabiner (1989), section III.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rtb_rl.core.kernels import exponential_race
from rtb_rl.errors import InputError

ROUNDING = 1e-9


@dataclass(frozen=True)
class MarkovChain:
    """`initial`: law of the first token, [V]; `transition`: law of the next token in each row,
    [V, V]; both float64. Zeros are allowed. InputError for anything else.
    """

    initial: Tensor
    transition: Tensor

    def __post_init__(self):
        size = len(self.initial)
        if self.initial.shape != (size,) or self.transition.shape != (size, size):
            raise InputError(
                f"a first law {list(self.initial.shape)} and transitions"
                f" {list(self.transition.shape)} make no chain; give [V] and [V, V]"
            )
        for name, law in (("initial", self.initial), ("transition", self.transition)):
            if law.dtype != torch.float64:
                raise InputError(f"{name} is {law.dtype}, not float64; convert it with .double()")
            error = float((law.sum(-1) - 1).abs().max())
            if not error < ROUNDING or bool((law < 0).any()):
                raise InputError(
                    f"{name} is no law: its smallest number is {float(law.min()):.3g}, its sum"
                    f" {error:.3g} off 1; normalise its rows"
                )

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.initial)

    def sample(self, n: int, length: int, *, generator: Generator) -> Tensor:
        """`n` sequences of the chain: int64 [n, length]."""
        tokens = [exponential_race(self.initial.log().expand(n, -1), generator=generator)]
        log_transition = self.transition.log()
        for _ in range(length - 1):
            tokens.append(exponential_race(log_transition[tokens[-1]], generator=generator))
        return torch.stack(tokens, 1)

    def prior_log_prob(self, left_last: Tensor, z: Tensor) -> Tensor:
        """log p(z | x) of tokens z [batch, length] after `left_last` [batch]: [batch]."""
        return self._log_path(torch.cat([left_last[:, None], z], 1))

    def log_reward(self, z: Tensor, right: Tensor) -> Tensor:
        """log p(y | x, z) of the right context [batch, m], m >= 1, after z: [batch]."""
        return self._log_path(torch.cat([z[:, -1:], right], 1))

    def log_z(self, left_last: Tensor, right: Tensor, length: int) -> Tensor:
        """log p(y | x), `length` free positions between them: [batch]."""
        meeting = self._powers(length + 1)[-1][left_last, right[:, 0]]
        return meeting.log() + self._log_path(right)

    def marginals(self, left_last: Tensor, right: Tensor, length: int) -> Tensor:
        """p(z_i = v | x, y) of every free position: [batch, length, V].

        InputError for a right context that can't follow, or no free position.
        """
        self._check_possible(left_last, right, length)
        powers = self._powers(length)
        forward = powers[:, left_last].transpose(0, 1)
        backward = powers.flip(0)[:, :, right[:, 0]].permute(2, 0, 1)
        joint = forward * backward
        return joint / joint.sum(-1, keepdim=True)

    def draw_posterior(
        self, left_last: Tensor, right: Tensor, length: int, n: int, *, generator: Generator
    ) -> Tensor:
        """`n` draws of p(z | x, y) for each row: int64 [batch, n, length].

        Filtered forwards, drawn backwards: z_i from p(z_i | x) p(z_(i+1) | z_i). InputError for a
        right context that can't follow, or no free position.
        """
        self._check_possible(left_last, right, length)
        log_filtered = self._powers(length)[:, left_last].log().repeat_interleave(n, dim=1)
        to_each = self.transition.log().T
        following, drawn = right[:, 0].repeat_interleave(n), []
        for log_law in log_filtered.flip(0):
            following = exponential_race(log_law + to_each[following], generator=generator)
            drawn.append(following)
        return torch.stack(drawn[::-1], 1).reshape(-1, n, length)

    def _log_path(self, tokens: Tensor) -> Tensor:
        """The summed log-probability of the steps between tokens [batch, m]: [batch]."""
        return self.transition[tokens[:, :-1], tokens[:, 1:]].log().sum(1)

    def _powers(self, count: int) -> Tensor:
        """T, T^2, ..., T^count: [count, V, V]. Products of laws are laws: no underflow."""
        powers = [self.transition]
        for _ in range(count - 1):
            powers.append(powers[-1] @ self.transition)
        return torch.stack(powers)

    def _check_possible(self, left_last: Tensor, right: Tensor, length: int) -> None:
        if length < 1:
            raise InputError(f"{length} free positions have no posterior; give 1 or more")
        impossible = self.log_z(left_last, right, length) == -torch.inf
        if bool(impossible.any()):
            row = int(impossible.nonzero()[0])
            raise InputError(
                f"the right context {right[row].tolist()} of row {row} can't follow token"
                f" {int(left_last[row])} and {length} others, so it has no posterior; give one of"
                " positive probability"
            )


def random_chain(
    vocabulary: int = 20, *, concentration: float = 0.5, generator: Generator
) -> MarkovChain:
    """A random chain that starts in its stationary law.

    Each row of transitions is softmax(normal numbers / concentration): nearly uniform for a large
    concentration, nearly certain for a small one. InputError for one that is not positive.
    """
    if not concentration > 0:
        raise InputError(f"concentration is {concentration}; give a positive number")
    shape = (vocabulary, vocabulary)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) / concentration
    transition = logits.softmax(1)
    return MarkovChain(stationary_law(transition), transition)


def stationary_law(transition: Tensor) -> Tensor:
    """The law that positive transitions [V, V] leave as it is: [V]."""
    balance = transition.T - torch.eye(len(transition), dtype=transition.dtype)
    balance[-1] = 1  # one of the V equations follows from the others; in its place, the sum
    wanted = torch.zeros_like(balance[0])
    wanted[-1] = 1
    return torch.linalg.solve(balance, wanted)
