"""Language posteriors with relative trajectory balance: prior, reward, posterior, comparison.

    rtb-rl run rtb_language --data stories.jsonl --out runs/stories

A masked diffusion language model fills the gap in a story, and the posterior fills it so that what
follows is likely: p(gap | left) p(right | left, gap)^beta / Z. Stages, each in a directory of its
own under --out: prior/ (trained on the stories, or a model of yours with --prior), reward/ (a
language model of other stories), judge/ (a second one, never a reward), reference/ (prior draws
weighted by the reward: the truth to compare with), posterior/. Ends with a table and stories side
by side; `rtb-rl infill DIR` fills gaps of yours.
"""

from dataclasses import dataclass

import tyro

from rtb_rl.tasks.language import TextSettings, check_methods, compare, fit_rtb, open_text_job


@dataclass(frozen=True)
class Settings(TextSettings):
    """Language posteriors with relative trajectory balance."""


def main(settings: Settings) -> None:
    """Fit what is not complete and compare the posterior with other ways to fill a gap."""
    check_methods(settings)
    job = open_text_job(settings, program="rtb_language")
    compare(job, fit_rtb(job))


if __name__ == "__main__":
    main(tyro.cli(Settings))
