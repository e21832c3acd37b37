"""Language posteriors: gaps in texts, filled by a masked diffusion language model."""

from rtb_rl.tasks.language.codec import HubCodec, TextCodec, train_byte_codec, train_word_codec
from rtb_rl.tasks.language.comparison import check_methods, compare, fit_rtb
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.job import TextJob, open_text_job
from rtb_rl.tasks.language.language_model import LanguageModel
from rtb_rl.tasks.language.language_model_training import (
    LanguageModelSettings,
    fit_language_model,
)
from rtb_rl.tasks.language.posterior import TextPosterior, fit_text_posterior, text_task
from rtb_rl.tasks.language.prior import TextPriorSettings, fit_text_prior, frame_for
from rtb_rl.tasks.language.prompts import Frame, Gap, Prompts, story_gaps
from rtb_rl.tasks.language.rewards import (
    ClassLikelihood,
    Contains,
    ContinuationLikelihood,
    TextReward,
    WordCount,
)
from rtb_rl.tasks.language.saved import Infiller, export_infiller, load_infiller
from rtb_rl.tasks.language.settings import TextBudget, TextSettings, text_budget
from rtb_rl.tasks.language.texts import Story, Texts, load_texts, split
from rtb_rl.tasks.language.trainers import TextPosteriorSettings

__all__ = [
    "ClassLikelihood",
    "Contains",
    "ContinuationLikelihood",
    "Frame",
    "Gap",
    "HubCodec",
    "Infiller",
    "LanguageModel",
    "LanguageModelSettings",
    "Prompts",
    "Story",
    "TextBudget",
    "TextCodec",
    "TextJob",
    "TextPosterior",
    "TextPosteriorSettings",
    "TextPrior",
    "TextPriorSettings",
    "TextReward",
    "TextSettings",
    "Texts",
    "WordCount",
    "check_methods",
    "compare",
    "export_infiller",
    "fit_language_model",
    "fit_rtb",
    "fit_text_posterior",
    "fit_text_prior",
    "frame_for",
    "load_infiller",
    "load_texts",
    "open_text_job",
    "split",
    "story_gaps",
    "text_budget",
    "text_task",
    "train_byte_codec",
    "train_word_codec",
]
