"""Prior draws weighted by the reward: what every method is compared with."""

from pathlib import Path

import torch
from safetensors.torch import load, save

from rtb_rl.baselines import ImportanceReference, importance_reference
from rtb_rl.core import OnDemand
from rtb_rl.tasks.language.methods import ROWS, GapProblem
from rtb_rl.tasks.language.posterior import trunk
from rtb_rl.tasks.language.rewards import token_log_reward
from rtb_rl.training.calls import NetworkCalls
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for


def fit_reference(
    directory: Path, problem: GapProblem, count: int, *, seed: int
) -> tuple[ImportanceReference, int]:
    """`count` prior draws of every prompt with their log-rewards, made here or read again; and the
    network calls that they took.
    """
    run = Run(directory, {"count": count, "seed": seed, "prompts": len(problem.prompts.gaps)})
    path = directory / "draws.safetensors"
    device = problem.prompts.condition["tokens"].device
    if run.results is None:
        calls = NetworkCalls({trunk(problem.prior.network)})
        generator = generator_for(seed, "reference", device=device)
        rows, parts = len(problem.prompts.gaps), []
        with progress(directory.name, -(-rows // ROWS)) as show:
            for begin in range(0, rows, ROWS):
                inside = slice(begin, begin + ROWS)
                condition = {k: v[inside] for k, v in problem.prompts.condition.items()}
                parts.append(
                    importance_reference(
                        problem.prior.diffusion,
                        OnDemand(problem.prior.left_only()),
                        token_log_reward(problem.reward, problem.prompts),
                        condition,
                        count,
                        generator=generator,
                    )
                )
                show(len(parts), "")
        tensors = {
            "x0": torch.cat([part.x0 for part in parts]).cpu(),
            "log_reward": torch.cat([part.log_weight for part in parts]).cpu(),
        }
        replace_file(path, save(tensors))
        calls.stop()
        run.finish({"draws": count * rows, "network_calls": calls.total})
    tensors = load(path.read_bytes())
    weight = problem.beta * tensors["log_reward"]
    made = ImportanceReference(tensors["x0"].to(device), weight.to(device))
    return made, (run.results or {})["network_calls"]
