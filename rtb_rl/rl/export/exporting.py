"""Policies of finished runs as one file that runs without this package.

A .pt2 file is a program of torch.export, an .onnx file one of ONNX: the whole policy, its denoising
steps, the choice among candidates and the scaling to the environment's box, as

    (observations [batch, d_o], noise [draws, batch * candidates, d_a]) -> actions [batch, d_a]

in float32, the noise N(0, 1) and drawn by the caller. The facts of the policy are JSON inside the
file: `rtb_rl` in the metadata of ONNX, `rtb_rl.json` among the extra files of torch.export.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import rtb_rl
from rtb_rl.errors import InputError
from rtb_rl.nn import ResidualMLP
from rtb_rl.rl.critics.critic import Critic, ObservationScaler
from rtb_rl.rl.episodes.evaluation import Policy
from rtb_rl.rl.export.exported import LoadedPolicy, load_exported
from rtb_rl.rl.export.module import ExportedPolicy, draw_noise, exported_policy, takes_a_gradient
from rtb_rl.rl.export.tracing import Format, needed_for, onnx_bytes, torch_bytes, traced
from rtb_rl.rl.fitted import fitted_config
from rtb_rl.rl.jobs.saved import load_policy
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.training.seeding import generator_for

__all__ = ["Export", "LoadedPolicy", "export_policy", "load_exported"]

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
WITH_BETA = ("rtb", "rtb_best_of_n")
TOLERANCE = 1e-5  # half-widths of the action box
CHECKED_ROWS = (1, 64, 200)


@dataclass(frozen=True)
class Export:
    """A file that was written and agrees with the policy it was made from."""

    path: Path
    facts: dict[str, Any]
    """What is written in the file."""
    difference: float
    """Largest difference to the Python policy, in half-widths of the action box."""
    policies: dict[str, Policy]
    """The same policy by each way of running it."""
    module: ExportedPolicy
    """What was traced."""


def export_policy(
    directory: str | Path,
    path: str | Path | None = None,
    *,
    method: str | None = None,
    format: Format = "onnx",
    candidates: int | None = None,
    critic: Critic | None = None,
) -> Export:
    """Write the policy of a finished run to `path`, RUN/METHOD.onnx or .pt2 where none is given.

    With `candidates` the critic chooses among so many draws. `critic` stands in for one that the
    run was given as a Python object. The file is read back and compared with the Python policy on
    random observations before it takes its name. Raises InputError for a run that is not finished,
    a policy that can't be exported or doesn't agree, packages that are missing and a path that
    can't be written; then the path is as it was.
    """
    root = Path(directory)
    config = _finished(root)
    needed_for(format)
    method = method or str(config["method"])
    target = Path(path) if path is not None else root / f"{method}{SUFFIXES[format]}"
    _check_suffix(target, format)
    policy, critic = _policy(root, method, candidates, critic)
    module = exported_policy(policy, method, critic, config["observation_size"])
    facts = _facts(root, config, method, module, format)
    with _replacing(target) as partial:
        program = traced(module)
        write = onnx_bytes if format == "onnx" else torch_bytes
        partial.write_bytes(write(program, json.dumps(facts, indent=2)))
        loaded = load_exported(partial)
        difference = largest_difference(policy, loaded, module)
        if not difference <= TOLERANCE:
            raise InputError(
                f"the file's actions differ from those of the Python policy by {difference:.1e}"
                f" half-widths of the box, more than {TOLERANCE:.0e}, so it is not kept; try the"
                " other --format"
            )
    policies = {"Python": policy, "torch.export program": LoadedPolicy(program.module(), facts)}
    if format == "onnx":
        policies["ONNX Runtime"] = loaded
    return Export(target, facts, difference, policies, module)


def random_observations(module: ExportedPolicy, rows: int, generator: Generator) -> Tensor:
    """Observations [rows, d_o] with the mean and spread of the data that the policy was fitted to.

    Standard normal where its networks don't standardise.
    """
    size = module.observation_size
    noise = torch.randn(rows, size, generator=generator)
    for part in module.proposal.modules():
        if isinstance(part, ObservationScaler):
            return part.mean + part.std * noise
        if isinstance(part, ResidualMLP) and len(part.condition_mean) == size:
            return part.condition_mean + part.condition_std * noise
    return noise


def _finished(root: Path) -> dict[str, Any]:
    config = fitted_config(root) if (root / "config.json").exists() else {}
    if not {"method", "observation_size", "action_low"} <= set(config):
        raise InputError(
            f"{root} is no run of an offline-RL program (its config.json is missing or of another"
            " kind); give what one such as rtb_iql was given as --out"
        )
    if not (root / "results.json").exists():
        raise InputError(
            f"{root} is not finished (no results.json); run the same command again, then export it"
        )
    return config


def _check_suffix(target: Path, format: str) -> None:
    for other, suffix in SUFFIXES.items():
        if target.suffix == suffix and other != format:
            raise InputError(
                f"{target} has the suffix of --format {other}, but the format is {format}; change"
                " one of them"
            )


def _policy(
    root: Path, method: str, candidates: int | None, critic: Critic | None
) -> tuple[Policy, Critic | None]:
    """The policy with as many candidates as asked for, and the critic of its Langevin term."""

    def own_critic() -> Critic:
        chosen = critic or getattr(load_policy(root, "best_of_n").policy, "critic", None)
        assert chosen is not None
        return chosen

    policy = load_policy(root, method, critic=critic).policy
    if takes_a_gradient(policy):  # then tracing needs the very critic that the policy holds
        critic = own_critic()
        policy = load_policy(root, method, critic=critic).policy
    if candidates is None:
        return policy, critic
    if not isinstance(policy, DiffusionPolicy):
        raise InputError(
            f"method {method!r} proposes one action, but --candidates is {candidates}; leave it out"
        )
    chosen_by = policy.critic or (own_critic() if candidates > 1 else None)
    again = DiffusionPolicy(
        policy.sampler,
        action_low=policy.low,
        action_high=policy.low + 2 * policy.half_width,
        candidates=candidates,
        critic=chosen_by,
    )
    return again, critic


def _facts(
    root: Path, config: dict[str, Any], method: str, module: ExportedPolicy, format: str
) -> dict[str, Any]:
    posterior = fitted_config(root / "posterior")["posterior"] if method in WITH_BETA else None
    kept = ("program", "dataset", "data_sha256", "env_id", "reference_returns", "seed")
    box = ("observation_size", "action_size", "action_low", "action_high")
    manifest = root / "manifest.json"
    versions = json.loads(manifest.read_text())["versions"] if manifest.exists() else {}
    rows = "batch" if module.candidates == 1 else f"{module.candidates} * batch"
    packages = ("torch", "onnx", "onnxscript") if format == "onnx" else ("torch",)
    used = {name: importlib.metadata.version(name) for name in packages}
    return {
        "format": format,
        "method": method,
        **{key: config.get(key) for key in (*kept, *box)},
        "beta": posterior["finetune"]["beta"] if posterior else None,
        "levels": module.draws - 1 if module.draws else None,
        "candidates": module.candidates,
        "draws": module.draws,
        "inputs": {
            "observations": ["batch", config["observation_size"]],
            "noise": [module.draws, rows, config["action_size"]],
        },
        "versions": {"rtb_rl": rtb_rl.__version__, **used},
        "versions_of_the_run": versions,
    }


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside `target` that takes its place at the end, and is removed where that fails."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        partial.touch()
        try:
            yield partial
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"can't write {target}: {error.strerror or error}; give another --out"
        ) from error


@torch.no_grad()
def largest_difference(policy: Policy, other: Policy, module: ExportedPolicy) -> float:
    """Between two policies, on random observations with the same noise, in half-widths of the box.

    Rounding may turn the choice between candidates that the critic values alike; then the action
    is compared with the nearest of those.
    """
    gaps, generator = [], generator_for(0, "export")
    for rows in CHECKED_ROWS:
        observations = random_observations(module, rows, generator)
        state = generator.get_state()
        noise = draw_noise(
            module.draws, rows * module.candidates, len(module.low), generator=generator
        )
        actions = []
        for one in (policy, other):
            same = torch.Generator().set_state(state)
            actions.append(one.act(observations, generator=same))
        gap = ((actions[0] - actions[1]) / module.half_width).abs().amax(1)
        if module.candidates > 1:
            gap = torch.minimum(gap, _to_the_best(module, observations, noise, actions[1]))
        gaps.append(gap)
    return float(torch.cat(gaps).max())  # NaN where one of them is


def _to_the_best(
    module: ExportedPolicy, observations: Tensor, noise: Tensor, actions: Tensor
) -> Tensor:
    """To the nearest candidate of the highest value, up to rounding: [batch]."""
    proposals = module.proposals(observations, noise)
    value = module.values(observations, proposals)
    highest = value.amax(1, keepdim=True)
    best = value >= highest - TOLERANCE * (1 + highest.abs())
    unit = (actions - module.low) / module.half_width - 1
    grouped = proposals.reshape(len(actions), -1, proposals.shape[1])
    distance = (grouped - unit[:, None]).abs().amax(2)
    return distance.masked_fill(~best, torch.inf).amin(1)
