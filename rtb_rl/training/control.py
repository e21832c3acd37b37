"""Less noise in the gradient of on-policy paths: what a step could not change is not laid on it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rtb_rl.core import ScaledPrediction
from rtb_rl.core.protocols import Condition, Objective
from rtb_rl.errors import InputError
from rtb_rl.training.scoring import score
from rtb_rl.training.task import Task

DECAY = 0.95


class LookAhead:
    """slope[k] times the weight that a path would have if it ended in the x0 predicted at x[k].

    Late steps can't change much of where a path ends, and have most of the gradient's noise; there
    the guess is good and takes it away. `slope` is that of the regression of weights on guesses at
    each level, from earlier updates alone, so that the gradient stays unbiased. Costs one reward a
    step that gets a gradient. Gaussian diffusions only.
    """

    def __init__(self, task: Task, objective: Objective):
        self.task, self.objective = task, objective
        levels = task.diffusion.levels + 1
        self.products = torch.zeros(levels, dtype=torch.float64)
        self.squares = torch.zeros(levels, dtype=torch.float64)

    def begin(
        self, weight: Tensor, log_z: Tensor, beta: float, floor: float, on_policy: Tensor
    ) -> None:
        """Before the steps of an update: weights, log Z and whether on-policy of its paths."""
        self._paths = (weight.detach(), log_z.detach(), on_policy)
        self._beta, self._floor = beta, floor
        self._slope = (self.products / self.squares.clamp(min=1e-300)).to(weight)
        self.products *= DECAY
        self.squares *= DECAY

    def __call__(
        self, prediction: Tensor, level: Tensor, condition: Condition, path: Tensor
    ) -> Tensor:
        weight, log_z, on_policy = (values[path] for values in self._paths)
        guess = self._guess(prediction, condition, log_z) * (len(path) / len(self._paths[0]))
        guess = torch.where(on_policy, guess, 0.0)
        for total, values in (
            (self.products, weight * guess),
            (self.squares, guess.square()),
        ):
            total.index_add_(0, level.cpu(), values.double().cpu())
        return self._slope[level] * guess

    def _guess(self, prediction: Tensor, condition: Condition, log_z: Tensor) -> Tensor:
        """d loss / d log_ratio of paths that end in the prediction, as a mean over these rows."""
        x0 = prediction.x0 if isinstance(prediction, ScaledPrediction) else prediction
        if not isinstance(x0, Tensor) or not x0.is_floating_point():
            raise InputError(
                "looking ahead needs a predicted x0, which this task's posterior does not give;"
                " leave it out"
            )
        log_reward, _ = score(self.task, x0.detach(), condition, floor=self._floor)
        with torch.enable_grad():
            ratio = torch.zeros_like(log_reward).requires_grad_()
            loss = self.objective(log_z, ratio, log_reward, self._beta)
            (slope,) = torch.autograd.grad(loss, ratio)
        return slope

    def state_dict(self) -> dict[str, Tensor]:
        return {"products": self.products, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.products, self.squares = state["products"], state["squares"]
