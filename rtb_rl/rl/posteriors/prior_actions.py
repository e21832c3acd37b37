"""Actions of the behaviour prior at the states of a data set, drawn once and kept in files.

A state is visited many times while a critic or an energy is trained, and a draw takes as many calls
of the prior's network as it has levels: drawing again on each visit would take most of the time.
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Generator, Tensor

from rtb_rl.core import conditions
from rtb_rl.errors import CheckpointError, InputError
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.data.dataset import TransitionDataset, Transitions, data_facts
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint

CHUNK = 4096
"""States in a file."""
AT_A_TIME = 4096
"""Actions drawn or valued together: activations of that many rows stay in a CPU's cache."""


@dataclass(frozen=True, eq=False)
class PriorActions:
    """M draws of the behaviour prior in every state of `data`.

    `actions` [states, M, d_a], float32, as drawn: critics read them clipped to [-1, 1]. The first
    len(data) states are the observations; `next_state` int64 [len(data)] points at the next ones,
    which are mostly observations of the row after.
    """

    data: TransitionDataset
    actions: Tensor
    next_state: Tensor

    @property
    def candidates(self) -> int:
        """M."""
        return self.actions.shape[1]

    def sample(self, n: int, *, generator: Generator) -> tuple[Transitions, Tensor]:
        """n transitions, uniform with replacement, and M draws at each next one: [n, M, d_a]."""
        row = self.draw_rows(n, generator=generator)
        data = self.data
        batch = Transitions(
            data.observations[row],
            data.actions[row],
            data.rewards[row],
            data.next_observations[row],
            data.terminated[row],
        )
        return batch, self.actions[self.next_state[row]]

    def draw_rows(self, n: int, *, generator: Generator) -> Tensor:
        """n rows of `data`, uniform with replacement: int64 [n]."""
        row = torch.randint(len(self.data), (n,), generator=generator, device=generator.device)
        return row.to(self.actions.device)

    @torch.no_grad()
    def values(self, critic: Critic) -> Tensor:
        """Q of the draws at the observations, [len(data), M]; shows a progress bar."""
        count, parts = self.candidates, []
        with progress("values", len(self.data)) as show:
            for observations, rows in conditions.split(
                self.data.observations, len(self.data), max(1, AT_A_TIME // count)
            ):
                assert isinstance(observations, Tensor)
                done = sum(map(len, parts))
                actions = self.actions[done : done + rows].flatten(0, 1).clamp(-1, 1)
                q = critic.q(observations.repeat_interleave(count, 0), actions)
                parts.append(q.reshape(rows, count))
                show(done + rows, "")
        return torch.cat(parts)


def draw_prior_actions(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    *,
    candidates: int = 16,
    rows: int | None = None,
    seed: int = 0,
) -> PriorActions:
    """`candidates` draws of the prior in every state of the data set, or of `rows` of its rows.

    They lie in the directory, (states * candidates * d_a) float32, in files of 4,096 states; each
    file has a generator of its own, so that a process that is killed loses one of them and the next
    continues to the same bits. Raises InputError for a directory with draws of another prior, data
    set or number, CheckpointError for a damaged file.
    """
    if candidates < 1 or (rows is not None and rows < 1):
        raise InputError(f"candidates={candidates}, rows={rows}; draw at least 1 action in 1 row")
    config = {
        **data_facts(dataset),
        "prior": fingerprint(prior),
        "candidates": candidates,
        "rows": rows,
        "seed": seed,
    }
    run, begun = Run(directory, config), time.monotonic()
    data = _some_rows(dataset, rows, seed=seed).to(prior.device)
    states, next_state = linked_states(data)
    parts, chunks = [], states.split(CHUNK)
    with progress("actions", len(states)) as show:
        for number, chunk in enumerate(chunks):
            path = run.directory / f"actions_{number:05d}.safetensors"
            shape = (len(chunk), candidates, dataset.action_size)
            if not path.exists():
                generator = generator_for(seed, "prior_actions", number, device=prior.device)
                drawn = _draw(prior, chunk, candidates, generator=generator).cpu().contiguous()
                replace_file(path, save({"actions": drawn}))
            parts.append(_read(path, shape))
            show(sum(map(len, parts)), "")
    if run.results is None:
        run.finish({"seconds": time.monotonic() - begun, "states": len(states)})
    return PriorActions(data, torch.cat(parts).to(prior.device), next_state)


def own_actions(directory: Path) -> Path:
    """Where a stage keeps draws that only it needs, while it is not complete: with its checkpoints.

    Stages that runs share are copied without those.
    """
    return directory / "checkpoints" / "prior_actions"


def forget_own_actions(directory: Path) -> None:
    """Remove the draws of a complete stage; they are as large as its data set, or larger."""
    shutil.rmtree(own_actions(directory), ignore_errors=True)


def linked_states(data: TransitionDataset) -> tuple[Tensor, Tensor]:
    """All states without most repetitions, [states, d_o], and the place of each next one in it.

    The observations come first, in order, then the next observations that are not the observation
    of the row after them.
    """
    count, device = len(data), data.observations.device
    following = torch.zeros(count, dtype=torch.bool, device=device)
    following[:-1] = (data.next_observations[:-1] == data.observations[1:]).all(1)
    extra = count - 1 + (~following).cumsum(0)
    next_state = torch.where(following, torch.arange(1, count + 1, device=device), extra)
    return torch.cat([data.observations, data.next_observations[~following]]), next_state


def _some_rows(dataset: TransitionDataset, rows: int | None, *, seed: int) -> TransitionDataset:
    """All rows in their order, or `rows` of them, drawn without replacement."""
    if rows is None or rows >= len(dataset):
        return dataset
    generator = generator_for(seed, "prior_actions", "rows")
    chosen = torch.randperm(len(dataset), generator=generator)[:rows].sort().values
    chosen = chosen.to(dataset.rewards.device)
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    return replace(dataset, **{name: getattr(dataset, name)[chosen] for name in names})


def _draw(
    prior: ActionDiffusion, states: Tensor, candidates: int, *, generator: Generator
) -> Tensor:
    size = max(1, AT_A_TIME // candidates)
    parts = [
        prior.sampler.sample(some, candidates, generator=generator) for some in states.split(size)
    ]
    return torch.cat(parts)


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        actions = load(path.read_bytes())["actions"]
    except Exception as error:
        raise CheckpointError(
            f"{path} can't be read ({str(error).splitlines()[0]}); remove this file and run the "
            "same command again"
        ) from error
    if actions.shape != shape:
        raise CheckpointError(
            f"{path} holds actions of shape {tuple(actions.shape)}, needed {shape}; remove the"
            f" directory {path.parent} and run the same command again"
        )
    return actions
