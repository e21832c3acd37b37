"""Text-to-image posteriors on Stable Diffusion pipelines."""

from rtb_rl.tasks.image.methods import Budget as CallBudget
from rtb_rl.tasks.image.methods import best, importance, swarm
from rtb_rl.tasks.text_to_image.comparison import PRIOR, TextToImageJob
from rtb_rl.tasks.text_to_image.job import open_text_to_image_job
from rtb_rl.tasks.text_to_image.posterior import (
    TextToImagePosterior,
    fit_text_to_image,
    text_to_image_task,
)
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList, prompt_list, read_prompts
from rtb_rl.tasks.text_to_image.settings import TextToImageSettings
from rtb_rl.tasks.text_to_image.shapes_prior import (
    ShapesPriorSettings,
    fit_shapes_prior,
    new_shapes_pipeline,
)
from rtb_rl.tasks.text_to_image.target import PromptTarget, group_log_z, learned_log_z
from rtb_rl.tasks.text_to_image.trainers import (
    Baseline,
    TextToImagePosteriorSettings,
    trained_baselines,
)

__all__ = [
    "PRIOR",
    "Baseline",
    "CallBudget",
    "PromptList",
    "PromptTarget",
    "ShapesPriorSettings",
    "TextToImageJob",
    "TextToImagePosterior",
    "TextToImagePosteriorSettings",
    "TextToImageSettings",
    "best",
    "fit_shapes_prior",
    "fit_text_to_image",
    "group_log_z",
    "importance",
    "learned_log_z",
    "new_shapes_pipeline",
    "open_text_to_image_job",
    "prompt_list",
    "read_prompts",
    "swarm",
    "text_to_image_task",
    "trained_baselines",
]
