"""Local Minari data sets in D4RL's recipes, rolled out from the behaviour policies shipped here.

A recipe is `<environment>-<level>`, such as `hopper-medium-replay`; its level says which policies
act, each for an equal share of the steps (arXiv 2004.07219, appendix C):

    random         uniform actions
    medium         the policy with about a third of the expert's return
    expert         the best policy
    medium-replay  every snapshot on the way to medium, in the order of training, medium the last
    medium-expert  medium, then expert
"""

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import minari
import torch
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path
from rich.console import Console
from rich.progress import Progress

from rtb_rl.errors import InputError
from rtb_rl.rl.data.behaviour import ENVIRONMENTS, UniformPolicy, behaviour_file, load_behaviours
from rtb_rl.rl.data.file_lock import data_set_lock, held_lock
from rtb_rl.rl.episodes.environments import action_box, make_environment
from rtb_rl.rl.episodes.evaluation import Policy, derived_seed
from rtb_rl.rl.episodes.rollout import roll_out
from rtb_rl.rl.episodes.scores import reference_returns

LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert")
STAMP = "rtb_rl"  # key of the data set's metadata that says how it was made
IDENTITY = ("recipe", "steps", "seed", "environment", "behaviours_sha256")


def collect(
    recipe: str,
    *,
    steps: int,
    seed: int,
    dataset_id: str | None = None,
    datasets_path: Path | str | None = None,
    overwrite: bool = False,
) -> str:
    """Write the recipe's data set of exactly that many steps and return its Minari id.

    The id is `local/<environment>/<level>-v0` unless given; the folder is Minari's own
    (MINARI_DATASETS_PATH, or in the home folder) unless given. The arrays are a function of recipe,
    steps, seed and software versions. A data set of this id that was made from the same is kept;
    any other is an InputError unless `overwrite`. Nothing half-written is left under the id. What
    another process collects under it is waited for.
    """
    name, level = split_recipe(recipe)
    dataset_id = dataset_id or f"local/{name}/{level}-v0"
    _check(dataset_id, steps, seed)
    stamp = _stamp(name, level, steps, seed)
    with _minari_folder(datasets_path) as root:
        kept = partial(_is_kept, root / dataset_id, dataset_id, stamp)
        if overwrite or not kept():
            lock = data_set_lock(root, dataset_id)
            with _staging(root) as staging, held_lock(lock, f"collects {dataset_id}"):
                if overwrite or not kept():
                    Console(stderr=True).print(
                        f"{dataset_id}: collecting {steps} steps", highlight=False
                    )
                    episodes = _episodes(recipe, recipe_policies(name, level), steps, seed)
                    with _minari_folder(staging):
                        _create(episodes, dataset_id, ENVIRONMENTS[name], stamp)
                    _move(staging, root, dataset_id)
                    return dataset_id
    Console(stderr=True).print(f"{dataset_id}: was made with the same settings; kept")
    return dataset_id


def _check(dataset_id: str, steps: int, seed: int) -> None:
    if steps < 1 or seed < 0:
        raise InputError(f"collecting got steps {steps} and seed {seed}; give 1 and 0 or more")
    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        raise InputError(f"Minari refuses the data set id {dataset_id!r}: {error}") from error


def split_recipe(recipe: str) -> tuple[str, str]:
    """(environment, level) of `<environment>-<level>`; InputError naming what exists."""
    name, _, level = recipe.partition("-")
    if name not in ENVIRONMENTS or level not in LEVELS:
        raise InputError(
            f"unknown recipe {recipe!r}; recipes are <environment>-<level> with environment "
            f"{', '.join(ENVIRONMENTS)} and level {', '.join(LEVELS)}"
        )
    return name, level


def recipe_policies(name: str, level: str) -> list[Policy]:
    """The policies of a level, in the order in which they act."""
    if level == "random":
        env = make_environment(ENVIRONMENTS[name])
        low, high = (torch.from_numpy(bound) for bound in action_box(env))
        return [UniformPolicy(low, high)]
    behaviours = load_behaviours(name)
    names = {
        "medium": ["medium"],
        "expert": ["expert"],
        "medium-expert": ["medium", "expert"],
        "medium-replay": [*(key for key in behaviours if key.startswith("early")), "medium"],
    }[level]
    return [behaviours[key] for key in names]


