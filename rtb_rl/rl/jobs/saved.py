"""Policies of finished runs, rebuilt from their files alone."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.core import Sampler
from rtb_rl.errors import InputError
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.critics.gaussian_policy import GaussianPolicy, MeanActionPolicy
from rtb_rl.rl.critics.identity import told_by_tensors
from rtb_rl.rl.episodes.evaluation import Policy
from rtb_rl.rl.fitted import check_finished, finished_config, fitted_config
from rtb_rl.rl.jobs.run_critic import load_run_critic
from rtb_rl.rl.peers.d3rlpy_peer import load_d3rlpy
from rtb_rl.rl.peers.diffusion_q import load_diffusion_q
from rtb_rl.rl.peers.energy_guidance import load_energy_guidance
from rtb_rl.rl.peers.td3_bc import load_td3_bc
from rtb_rl.rl.posteriors.amortised import AmortisedPolicy, amortised_model
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.rl.posteriors.posterior import posterior_model
from rtb_rl.rl.posteriors.prior import ActionDiffusion, ActionNetwork
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint, load_weights


@dataclass(frozen=True)
class SavedPolicy:
    """A policy and what it was made for."""

    policy: Policy
    env_id: str | None
    reference_returns: tuple[float, float] | None

    def act(self, observations: Tensor, *, generator: Generator) -> Tensor:
        """Actions [batch, action size] in the environment's units."""
        return self.policy.act(observations, generator=generator)


def load_policy(
    directory: str | Path, method: str | None = None, *, critic: Critic | None = None
) -> SavedPolicy:
    """The policy of a run: that of its program, or of another method it has fitted.

    `critic` stands in for one that the run was given as a Python object. Raises InputError for a
    directory without a finished run or a method it has not fitted.
    """
    root = Path(directory)
    if not root.exists():
        raise InputError(f"there is no directory {root}; give the --out of a finished run")
    config = fitted_config(root)
    method = method or config.get("method")
    if method not in METHODS:
        raise InputError(f"method {method!r} is none of {', '.join(METHODS)}; name one of these")
    of = METHODS[method]
    if method == config.get("method") and not all((root / name).exists() for name in of.stages):
        check_finished(root)
    policy = of.load(root, config, critic)
    reference = config["reference_returns"]
    return SavedPolicy(policy, config["env_id"], tuple(reference) if reference else None)


