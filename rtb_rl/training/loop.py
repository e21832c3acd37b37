"""The loop of every training stage: update, log, checkpoint, show progress, resume."""

import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from rtb_rl.errors import NonFiniteError
from rtb_rl.training.checkpoint import Stateful, newest_checkpoint
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run

Metrics = Mapping[str, Tensor | float]


class Clock:
    """Seconds spent in a stage, kept over interruptions."""

    def __init__(self):
        self.before = 0.0
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.before, self.begun = state["seconds"], time.monotonic()


def train(
    run: Run,
    update: Callable[[int], Metrics],
    parts: Mapping[str, Stateful],
    *,
    steps: int,
    description: str,
    log_every: int = 100,
    checkpoint_every: int = 2000,
    agree: Callable[[int], int] = lambda step: step,
    observe: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> float:
    """Call `update(step)` for steps 0..steps - 1 from the newest checkpoint on; the seconds it
    took.

    `parts` must hold all that changes: weights, averages, optimisers, memories and generators. Then
    a run that was killed ends like one that was not, to the last bit on a CPU; torch's global
    generator is not kept. `observe` is called with the number of steps done whenever metrics are
    logged, `after_step` with it after each of them, before a checkpoint is made; `agree` as in
    `Run.restore`. Raises NonFiniteError when a logged metric is NaN or infinite, before a
    checkpoint could hold what made it so.
    """
    clock = Clock()
    parts = {**parts, "clock": clock}
    start = run.restore(parts, agree=agree)
    with progress(description, steps, start=start) as show:
        for step in range(start, steps):
            try:
                metrics = update(step)
            except NonFiniteError as error:
                raise _stopped(run, error) from None
            done = step + 1
            if after_step is not None:
                after_step(done)
            logs, saves = done % log_every == 0, done % checkpoint_every == 0
            if logs or saves or done == steps:
                values = _finite(run, step, metrics)
                if logs:
                    run.log(done, values)
                if logs and observe is not None:
                    observe(done)
                if saves or done == steps:
                    run.save(done, parts)
                show(done, _note(values))
    return clock.seconds


def _finite(run: Run, step: int, metrics: Metrics) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise _stopped(run, NonFiniteError(f"{name} is {value} at step {step}"))
    return values


def _stopped(run: Run, error: NonFiniteError) -> NonFiniteError:
    """The error with what is left of the run and what to do."""
    good = newest_checkpoint(run.directory / "checkpoints")
    return NonFiniteError(
        f"{error}; stopped, and nothing of it is kept. The last good checkpoint is"
        f" {good or 'none'}. Lower the learning rate or beta, or look for bad values in the data"
        " or the reward"
    )


def _note(values: Mapping[str, float]) -> str:
    name, value = next(iter(values.items()))
    return f"{name.split('/')[-1]} {value:.4g}"
