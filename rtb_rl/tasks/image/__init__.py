"""Image posteriors: classifier guidance and inverse problems."""

from rtb_rl.tasks.image.classifier import ClassifierSettings, fit_classifier, load_classifier
from rtb_rl.tasks.image.comparison import ImageJob
from rtb_rl.tasks.image.images import ImageDataset, load_images, to_images, to_model_space
from rtb_rl.tasks.image.job import open_image_job
from rtb_rl.tasks.image.methods import FREE, WEAK, training_free
from rtb_rl.tasks.image.methods import Budget as CallBudget
from rtb_rl.tasks.image.posterior import (
    ImagePosterior,
    fit_posterior,
    posterior_task,
)
from rtb_rl.tasks.image.prior import PriorSettings, fit_prior, foreign_prior, prior_draws
from rtb_rl.tasks.image.settings import ImageSettings
from rtb_rl.tasks.image.target import (
    ImageTarget,
    class_target,
    every_class_target,
    measurement_target,
    reward_target,
)
from rtb_rl.tasks.image.trainers import Baseline, PosteriorSettings, trained_baselines

__all__ = [
    "FREE",
    "WEAK",
    "Baseline",
    "CallBudget",
    "ClassifierSettings",
    "ImageDataset",
    "ImageJob",
    "ImagePosterior",
    "ImageSettings",
    "ImageTarget",
    "PosteriorSettings",
    "PriorSettings",
    "class_target",
    "every_class_target",
    "fit_classifier",
    "fit_posterior",
    "fit_prior",
    "foreign_prior",
    "load_classifier",
    "load_images",
    "measurement_target",
    "open_image_job",
    "posterior_task",
    "prior_draws",
    "reward_target",
    "to_images",
    "to_model_space",
    "trained_baselines",
    "training_free",
]
