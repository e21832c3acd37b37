"""The critic and the data of a run, from its directory: those that it was made with."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.critic import Critic, IQLCritic, load_critic
from rtb_rl.rl.critics.identity import critic_fingerprint
from rtb_rl.rl.critics.training import CriticSettings, new_critic
from rtb_rl.rl.data.dataset import TransitionDataset
from rtb_rl.rl.data.readers import load_dataset
from rtb_rl.rl.fitted import finished_config, fitted_config
from rtb_rl.rl.posteriors.soft_critic import load_soft_critic
from rtb_rl.training.stage import load_weights


def own_critic(spec: str, dataset: TransitionDataset, *, device: torch.device) -> Critic:
    """The user's critic, by its name; on this device where it is a module."""
    critic = load_critic(spec, dataset)
    return critic.to(device) if isinstance(critic, nn.Module) else critic


def load_run_critic(root: Path) -> Critic:
    """The critic of a run: the user's, by its name, or the one that the run fitted.

    Raises InputError for a user's that is another one now than when the run was finished.
    """
    config = fitted_config(root)
    if config.get("critic"):
        dataset = load_run_dataset(config)
        critic = load_critic(config["critic"], dataset)
        _check_own_critic(root, config["critic"], critic_fingerprint(critic, dataset))
        return critic
    if (root / "soft_critic").exists():
        return load_soft_critic(root / "soft_critic")
    return load_iql_critic(root / "critic")


def _check_own_critic(root: Path, spec: str, here: str) -> None:
    path = root / "results.json"
    told = json.loads(path.read_text()).get("critic_sha256") if path.exists() else None
    if told not in (None, here):
        raise InputError(
            f"{spec!r} is another critic now (sha256 {here[:12]}) than the one that {root} was"
            f" finished with ({told[:12]}); put back what it was, or run the program with another"
            " --out"
        )


def load_run_dataset(config: dict[str, Any]) -> TransitionDataset:
    """The data set that a run of this configuration had; InputError where it is another one now.

    It could be opened, so actions outside the box, if there are any, were asked to be clipped.
    """
    source, told = config["source"], config["data_sha256"]
    dataset = load_dataset(source, env_id=config["env_id"], clip_actions=True)
    if dataset.sha256 != told:
        raise InputError(
            f"{source} holds other data now (sha256 {dataset.sha256[:12]}) than the run was trained"
            f" on ({told[:12]}); put the data of then back there, or run the program with another"
            " --out"
        )
    return dataset


def load_iql_critic(directory: Path) -> IQLCritic:
    """The critic that `fit_critic` left in a directory."""
    config = finished_config(directory)
    critic = new_critic(
        config["observation_size"], config["action_size"], CriticSettings(**config["critic"])
    )
    load_weights(directory, critic)
    return critic.requires_grad_(False).eval()
