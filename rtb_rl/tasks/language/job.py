"""What the language program begins with: stories, prior, language models, prompts, reference."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rtb_rl.baselines import ImportanceReference
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.language.codec import TextCodec, train_byte_codec, train_word_codec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.language_model import LanguageModel
from rtb_rl.tasks.language.language_model_training import fit_language_model
from rtb_rl.tasks.language.methods import GapProblem
from rtb_rl.tasks.language.named_rewards import named_reward
from rtb_rl.tasks.language.posterior import text_task
from rtb_rl.tasks.language.prior import fit_text_prior, frame_for
from rtb_rl.tasks.language.prompts import Gap, Prompts, story_gaps
from rtb_rl.tasks.language.reference import fit_reference
from rtb_rl.tasks.language.rewards import (
    ContinuationLikelihood,
    TextReward,
    WordCount,
)
from rtb_rl.tasks.language.settings import TextBudget, TextSettings, check_used, text_budget
from rtb_rl.tasks.language.texts import Story, load_texts, split
from rtb_rl.training.run import Run
from rtb_rl.training.settings import check_beta
from rtb_rl.training.stage import device_for_training

OWN_SHARES = {"test": 0.06, "prior": 0.47, "reward": 0.47}
FREE = ("out", "methods")  # what a run may be continued with
GIVEN_SHARES = {"test": 0.06, "prior": 0.94}
SHARED = (
    *("data_sha256", "sentences", "hidden", "window", "ends", "byte_pairs", "budget", "levels"),
    *("prior", "mask", "tokenizer", "prior_seed", "reward", "reward_model", "judge_model"),
)
"""What prior, language models and reference depend on."""


@dataclass(frozen=True)
class TextJob:
    """An open run with all that is fitted before the posterior."""

    settings: TextSettings
    budget: TextBudget
    run: Run
    prior: TextPrior
    reward: TextReward
    model: LanguageModel | None
    """The language model of the reward, where it is one."""
    judge: LanguageModel
    prompts: Prompts
    """What the posterior is trained on."""
    problem: GapProblem
    """What every method is compared on."""
    reference: ImportanceReference
    """Prior draws of what every method is compared on."""
    reference_calls: int
    pool: ImportanceReference
    """Prior draws of what the posterior is trained on."""
    pool_calls: int


def open_text_job(settings: TextSettings, *, program: str) -> TextJob:
    """Load and check all that is given, fit what is not.

    Raises InputError for data, a prior, a reward or a shared run that don't fit, before anything is
    trained or written.
    """
    budget = _budget(settings)
    parts, digest = _stories(settings)
    reward, hidden = named_reward(settings), settings.hidden - 1
    config = {name: value for name, value in asdict(settings).items() if name not in FREE}
    config |= {"data_sha256": digest, "settings": asdict(budget), "program": program}
    root = settings.out if settings.share is None else shared(settings.share, config)
    device, seed = device_for_training(), settings.prior_seed
    foreign = None if settings.prior is None else _foreign(settings, budget)
    codec = foreign.frame.codec if foreign else _codec(settings, budget, parts["prior"])
    kept = _short(codec, parts, settings)
    frame = frame_for(codec, kept["prior"] + kept["test"], ends=settings.ends)
    prompts = Prompts.of(frame, story_gaps(kept["prior"], hidden)).to(device)
    test = Prompts.of(frame, story_gaps(kept["test"][: budget.prompts], hidden)).to(device)
    model, judge = (
        None if source is None else _from_elsewhere(source, settings)
        for source in (settings.reward_model if reward is None else None, settings.judge_model)
    )
    if reward is not None:
        _check_reward(reward, test.gaps[:2])
    if foreign is not None:
        foreign = replace(foreign, frame=frame)
        if settings.lora_rank is not None:  # the names of its layers, which may be wrong
            text_task(foreign, prompts, WordCount(0), budget.posterior)
    run = Run(settings.out, config)

    prior = foreign or fit_text_prior(root / "prior", frame, kept["prior"], budget.prior, seed=seed)
    prior.network.to(device).requires_grad_(False).eval()
    if reward is None:
        chosen = budget.reward
        model = model or fit_language_model(
            root / "reward", codec, kept["reward"], chosen, seed=seed
        )
        reward = ContinuationLikelihood(model)
    judge = judge or fit_language_model(
        root / "judge", codec, kept["prior"], budget.judge, seed=seed + 1
    )
    problem = GapProblem(prior, test, reward, budget.draws, settings.beta)
    reference = fit_reference(root / "reference", problem, budget.reference_draws, seed=seed)
    seen = replace(problem, prompts=prompts)
    pool, calls = fit_reference(root / "pool", seen, budget.pool_draws, seed=seed)
    prompts = prompts.with_baseline(pool.log_weight.mean(1))
    found = (run, prior, reward, model, judge, prompts, problem, *reference, pool, calls)
    return TextJob(settings, budget, *found)


def _budget(settings: TextSettings) -> TextBudget:
    """The budget of that name with what was asked for otherwise."""
    for name, least in (("levels", 1), ("lora_rank", 1), ("window", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; give {least} or more")
    check_beta(settings.beta)
    check_used(settings)
    budget = text_budget(settings.budget)
    prior = replace(budget.prior, ends=settings.ends)
    if settings.levels is not None:
        prior = replace(prior, levels=settings.levels)
    posterior = replace(
        budget.posterior,
        finetune=replace(budget.posterior.finetune, beta=settings.beta),
        start=budget.posterior.start and replace(budget.posterior.start, beta=settings.beta),
        denoising=replace(budget.posterior.denoising, beta=settings.beta),
        lora_rank=settings.lora_rank,
    )
    if settings.lora_targets is not None:
        posterior = replace(posterior, lora_targets=settings.lora_targets)
    return replace(budget, prior=prior, posterior=posterior)


def _stories(settings: TextSettings) -> tuple[dict[str, list[Story]], str]:
    """Stories by what they are for, and a digest of all files."""
    if not 2 <= settings.hidden <= settings.sentences:
        raise InputError(
            f"sentence {settings.hidden} of {settings.sentences} can't be hidden; give 2 to"
            f" {settings.sentences}, so that there is a left context"
        )
    texts = load_texts(settings.data, sentences=settings.sentences)
    own = not settings.reward_data
    parts = split(texts, OWN_SHARES if own else GIVEN_SHARES, seed=settings.prior_seed)
    digests = [texts.sha256]
    if not own:
        more = [load_texts(one, sentences=settings.sentences) for one in settings.reward_data]
        parts["reward"] = [story for one in more for story in one.stories]
        digests += [one.sha256 for one in more]
    return parts, " ".join(digests)


def _codec(settings: TextSettings, budget: TextBudget, stories: Sequence[Story]) -> TextCodec:
    train = train_byte_codec if settings.byte_pairs else train_word_codec
    return train([" ".join(story) for story in stories], vocabulary=budget.vocabulary)


def _short(
    codec: TextCodec, parts: Mapping[str, Sequence[Story]], settings: TextSettings
) -> dict[str, list[Story]]:
    """Those that fit into the window; InputError where too few do.

    A model from elsewhere must read the slots of a gap that ends itself within its window as well.
    """
    spare = 0
    if settings.prior is not None and settings.ends:
        spare = frame_for(codec, [*parts["prior"], *parts["test"]], ends=True).slots
    kept = {}
    for name, stories in parts.items():
        ids = codec.encode([" ".join(story) for story in stories])
        room = settings.window - spare
        kept[name] = [one for one, row in zip(stories, ids, strict=True) if len(row) <= room]
    _check_kept(kept, settings)
    return kept


def _check_kept(kept: Mapping[str, Sequence[Story]], settings: TextSettings) -> None:
    least = {"test": 2, "prior": 20, "reward": 20}
    for name, stories in kept.items():
        if len(stories) < least[name]:
            raise InputError(
                f"{len(stories)} stories of at most {settings.window} tokens are left for the"
                f" {name} part of {settings.data}, fewer than {least[name]}; give more stories or a"
                " larger window"
            )


def _check_reward(reward: TextReward, gaps: Sequence[Gap]) -> None:
    """InputError or NonFiniteError for what is no log-reward of texts that people wrote."""
    found = reward(gaps)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (len(gaps),):
        raise InputError(
            f"the reward returned {shape} for {len(gaps)} texts; return one number a text, shape"
            f" ({len(gaps)},)"
        )
    if bool((found.isnan() | (found == math.inf)).any()):
        raise NonFiniteError(
            f"the reward is {found.tolist()} for two texts; return finite log r in nats, or -inf"
        )


def _foreign(settings: TextSettings, budget: TextBudget) -> TextPrior:
    from rtb_rl.tasks.language.foreign import foreign_prior  # transformers takes long to import

    assert settings.prior is not None
    return foreign_prior(
        settings.prior,
        levels=budget.prior.levels,
        slots=settings.window,
        window=settings.window,
        ends=settings.ends,
        tokenizer=settings.tokenizer,
        mask=settings.mask,
        trust_remote_code=settings.trust_remote_code,
    )


def shared(directory: Path, config: Mapping[str, Any]) -> Path:
    """The directory of another run, if what it fitted is what this configuration would fit.

    InputError where it is not finished, shares itself, or was told something else.
    """
    if not (directory / "results.json").exists():
        raise InputError(f"{directory} holds no finished run of rtb_language; finish it first")
    told = json.loads((directory / "config.json").read_text())
    if told.get("share"):
        raise InputError(f"{directory} shares what {told['share']} fitted; share that one")
    wanted = json.loads(json.dumps(config, default=str))
    for name in SHARED:
        if told.get(name) != wanted[name]:
            raise InputError(
                f"{directory} was run with {name} {told.get(name)!r}, and {wanted[name]!r} is asked"
                " for; what it fitted is for that: give the same, or leave share out"
            )
    return directory


def _from_elsewhere(source: str, settings: TextSettings) -> LanguageModel:
    """A language model of a folder or of the hub."""
    from rtb_rl.tasks.language.foreign import foreign_language_model

    model = foreign_language_model(source, trust_remote_code=settings.trust_remote_code)
    model.network.to(device_for_training())
    return model
