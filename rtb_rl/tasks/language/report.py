"""Side by side: a table of methods, and stories with what each method wrote in the gap."""

from collections.abc import Mapping, Sequence

from rtb_rl.tasks.language.prompts import Gap
from rtb_rl.training import table
from rtb_rl.training.table import Rows

COLUMNS = {
    "E[log r]": ("log_reward", "log_reward_error"),
    "above reference": ("log_reward_gap", "log_reward_gap_error"),
    "log Z": ("log_z", "log_z_error"),
    "abs. log Z gap": ("log_z_gap", "log_z_gap_error"),
    "ELBO": ("elbo", None),
    "ESS": ("ess", None),
    "BLEU-4": ("bleu", "bleu_error"),
    "GLEU-4": ("gleu", "gleu_error"),
    "BERTScore": ("bert_score", None),
    "distinct-2": ("distinct_2", None),
    "repetition": ("repetition", None),
    "perplexity": ("perplexity", None),
    "training calls": ("training_calls", None),
    "calls / text": ("calls", None),
}
"""Title -> (key of a row, key of its standard error)."""


def markdown(rows: Rows) -> str:
    """The table as Markdown."""
    return table.markdown(COLUMNS, rows)


def print_table(title: str, rows: Rows) -> None:
    """The same on the console."""
    table.print_table(title, COLUMNS, rows, width=190)


def stories(human: Sequence[Gap], written: Mapping[str, Sequence[Gap]], *, count: int = 12) -> str:
    """Markdown: each context with the gap, and below it what people and every method wrote."""
    parts = ["# Stories with a gap\n"]
    for i, gap in enumerate(human[:count]):
        parts.append(f"{gap.left} **[...]** {gap.right}\n")
        parts.append(f"- *human*: {gap.middle}")
        parts += [f"- *{name}*: {gaps[i].middle}" for name, gaps in written.items()]
        parts.append("")
    return "\n".join(parts)
