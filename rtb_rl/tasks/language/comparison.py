"""Methods measured one by one on the same prompts, then a table and stories side by side."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from torch import Generator

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.evaluation import Examiner, Infills
from rtb_rl.tasks.language.job import TextJob
from rtb_rl.tasks.language.log_z import group_log_z, network_log_z
from rtb_rl.tasks.language.methods import (
    AUTOREGRESSIVE,
    TRAINING_FREE,
    trained,
    training_free,
    weighted_reference,
)
from rtb_rl.tasks.language.posterior import (
    TextPosterior,
    fit_text_posterior,
)
from rtb_rl.tasks.language.prompts import Gap
from rtb_rl.tasks.language.report import markdown, print_table, stories
from rtb_rl.tasks.language.saved import export_infiller
from rtb_rl.tasks.language.settings import TextSettings
from rtb_rl.tasks.language.trainers import (
    MakeTrainer,
    denoising_posterior,
    relative_trajectory_balance,
    supervised,
)
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.seeding import generator_for

REFERENCE, RTB = "importance resampling", "RTB"
TRAINED = ("DDPP-LB", "supervised")


def check_methods(settings: TextSettings) -> None:
    """InputError for a method that there is not."""
    of_story = (AUTOREGRESSIVE,) if settings.reward == "story" else ()
    names = (REFERENCE, *TRAINING_FREE, *of_story, *TRAINED, RTB)
    if unknown := [name for name in settings.methods if name not in names]:
        raise InputError(f"there is no method {unknown[0]!r}; there are {', '.join(names)}")


def fit_rtb(job: TextJob) -> TextPosterior:
    """The posterior of the job in posterior/, with what `rtb-rl infill` needs."""
    make_log_z = network_log_z if job.settings.learned_log_z else group_log_z
    chosen = job.budget.posterior.start
    start = chosen and denoising_posterior(chosen, job.pool)
    posterior = _fit(job, "posterior", relative_trajectory_balance(make_log_z), start)
    lengths = (job.prompts.condition["free"] >= 0).sum(1).tolist()
    export_infiller(job.run.directory / "posterior", job.prior, posterior.network, lengths)
    return posterior


def compare(job: TextJob, posterior: TextPosterior) -> dict[str, dict[str, Any]]:
    """Measure every method that is not measured yet; print the table, write it and the stories.

    InputError for a method that there is not.
    """
    check_methods(job.settings)
    methods = _methods(job, posterior)
    wanted = job.settings.methods or tuple(methods)
    human = job.problem.prompts.gaps
    settings = job.settings
    examiner = Examiner(
        job.reward, job.judge, human, job.reference, settings.bert_model, settings.beta
    )
    names = list(dict.fromkeys((REFERENCE, *wanted, RTB)))
    found = {name: _measured(job, examiner, name, methods[name]) for name in names}
    rows = {name: row for name, (row, _) in found.items()}
    written = {name: texts for name, (_, texts) in found.items()}
    title = (
        f"{settings.data}: sentence {settings.hidden} of {settings.sentences}, {settings.reward}"
    )
    print_table(f"{title}, beta {settings.beta}", rows)
    directory = job.run.directory
    replace_file(directory / "table.md", markdown(rows).encode())
    replace_file(directory / "stories.md", stories(human, written).encode())
    job.run.log_text(0, "stories", stories(human, written))
    job.run.finish({"methods": rows})
    Console().print(
        f"results: {directory / 'results.json'}, stories: {directory / 'stories.md'}\ninfill:"
        f" rtb-rl infill {directory} --left '...' --right '...'",
        highlight=False,
        soft_wrap=True,
    )
    return rows


def _methods(job: TextJob, posterior: TextPosterior) -> dict[str, Callable[[Generator], Infills]]:
    free = training_free(job.problem, job.model)

    ddpp = denoising_posterior(job.budget.posterior.denoising, job.pool)
    measured = partial(trained, job.problem, paths=job.budget.paths)

    def fitted(directory: str, maker: MakeTrainer, before: int, generator: Generator) -> Infills:
        return measured(_fit(job, directory, maker), generator, calls_before=before)

    given = (job.problem, job.reference, job.reference_calls)
    pooled = 0 if job.budget.posterior.start is None else job.pool_calls
    return {
        REFERENCE: partial(weighted_reference, *given),
        **free,
        "DDPP-LB": partial(fitted, "ddpp", ddpp, job.pool_calls),
        "supervised": partial(fitted, "supervised", supervised, 0),
        RTB: partial(measured, posterior, calls_before=pooled),
    }


def _fit(
    job: TextJob, directory: str, make_trainer: MakeTrainer, start: MakeTrainer | None = None
) -> TextPosterior:
    return fit_text_posterior(
        job.run.directory / directory,
        job.prior,
        job.prompts,
        job.reward,
        job.budget.posterior,
        make_trainer=make_trainer,
        start=start,
        told={"reward": job.settings.reward, "learned_log_z": job.settings.learned_log_z},
        seed=job.settings.seed,
    )


def _measured(
    job: TextJob, examiner: Examiner, name: str, method: Callable[[Generator], Infills]
) -> tuple[dict[str, Any], Sequence[Gap]]:
    """The row of a method and its first text of every prompt; measured once."""
    folder = job.run.directory / "methods"
    path = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"
    if not path.exists():
        device = job.problem.prompts.condition["tokens"].device
        infills = method(generator_for(job.settings.seed, name, device=device))
        row = {"method": name, **examiner.examine(infills)}
        texts = [[gap.middle for gap in gaps] for gaps in infills.gaps]
        folder.mkdir(exist_ok=True)
        replace_file(path, json.dumps({"row": row, "texts": texts}, indent=1).encode())
    kept = json.loads(path.read_text())
    human = job.problem.prompts.gaps
    first = [gap._replace(middle=texts[0]) for gap, texts in zip(human, kept["texts"], strict=True)]
    return kept["row"], first
