"""Fitting a posterior as a stage: trained by what it is given, counted, diagnosed, resumed."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.ema import TrainedState
from rtb_rl.training.loop import train
from rtb_rl.training.processes import first_of_all, own_directory, sum_of_all
from rtb_rl.training.run import Run
from rtb_rl.training.stage import complete
from rtb_rl.training.task import Task


class Trainer(Protocol):
    """What trains a posterior: the fine-tuner, or a baseline."""

    average: Any

    def update(self, step: int) -> Mapping[str, Tensor | float]: ...

    @property
    def parts(self) -> dict[str, Stateful]: ...


def open_posterior_run(directory: Path, config: Mapping[str, Any], accelerator: Accelerator) -> Run:
    """This process's run; where the first process has finished, all take over what it has."""
    accelerator.wait_for_everyone()
    finished = (directory / "results.json").exists()
    accelerator.wait_for_everyone()
    own = directory if finished else own_directory(directory, accelerator)
    if not finished:  # of the first, so that all go on together
        (own / "results.json").unlink(missing_ok=True)
    with accelerator.main_process_first():
        return Run(own, config)


def fit_posterior_stage(
    run: Run,
    task: Task,
    new_trainer: Callable[[], Trainer],
    *,
    networks: Iterable[nn.Module],
    steps: int,
    log_every: int,
    observe: Callable[[Run, NetworkCalls, int], None],
    diagnose: Callable[[], Mapping[str, float]],
    accelerator: Accelerator,
    begin: Callable[[], Mapping[str, Any]] = dict,
) -> Mapping[str, Any]:
    """Train `task.posterior`, or load it where the run has finished; afterwards it is frozen.

    Returns the run's results: seconds and rows sent through `networks`, those of `begin` included,
    what `begin` said (it starts the posterior before the trainer is made) and the diagnostics.
    `observe(run, calls, step)` is called whenever metrics are logged; `calls.total` may be set back
    to what it was, for work that is not the method's.
    """

    def fit() -> dict[str, Any]:
        with accelerator.main_process_first():
            start = begin()
        trainer = new_trainer()
        calls = NetworkCalls(networks)
        seconds = train(
            run,
            trainer.update,
            {**trainer.parts, "network_calls": calls},
            steps=steps,
            description="posterior",
            log_every=log_every,
            checkpoint_every=5 * log_every,
            agree=partial(first_of_all, accelerator),
            observe=partial(observe, run, calls),
        )
        calls.stop()
        task.posterior.load_state_dict(trainer.average.module.state_dict())
        return {
            "seconds": seconds + start.get("seconds", 0.0),
            "network_calls": sum_of_all(accelerator, calls.total) + start.get("network_calls", 0),
            "start": start,
            "diagnostics": diagnose(),
        }

    complete(run, task.posterior, fit, part=TrainedState(task.posterior))
    return run.results or {}
