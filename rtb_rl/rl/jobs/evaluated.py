"""The methods of a run, evaluated: again where what acts is no longer what was evaluated."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from rtb_rl.rl.critics.critic import Critic
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.data.summary import summarise
from rtb_rl.rl.jobs.report import evaluate_methods
from rtb_rl.rl.jobs.saved import METHODS, acting_beta, load_policy, posterior_settings
from rtb_rl.training.run import Run


def evaluate_run(
    run: Run,
    methods: Sequence[str],
    dataset: TransitionDataset,
    critic: Critic | None,
    *,
    episodes: int,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The episodes of every method of a run whose stages are complete, on the CPU; and the digest
    of the critic there.

    Those of a method whose weights, or the critic by which it acts, have changed are run anew.
    """
    assert dataset.env_id is not None
    stage = run.stage("evaluation", {**run.config, "methods": list(methods)})
    critic = copy.deepcopy(critic).to("cpu") if isinstance(critic, nn.Module) else critic
    told = None if critic is None else critic_fingerprint(critic, dataset)
    policies = {name: load_policy(run.directory, name, critic=critic) for name in methods}
    acting = {name: acting_digest(run.directory, name, told) for name in methods}
    given = stage, policies, acting, dataset.env_id, dataset.reference_returns
    return evaluate_methods(*given, episodes=episodes, seed=seed), told


def facts_of(run: Run, dataset: TransitionDataset) -> dict[str, Any]:
    """What results say of data and machine beside the episodes."""
    manifest = json.loads((run.directory / "manifest.json").read_text())
    return {
        "dataset": {**data_facts(dataset), "summary": asdict(summarise(dataset))},
        "versions": manifest["versions"],
        "manifest": manifest,
    }


def acting_digest(root: Path, method: str, critic: str | None) -> str:
    """sha256 of what acts: the weights of the method's stages in a run, and its critic, known by
    this digest, where that chooses among draws or gives its gradient.
    """
    of = METHODS[method]
    acts: dict[str, Any] = {name: _weights(root / name) for name in of.stages}
    langevin = "posterior" in of.stages and posterior_settings(root)["langevin"]
    if of.chooses or langevin:
        acts["critic"] = critic
    if method == "rtb_amortised":
        acts["beta"] = acting_beta(root)
    return hashlib.sha256(json.dumps(acts, sort_keys=True).encode()).hexdigest()


def _weights(stage: Path) -> str | None:
    """The digest that a complete stage keeps of its weights."""
    return json.loads((stage / "results.json").read_text()).get("sha256")