def _prior(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    return _acting(load_prior(root / "prior").sampler, config)


def _iql(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    return MeanActionPolicy(load_gaussian(root / "iql"))


def _best_of_n(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    return _acting(load_prior(root / "prior").sampler, config, critic or load_run_critic(root))


def _rtb(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    return _acting(load_posterior(root, critic).sampler, config)


def _rtb_best_of_n(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    chosen_by = critic or load_run_critic(root)
    return _acting(load_posterior(root, chosen_by).sampler, config, chosen_by)


def _amortised(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    stage, prior = finished_config(root / "amortised"), load_prior(root / "prior")
    check_made_of(root / "amortised", "prior", prior)
    network = ActionNetwork(**stage["amortised"]["network"])
    model = amortised_model(prior, stage["observation_size"], network, seed=0)
    load_weights(root / "amortised", model)
    model.requires_grad_(False).eval()
    sampler = Sampler(prior.diffusion, model)
    return AmortisedPolicy(_acting(sampler, config), acting_beta(root))


def acting_beta(root: Path) -> float:
    """The strength at which the posterior of all strengths acts."""
    beta = fitted_config(root / "amortised")["acting_beta"]
    if beta is None:
        check_finished(root / "acting")
        beta = json.loads((root / "acting" / "results.json").read_text())["beta"]
    return beta


def _qgpo(root: Path, config: dict[str, Any], critic: Critic | None) -> Policy:
    finished_config(root / "qgpo")  # before its settings: a run of another program has neither
    scale = config["settings"]["qgpo"]["scale"]
    return load_energy_guidance(root / "qgpo", load_prior(root / "prior"), scale=scale)


Loader = Callable[[Path, dict[str, Any], Critic | None], Policy]


@dataclass(frozen=True)
class Method:
    """How a policy is loaded from the directory of a run, its configuration, and the critic where
    that was given as a Python object.
    """

    load: Loader
    stages: tuple[str, ...]
    """Those by whose weights it acts."""
    chooses: bool = False
    """Whether the critic chooses among draws."""


METHODS = {
    "prior": Method(_prior, ("prior",)),
    "iql": Method(_iql, ("iql",)),
    "best_of_n": Method(_best_of_n, ("prior",), chooses=True),
    "rtb": Method(_rtb, ("posterior",)),
    "rtb_best_of_n": Method(_rtb_best_of_n, ("posterior",), chooses=True),
    "rtb_amortised": Method(_amortised, ("amortised",)),
    "qgpo": Method(_qgpo, ("prior", "qgpo")),
    "dql": Method(lambda root, config, critic: load_diffusion_q(root / "dql"), ("dql",)),
    "td3_bc": Method(lambda root, config, critic: load_td3_bc(root / "td3_bc"), ("td3_bc",)),
    "d3rlpy_iql": Method(lambda root, config, critic: load_d3rlpy(root / "d3rlpy"), ("d3rlpy",)),
    "d3rlpy_cql": Method(lambda root, config, critic: load_d3rlpy(root / "d3rlpy"), ("d3rlpy",)),
}


def posterior_settings(root: Path) -> dict[str, Any]:
    """Those that the posterior of a run was fitted with."""
    return finished_config(root / "posterior")["posterior"]


def _acting(
    sampler: Sampler, config: dict[str, Any], critic: Critic | None = None
) -> DiffusionPolicy:
    """Acts by draws of the sampler, or by the one of several that a critic chooses."""
    return DiffusionPolicy(
        sampler,
        action_low=torch.tensor(config["action_low"]),
        action_high=torch.tensor(config["action_high"]),
        candidates=1 if critic is None else config["candidates"],
        critic=critic,
    )


def load_prior(directory: Path) -> ActionDiffusion:
    """The behaviour prior that `fit_prior` left in a directory."""
    config = finished_config(directory)
    model = ActionDiffusion(
        config["observation_size"],
        config["action_size"],
        ActionNetwork(**config["network"]),
        generator=generator_for(0, "replaced"),
    )
    load_weights(directory, model)
    return model.requires_grad_(False).eval()


def load_posterior(root: Path, critic: Critic | None = None) -> ActionDiffusion:
    """The posterior of a run; `critic` stands in for one that it was given as a Python object.

    Raises InputError where it was fitted to another prior than the one of the run, or climbs
    another critic.
    """
    langevin, prior = posterior_settings(root)["langevin"], load_prior(root / "prior")
    needed = critic or load_run_critic(root) if langevin else critic
    check_made_of(root / "posterior", "prior", prior)
    if needed is not None and langevin and told_by_tensors(needed):
        check_made_of(root / "posterior", "critic", needed)
    posterior = posterior_model(prior, needed, langevin=langevin)
    load_weights(root / "posterior", posterior)
    return posterior.requires_grad_(False).eval()


def load_gaussian(directory: Path) -> GaussianPolicy:
    """The Gaussian policy that `fit_gaussian_policy` left in a directory."""
    config = finished_config(directory)
    policy = GaussianPolicy(
        config["observation_size"],
        action_low=torch.tensor(config["action_low"]),
        action_high=torch.tensor(config["action_high"]),
        generator=generator_for(0, "replaced"),
    )
    load_weights(directory, policy)
    return policy.requires_grad_(False).eval()


def check_made_of(stage: Path, name: str, part: object) -> None:
    """InputError where a stage was fitted to another prior or critic, by its tensors, than this."""
    told, here = fitted_config(stage).get(name), fingerprint(part)
    if told not in (None, here):
        raise InputError(
            f"{stage} was fitted to another {name} than is here (sha256 {told[:12]} there,"
            f" {here[:12]} here); put back the one it was made with, or remove {stage} and run the"
            " same command again"
        )
