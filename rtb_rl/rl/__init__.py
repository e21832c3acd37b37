"""Offline reinforcement learning: data, prior, critic, posterior, policies, episodes."""

from rtb_rl.rl.critics.critic import Critic, IQLCritic, check_critic, load_critic
from rtb_rl.rl.critics.gaussian_policy import (
    AdvantageWeightedRegression,
    GaussianPolicy,
    MeanActionPolicy,
)
from rtb_rl.rl.critics.iql import IQL
from rtb_rl.rl.critics.training import (
    CriticSettings,
    GaussianSettings,
    fit_critic,
    fit_gaussian_policy,
)
from rtb_rl.rl.data.collect import collect
from rtb_rl.rl.data.dataset import TransitionDataset, Transitions
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.data.summary import DatasetSummary, summarise
from rtb_rl.rl.episodes.curve import Curve, Watch
from rtb_rl.rl.episodes.environments import make_environment
from rtb_rl.rl.episodes.evaluation import EpisodeRecords, Policy, evaluate
from rtb_rl.rl.episodes.scores import normalised_score, reference_returns
from rtb_rl.rl.episodes.video import record_episode
from rtb_rl.rl.jobs.budget import Budget, Tuning, budget_for, read_tuning
from rtb_rl.rl.jobs.job import Job
from rtb_rl.rl.jobs.opening import open_job
from rtb_rl.rl.jobs.report import StatePanel, state_panels
from rtb_rl.rl.jobs.saved import SavedPolicy, load_policy
from rtb_rl.rl.jobs.settings import (
    Candidates,
    JobSettings,
    OwnCritic,
    Strength,
    StrengthByRule,
)
from rtb_rl.rl.peers.diffusion_q import DiffusionQSettings, fit_diffusion_q, load_diffusion_q
from rtb_rl.rl.peers.diffusion_q_policy import DiffusionQPolicy
from rtb_rl.rl.peers.energy_guidance import (
    EnergyGuidanceSettings,
    fit_energy_guidance,
    load_energy_guidance,
)
from rtb_rl.rl.peers.td3_bc import TD3BCSettings, fit_td3_bc, load_td3_bc
from rtb_rl.rl.posteriors.amortised import AmortisedPolicy, AmortisedSettings, fit_amortised
from rtb_rl.rl.posteriors.extraction import Extraction, draws_of, measure_extraction
from rtb_rl.rl.posteriors.policy import DiffusionPolicy
from rtb_rl.rl.posteriors.posterior import PosteriorSettings, fit_posterior, posterior_model
from rtb_rl.rl.posteriors.prior import ActionDiffusion, ActionNetwork, fit_prior
from rtb_rl.rl.posteriors.soft_critic import (
    SoftCritic,
    SoftCriticSettings,
    fit_soft_critic,
    load_soft_critic,
)
from rtb_rl.rl.posteriors.task import critic_log_reward, offline_rl_task

__all__ = [
    "IQL",
    "ActionDiffusion",
    "ActionNetwork",
    "AdvantageWeightedRegression",
    "AmortisedPolicy",
    "AmortisedSettings",
    "Budget",
    "Candidates",
    "Critic",
    "CriticSettings",
    "Curve",
    "DatasetSummary",
    "DiffusionPolicy",
    "DiffusionQPolicy",
    "DiffusionQSettings",
    "EnergyGuidanceSettings",
    "EpisodeRecords",
    "Extraction",
    "GaussianPolicy",
    "GaussianSettings",
    "IQLCritic",
    "Job",
    "JobSettings",
    "MeanActionPolicy",
    "OwnCritic",
    "Policy",
    "PosteriorSettings",
    "SavedPolicy",
    "SoftCritic",
    "SoftCriticSettings",
    "StatePanel",
    "Strength",
    "StrengthByRule",
    "TD3BCSettings",
    "TransitionDataset",
    "Transitions",
    "Tuning",
    "Watch",
    "budget_for",
    "check_critic",
    "collect",
    "critic_log_reward",
    "draws_of",
    "evaluate",
    "fit_amortised",
    "fit_critic",
    "fit_diffusion_q",
    "fit_energy_guidance",
    "fit_gaussian_policy",
    "fit_posterior",
    "fit_prior",
    "fit_soft_critic",
    "fit_td3_bc",
    "load_critic",
    "load_dataset",
    "load_diffusion_q",
    "load_energy_guidance",
    "load_policy",
    "load_soft_critic",
    "load_td3_bc",
    "make_environment",
    "measure_extraction",
    "normalised_score",
    "offline_rl_task",
    "open_job",
    "posterior_model",
    "read_tuning",
    "record_episode",
    "reference_returns",
    "state_panels",
    "summarise",
]