def _episodes(
    recipe: str, policies: Sequence[Policy], steps: int, seed: int
) -> list[EpisodeBuffer]:
    """The episodes of all policies, one share after the other; early shares take the remainder."""
    env_id = ENVIRONMENTS[split_recipe(recipe)[0]]
    share, remainder = divmod(steps, len(policies))
    episodes = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"collecting {recipe}", total=steps)
        for index, policy in enumerate(policies):
            episodes += roll_out(
                policy,
                env_id,
                steps=share + (index < remainder),
                seed=derived_seed(seed, index),
                progress=lambda done: progress.advance(task, done),
            )
    return episodes


def _stamp(name: str, level: str, steps: int, seed: int) -> dict[str, Any]:
    """What the data set is made of, as its metadata keeps it."""
    file = None if level == "random" else behaviour_file(name)
    packages = ("rtb-rl", "gymnasium", "mujoco", "torch", "numpy", "minari")
    return {
        "recipe": f"{name}-{level}",
        "steps": steps,
        "seed": seed,
        "environment": ENVIRONMENTS[name],
        "behaviours_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file else None,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


@contextlib.contextmanager
def _minari_folder(path: Path | str | None) -> Iterator[Path]:
    """Have Minari keep data sets in `path`; its own choice for None."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    if path is not None:
        os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield _dataset_root()
    finally:
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
        elif path is not None:
            del os.environ["MINARI_DATASETS_PATH"]


def _is_kept(folder: Path, dataset_id: str, stamp: dict[str, Any]) -> bool:
    """Whether the folder holds this very data set; InputError if it holds another."""
    if not folder.exists():
        return False
    try:
        found = MinariStorage.read_raw_metadata(folder / "data").get(STAMP) or {}
    except ValueError:
        found = {}
    other = [key for key in IDENTITY if found.get(key) != stamp[key]]
    if other:
        differences = ", ".join(f"{key} {found.get(key)!r} not {stamp[key]!r}" for key in other)
        raise InputError(
            f"data set {dataset_id!r} exists in {folder} and was made from other settings "
            f"({differences}); give another id, or overwrite it"
        )
    return True


def _dataset_root() -> Path:
    try:
        return Path(get_dataset_path())
    except OSError as error:
        raise InputError(f"cannot keep data sets there: {error}; give another folder") from error


@contextlib.contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A folder beside the data sets that is gone afterwards; InputError where none can be made."""
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".collecting-") as folder:
            yield Path(folder)
    except OSError as error:
        raise InputError(
            f"cannot write a data set under {root}: {error}; give another folder or free some space"
        ) from error


def _create(
    episodes: list[EpisodeBuffer], dataset_id: str, env_id: str, stamp: dict[str, Any]
) -> None:
    """Write the Minari data set; its DataCollector needs jax, this does not."""
    low, high = reference_returns(stamp["recipe"]) or (None, None)
    versions = stamp["versions"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(code_permalink|author_email)` is set to None")
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            [replace(episode, id=i) for i, episode in enumerate(episodes)],
            env=env_id,
            eval_env=env_id,
            algorithm_name="soft actor-critic snapshots",
            author="rtb-rl",
            ref_min_score=low,
            ref_max_score=high,
            description=f"{stamp['recipe']}: {stamp['steps']} steps in {env_id}, seed "
            f"{stamp['seed']}; {', '.join(f'{name} {v}' for name, v in versions.items())}",
            data_format="hdf5",
            requirements=[f"{name}=={versions[name]}" for name in ("gymnasium", "mujoco")],
        )
    dataset.storage.update_metadata({STAMP: stamp})


def _move(staging: Path, root: Path, dataset_id: str) -> None:
    """Put the finished data set in its place, over an older one."""
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        with contextlib.suppress(ValueError):  # made meanwhile, with another data set of it
            create_namespace(namespace)
    shutil.rmtree(root / dataset_id, ignore_errors=True)
    (staging / dataset_id).rename(root / dataset_id)
