"""Stages of a few steps, for whole programs in seconds."""

from rtb_rl.rl import Budget, CriticSettings, GaussianSettings, PosteriorSettings
from rtb_rl.training import FinetuneSettings, PretrainSettings

TINY = Budget(
    prior=PretrainSettings(steps=24, batch=32),
    critic=CriticSettings(steps=24, batch=32),
    gaussian=GaussianSettings(steps=24, batch=32),
    posterior=PosteriorSettings(
        FinetuneSettings(updates=12, beta_warmup=3, conditions=8), diagnostic_rows=2
    ),
    episodes=2,
)
