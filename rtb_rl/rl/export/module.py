"""A whole policy as one torch module without randomness of its own, which can be traced."""

import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import GaussianDiffusion, Sampler
from rtb_rl.errors import InputError
from rtb_rl.nn import LangevinDenoiser
from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.critics.gaussian_policy import GaussianPolicy, MeanActionPolicy
from rtb_rl.rl.episodes.evaluation import Policy
from rtb_rl.rl.peers.energy_guidance import EnergyGuidedDenoiser
from rtb_rl.rl.peers.td3_bc import DeterministicPolicy
from rtb_rl.rl.posteriors.policy import DiffusionPolicy


class DenoisingProposal(nn.Module):
    """`rtb_rl.core.Sampler` with its draws as an argument.

    observations [rows, d_o], noise [K + 1, rows, d_a] -> actions [rows, d_a] near [-1, 1]; noise[0]
    is x[K], noise[i] the noise of the step from level K + 1 - i.
    """

    def __init__(self, diffusion: GaussianDiffusion, denoiser: nn.Module):
        super().__init__()
        self.diffusion, self.denoiser = diffusion, denoiser
        self.draws = diffusion.levels + 1

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        levels, x = self.diffusion.levels, noise[0]
        for k in range(levels, 0, -1):
            level = torch.full((x.shape[0],), k, dtype=torch.int64, device=x.device)
            kernel = self.diffusion.kernel(self.denoiser(x, level, observations), x, level)
            x = torch.addcmul(kernel.mean, kernel.std, noise[levels + 1 - k])
        return x


class MeanProposal(nn.Module):
    """The one action of a policy that draws nothing; the noise is empty."""

    draws = 0

    def __init__(self, policy: GaussianPolicy | DeterministicPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        if isinstance(self.policy, GaussianPolicy):
            return self.policy.mean(observations)
        return self.policy(observations)


class ExportedPolicy(nn.Module):
    """(observations [batch, d_o], noise [draws, batch * candidates, d_a]) -> actions [batch, d_a].

    Standard normal noise gives the actions of the policy, in the environment's units. The rows of
    the candidates of one observation are neighbours; the critic takes the best of them, clipped
    to [-1, 1].
    """

    low: Tensor
    half_width: Tensor

    def __init__(
        self,
        proposal: DenoisingProposal | MeanProposal,
        *,
        observation_size: int,
        low: Tensor,
        half_width: Tensor,
        candidates: int = 1,
        critic: Critic | None = None,
        traced_with: Critic | None = None,
    ):
        super().__init__()
        self.proposal, self.draws, self.candidates = proposal, proposal.draws, candidates
        self.critic, self.observation_size = critic, observation_size
        self.parts = nn.ModuleList([*_modules(critic), *_modules(traced_with)])
        self.register_buffer("low", low.clone())
        self.register_buffer("half_width", half_width.clone())

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        actions = self.proposals(observations, noise)
        if self.candidates == 1:
            return self.low + (actions + 1) * self.half_width
        best = self.values(observations, actions).argmax(1)
        grouped = actions.reshape(-1, self.candidates, actions.shape[1])
        index = best.reshape(-1, 1, 1).expand(-1, 1, actions.shape[1])
        return self.low + (grouped.gather(1, index).squeeze(1) + 1) * self.half_width

    def proposals(self, observations: Tensor, noise: Tensor) -> Tensor:
        """All candidates, in [-1, 1]: [batch * candidates, d_a]."""
        return self.proposal(self._repeated(observations), noise).clamp(-1, 1)

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """What the critic says of the candidates: [batch, candidates]."""
        assert self.critic is not None
        q = self.critic.q(self._repeated(observations), actions)
        return q.reshape(-1, self.candidates)

    def _repeated(self, observations: Tensor) -> Tensor:
        if self.candidates == 1:
            return observations
        return observations.repeat_interleave(self.candidates, dim=0)


def draw_noise(draws: int, rows: int, action_size: int, *, generator: Generator) -> Tensor:
    """[draws, rows, action size], in the order in which `DiffusionPolicy.act` draws.

    One call for each draw: the numbers of one call for all of them would be others.
    """
    noise = torch.empty(draws, rows, action_size, device=generator.device)
    for row in noise:
        row.copy_(torch.randn(rows, action_size, generator=generator, device=generator.device))
    return noise


def exported_policy(
    policy: Policy, method: str, critic: Critic | None, observation_size: int
) -> ExportedPolicy:
    """The module of a policy. `critic` is the one whose gradient a Langevin posterior takes.

    InputError for a policy that is neither a diffusion nor a single action, for one that a learned
    energy guides, and for a Langevin posterior whose critic has no gradient in closed form.
    """
    if isinstance(policy, MeanActionPolicy):
        policy = policy.policy
    if isinstance(policy, GaussianPolicy | DeterministicPolicy):
        half_width = (policy.action_high - policy.action_low) / 2
        proposal = MeanProposal(policy)
        return ExportedPolicy(
            proposal,
            observation_size=observation_size,
            low=policy.action_low,
            half_width=half_width,
        ).eval()
    sampler = getattr(policy, "sampler", None)
    if not isinstance(policy, DiffusionPolicy) or not isinstance(sampler, Sampler):
        raise InputError(
            f"method {method!r} acts by {type(policy).__name__}, export writes policies that draw"
            " from one diffusion or take a mean action; name another --method"
        )
    diffusion, denoiser = sampler.diffusion, sampler.denoiser
    if not isinstance(diffusion, GaussianDiffusion) or not isinstance(denoiser, nn.Module):
        raise InputError(
            f"method {method!r} draws from {type(diffusion).__name__} with"
            f" {type(denoiser).__name__}, export knows GaussianDiffusion with a torch module; name"
            " another --method"
        )
    langevin = takes_a_gradient(policy)
    _check_gradients(method, denoiser, critic, langevin=langevin)
    return ExportedPolicy(
        DenoisingProposal(diffusion, denoiser),
        observation_size=observation_size,
        low=policy.low,
        half_width=policy.half_width,
        candidates=policy.candidates,
        critic=policy.critic if policy.candidates > 1 else None,
        traced_with=critic if langevin else None,
    ).eval()


def _check_gradients(
    method: str, denoiser: nn.Module, critic: Critic | None, *, langevin: bool
) -> None:
    """InputError for a gradient that is taken by autograd, which no file can hold."""
    if any(isinstance(part, EnergyGuidedDenoiser) and part.scale for part in denoiser.modules()):
        raise InputError(
            f"method {method!r} is guided by the gradient of a learned energy, by autograd, which"
            " can't be exported; name another --method of the run, such as prior"
        )
    if langevin and not callable(getattr(critic, "action_gradient", None)):
        raise InputError(
            f"method {method!r} takes the gradient of {type(critic).__name__} by autograd, which"
            " can't be exported; give the critic a method action_gradient(observation, action), or"
            " train without the Langevin term"
        )


def takes_a_gradient(policy: Policy) -> bool:
    """Whether the policy has a Langevin term, which needs the critic when it acts."""
    denoiser = getattr(getattr(policy, "sampler", None), "denoiser", None)
    parts = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    return any(isinstance(part, LangevinDenoiser) for part in parts)


def _modules(critic: Critic | None) -> list[nn.Module]:
    """The torch modules of a critic: tracing finds the weights of registered modules only."""
    if isinstance(critic, nn.Module):
        return [critic]
    parts = getattr(critic, "__dict__", {}).values()
    return [part for part in parts if isinstance(part, nn.Module)]
