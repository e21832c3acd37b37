"""Guidance by a learned energy, as in QGPO (arXiv 2304.12824): the prior's sampler, shifted.

The policy prior(a | s) exp(beta Q(s, a)) / Z(s), noised to level k, has the density of the noised
prior times exp(f_k), up to a constant, with the intermediate energy

    f_k(s, a_k) = log E[exp(beta Q(s, a_0)) | a_k],    a_0, a_k from the prior and its noising.

A network learns f_k from draws of the prior by contrastive energy prediction (CEP), and the scale
times its gradient shifts the score of the prior at every step.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtb_rl.core import Denoiser, GaussianDiffusion, Sampler
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.nn import ResidualMLP
from rtb_rl.rl.critics.critic import Critic, check_critic
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.fitted import finished_config
from rtb_rl.rl.peers.contrastive_energy import EnergyTrainer
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.rl.posteriors.prior import ActionDiffusion
from rtb_rl.rl.posteriors.prior_actions import draw_prior_actions, forget_own_actions, own_actions
from rtb_rl.training.loop import train
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import complete, fingerprint, load_weights


@dataclass(frozen=True, kw_only=True)
class EnergyGuidanceSettings:
    """The authors' settings for locomotion (arXiv 2304.12824 and their code).

    The network has as many hidden layers of as many units as theirs, four of 256 with SiLU, but
    residual and normalised. The scale of the guidance is chosen when acting.
    """

    beta: float = 3.0
    """Inverse temperature, in nats per unit of the critic (returns scaled to a range of 1000)."""
    candidates: int = 16
    """M, actions of the prior in every state; 32 on antmaze."""
    rows: int | None = None
    """States used, drawn at random; None: all. Drawing M actions each may take minutes."""
    steps: int = 1_000_000
    batch: int = 256
    """States a step, each with its M actions."""
    learning_rate: float = 3e-4

    def __post_init__(self):
        for name, value in (("steps", self.steps), ("rows", self.rows)):
            if value is not None and value < 1:
                raise InputError(f"energy guidance got {name}={value}; give at least 1")
        if not 0 <= self.beta < float("inf") or self.candidates < 2 or self.batch < 1:
            raise InputError(
                f"energy guidance got beta={self.beta}, candidates={self.candidates}, batch="
                f"{self.batch}; needed beta >= 0, candidates >= 2 to contrast, batch >= 1"
            )


class EnergyGuidedDenoiser(nn.Module):
    """x0 + scale noise_k^2 / signal_k grad f_k(x_k), x0 being the prediction of the prior.

    By Tweedie, x0 = (x + noise^2 score) / signal for x = signal x0 + noise eps, so that a score
    larger by scale grad f moves the prediction by that. At a level without signal f is constant
    and the formula 0 / 0. There the gradient is taken one level below, at the mean of the step,
    where the factor is finite: the shift of a prediction changes little over so much noise.

    `energy` (x [batch, size], level, condition) -> [batch]. At scale 0 it is the prior, to the bit.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, denoiser: Denoiser, energy: Denoiser, *, scale: float
    ):
        super().__init__()
        self.diffusion, self.denoiser, self.energy = diffusion, denoiser, energy
        self.scale = scale

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        x0 = self.denoiser(x, level, condition)
        if self.scale == 0:
            return x0
        blind = self.diffusion.signal[level] == 0
        level = level - blind.flatten().long()
        signal = self.diffusion.signal[level].to(x0.dtype)
        noise = self.diffusion.noise[level].to(x0.dtype)
        at = torch.where(blind, signal * x0, x)
        slope = energy_gradient(self.energy, at, level, condition)
        return torch.addcmul(x0, noise.square() / signal, slope, value=self.scale)


