"""Less noise in the gradient of on-policy paths: what a step could not change is not laid on it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rtb_rl.core import ScaledPrediction
from rtb_rl.core.protocols import Condition, Objective
from rtb_rl.errors import InputError
from rtb_rl.training.paths import Part
from rtb_rl.training.scoring import score
from rtb_rl.training.task import Task

DECAY = 0.95
"""Of what earlier updates count, an update."""
RIDGE = 10.0
"""Steps at a level, as if seen, that say nothing is to be concluded there."""
SPREADS = 10.0
"""Standard deviations around its mean within which an open rest is guessed."""


class LookAhead:
    """Guesses the weight of a path from what is settled at x[k], for `backward_in_chunks`.

    The residual is log Z + p + y: p the log-ratio of the steps down to x[k], and y what is open,
    the log-ratio of the steps to come less beta log r. y is guessed by a regression at each level
    on p and on f = -beta log r of the x0 predicted at x[k]. (Late, y is f; for the exact posterior
    it is -p - log Z, since where such a path has got to says what it will be worth.) The weight
    that the objective gives to this residual, scaled by the slope of weights on guesses at the
    level, is the guess. Regression and slope are of earlier updates alone, so that the gradient
    stays unbiased.

    Late steps can't change much of where a path ends and have most of the gradient's noise; there
    nearly all is settled. For squares this is the reward-to-go of policy gradients with a baseline;
    other penalties are no sum over steps, hence the guess. Costs one reward a step that gets a
    gradient. Gaussian diffusions only.
    """

    def __init__(self, task: Task, objective: Objective):
        self.task, self.objective = task, objective
        levels = task.diffusion.levels + 1
        self.sums = torch.zeros((levels, 4, 4), dtype=torch.float64)
        self.products = torch.zeros(levels, dtype=torch.float64)
        self.squares = torch.zeros(levels, dtype=torch.float64)

    def begin(self, paths: Part, weight: Tensor, log_z: Tensor, beta: float, floor: float) -> None:
        """Before the steps of an update: the paths, d loss / d log_ratio of each, and a log Z of
        each that does not depend on it, all [batch].
        """
        self._so_far, self._on_policy = paths.so_far, paths.on_policy
        self._open = paths.log_ratio.detach() - beta * paths.log_reward
        self._finite = paths.log_reward > floor
        self._weight, self._log_z = weight.detach(), log_z.detach()
        self._beta, self._floor = beta, floor
        self._rest, self._range = (of.to(weight) for of in _regression(self.sums))
        self._slope = (self.products / self.squares.clamp(min=1e-300)).to(weight)
        for kept in (self.sums, self.products, self.squares):
            kept *= DECAY

    def __call__(
        self, prediction: Tensor, level: Tensor, condition: Condition, path: Tensor
    ) -> Tensor:
        behind, on_policy = self._so_far[level, path], self._on_policy[path]
        said = torch.stack([torch.ones_like(behind), behind, self._seen(prediction, condition)], 1)
        rest = (said * self._rest[level]).sum(1).clamp(*self._range[level].T)
        guess = self._weighed(self._log_z[path], behind + rest)
        guess = torch.where(on_policy, guess * (len(path) / len(self._weight)), 0.0)
        learned = on_policy & self._finite[path]
        ahead = self._open[path] - behind
        found = torch.cat([said, ahead[:, None]], 1) * learned[:, None]
        for total, values in (
            (self.sums, found[:, :, None] * found[:, None, :]),
            (self.products, self._weight[path] * guess),
            (self.squares, guess.square()),
        ):
            total.index_add_(0, level.cpu(), values.double().cpu())
        return self._slope[level] * guess

    def _seen(self, prediction: Tensor, condition: Condition) -> Tensor:
        """-beta log r of the predictions: [rows]."""
        x0 = prediction.x0 if isinstance(prediction, ScaledPrediction) else prediction
        if not isinstance(x0, Tensor) or not x0.is_floating_point():
            raise InputError(
                "looking ahead needs a predicted x0, which this task's posterior does not give;"
                " leave it out"
            )
        return -self._beta * score(self.task, x0.detach(), condition, floor=self._floor)[0]

    def _weighed(self, log_z: Tensor, rest: Tensor) -> Tensor:
        """d loss / d log_ratio of paths with residual log Z + rest, as a mean over these rows."""
        with torch.enable_grad():
            ratio = rest.detach().requires_grad_()
            loss = self.objective(log_z, ratio, torch.zeros_like(log_z), self._beta)
            (weight,) = torch.autograd.grad(loss, ratio)
        return weight

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "products": self.products, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums = state["sums"]
        self.products, self.squares = state["products"], state["squares"]


def _regression(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of y on (1, p, f) at each level: coefficients [levels, 3], and what y may be, [levels, 2].

    `sums` [levels, 4, 4]: of the products of (1, p, f, y) with each other. A ridge on p and f, in
    units of their spread, shrinks what few steps say; y is within SPREADS of its mean.
    """
    count = sums[:, 0, 0].clamp(min=1.0)
    means = sums[:, 0] / count[:, None]
    around = sums / count[:, None, None] - means[:, :, None] * means[:, None, :]
    variance = around.diagonal(dim1=1, dim2=2).clamp(min=0.0)
    within, with_y = around[:, 1:3, 1:3], around[:, 1:3, 3]
    ridge = variance[:, 1:3] * (RIDGE / count[:, None]) + 1e-9 * (1 + means[:, 1:3].square())
    slopes = torch.linalg.solve(within + torch.diag_embed(ridge), with_y)
    intercept = means[:, 3] - (slopes * means[:, 1:3]).sum(1)
    mean, around_it = means[:, 3:], SPREADS * variance[:, 3:].sqrt()
    bounds = torch.cat([mean - around_it, mean + around_it], 1)
    return torch.cat([intercept[:, None], slopes], 1), bounds