def energy_gradient(energy: Denoiser, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
    """d f / d x, shaped as x, without graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x, level, condition).sum(), x)
    return slope


def fit_energy_guidance(
    directory: str | Path,
    dataset: TransitionDataset,
    prior: ActionDiffusion,
    critic: Critic,
    settings: EnergyGuidanceSettings | None = None,
    *,
    scale: float = 1.0,
    seed: int = 0,
    actions: Path | None = None,
    watch: Watch = unwatched,
) -> DiffusionPolicy:
    """The prior guided towards prior exp(beta Q) / Z, with the gradient times `scale`.

    Scale 1 is what the energy is learnt for; the authors report the best of 0, 1, 2, 3, 5, 8 and 10
    for each task, found in the environment. The stage does not depend on it. `actions`: directory
    where the draws of the prior are kept, as in `fit_soft_critic`. Raises InputError for a critic
    whose `q` does not return one finite number a row.
    """
    settings, directory = settings or EnergyGuidanceSettings(), Path(directory)
    check_critic(critic, dataset.observation_size, dataset.action_size, device=prior.device)
    told = critic_fingerprint(critic, dataset, device=prior.device)
    made_of = {"prior": fingerprint(prior), "critic": told, "seed": seed}
    config = {**data_facts(dataset), "energy_guidance": asdict(settings), **made_of}
    run, energy = Run(directory, config), _new_energy(prior, dataset.observation_size, seed=seed)
    policy = _policy(prior, energy, scale, config)

    def fit() -> dict[str, Any]:
        begun = time.monotonic()
        draws = draw_prior_actions(
            actions or own_actions(directory),
            dataset,
            prior,
            candidates=settings.candidates,
            rows=settings.rows,
            seed=seed,
        )
        values = settings.beta * draws.values(critic)
        drawing = time.monotonic() - begun
        energy.standardise(draws.data.observations)
        trainer = EnergyTrainer(
            prior.diffusion,
            energy,
            draws,
            values,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            generator=generator_for(seed, "energy_guidance", device=prior.device),
        )
        seconds = _train(run, trainer, settings.steps, policy, watch)
        return {"seconds": seconds + drawing, "drawing_seconds": drawing}

    complete(run, energy, fit)
    forget_own_actions(directory)
    return policy


def _train(
    run: Run, trainer: EnergyTrainer, steps: int, policy: DiffusionPolicy, watch: Watch
) -> float:
    return train(
        run,
        trainer.update,
        trainer.parts,
        steps=steps,
        description="energy",
        after_step=lambda done: watch(done, steps, policy),
    )


def load_energy_guidance(
    directory: str | Path, prior: ActionDiffusion, *, scale: float = 1.0
) -> DiffusionPolicy:
    """The policy of the energy that `fit_energy_guidance` left in a directory, and its prior."""
    config = finished_config(Path(directory))
    if config["prior"] != fingerprint(prior):
        raise InputError(f"{directory} was fitted to another prior; give the one beside it")
    energy = _new_energy(prior, config["observation_size"], seed=0)
    load_weights(Path(directory), energy)
    return _policy(prior, energy.requires_grad_(False).eval(), scale, config)


def _new_energy(prior: ActionDiffusion, observation_size: int, *, seed: int) -> ResidualMLP:
    (size,) = prior.diffusion.event_shape
    return ResidualMLP(
        size,
        prior.diffusion.levels,
        condition_size=observation_size,
        width=256,
        blocks=3,
        output_size=1,
        generator=generator_for(seed, "energy_guidance", "initial"),
    ).to(prior.device)


def _policy(
    prior: ActionDiffusion, energy: nn.Module, scale: float, config: dict[str, Any]
) -> DiffusionPolicy:
    guided = EnergyGuidedDenoiser(prior.diffusion, prior.denoiser, energy, scale=scale)
    return DiffusionPolicy(
        Sampler(prior.diffusion, guided),
        action_low=torch.tensor(config["action_low"], device=prior.device),
        action_high=torch.tensor(config["action_high"], device=prior.device),
    )
