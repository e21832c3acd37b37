"""IQL (arXiv 2110.06169) and CQL (2006.04779) as d3rlpy trains them, evaluated as everything here.

d3rlpy 2.8.1 needs gymnasium 1.0.0, so it lives in an interpreter of its own. That gets the arrays
of a data set, trains with d3rlpy's defaults, and hands back its policy as TorchScript. It can't be
resumed exactly, for d3rlpy saves neither its generators nor how far it is: training that was killed
starts again, with the same seed.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rtb_rl.errors import InputError
from rtb_rl.rl.critics.training import CriticSettings, scaled_for_critic
from rtb_rl.rl.data.dataset import TransitionDataset, data_facts
from rtb_rl.rl.episodes.curve import Watch, unwatched
from rtb_rl.rl.fitted import finished_config
from rtb_rl.rl.peers.scripted_policy import ScriptedPolicy, load_scripted_policy
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.progress import progress
from rtb_rl.training.run import Run

WORKER = Path(__file__).with_name("d3rlpy_worker.py")
ARRAYS, LOG, POLICY, FACTS = "arrays.npz", "d3rlpy.log", "policy.pt", "worker.json"
RESUME = "not exact: training that was killed starts again"
SECONDS_TO_IMPORT = 300
TORCH = torch.__version__.partition("+")[0]
CURE = (
    "make an environment for it with `python -m venv peers` and `peers/bin/pip install"
    f" d3rlpy==2.8.1 torch=={TORCH}` (torch as here, where constraints.txt pins it; the whole of"
    " that file does not fit, for d3rlpy needs gymnasium 1.0.0), then give --python"
    " peers/bin/python"
)

Versions = dict[str, str]


@dataclass(frozen=True)
class D3rlpySettings:
    """What d3rlpy is told; everything else are its defaults, which worker.json lists."""

    algorithm: Literal["iql", "cql"] = "iql"
    steps: int = 200_000
    batch: int = 256

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1:
            raise InputError(
                f"d3rlpy got steps={self.steps} and batch={self.batch}; both have to be 1 or more"
            )


def d3rlpy_versions(python: Path | None) -> Versions:
    """Versions of d3rlpy, torch, gymnasium, numpy and Python in that interpreter.

    Raises InputError where there is none, or none that imports d3rlpy 2 or later.
    """
    try:
        done = subprocess.run(
            [str(given_interpreter(python)), "-I", str(WORKER), "versions"],
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_IMPORT,
        )
    except OSError as error:
        raise InputError(f"{python} can't be started ({error.strerror}); {CURE}") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{python} took more than {SECONDS_TO_IMPORT} s to import d3rlpy; {CURE}"
        ) from error
    if done.returncode:
        raise InputError(f"{python} can't import d3rlpy ({last_line(done.stderr)}); {CURE}")
    try:
        versions = json.loads(last_line(done.stdout))
        generation = int(versions["d3rlpy"].partition(".")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{python} does not answer as Python does ({last_line(done.stdout)}); {CURE}"
        ) from error
    if generation < 2:
        raise InputError(f"{python} has d3rlpy {versions['d3rlpy']}, needed 2 or later; {CURE}")
    return versions


def given_interpreter(python: Path | None) -> Path:
    """The interpreter; InputError where none was given."""
    if python is None:
        raise InputError(f"no interpreter with d3rlpy was given; {CURE}")
    return python


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def arrays_for_d3rlpy(dataset: TransitionDataset) -> dict[str, Any]:
    """The transitions as NumPy arrays [rows, ...] under the names that d3rlpy's worker reads.

    `terminals` are the data set's. `timeouts` are True in the other rows that no row follows which
    begins where they end: episodes that were cut, or whose last rows were dropped on reading.
    """
    follows = (dataset.next_observations[:-1] == dataset.observations[1:]).all(1)
    cut = torch.cat([~follows, torch.ones(1, dtype=torch.bool, device=follows.device)])
    cut = (cut | dataset.truncated) & ~dataset.terminated
    tensors = {
        "observations": dataset.observations,
        "actions": dataset.actions,
        "rewards": dataset.rewards,
        "next_observations": dataset.next_observations,
        "terminals": dataset.terminated,
        "timeouts": cut,
    }
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def fit_d3rlpy(
    directory: str | Path,
    dataset: TransitionDataset,
    settings: D3rlpySettings,
    *,
    python: Path,
    versions: Versions,
    critic_settings: CriticSettings | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
    watched: int = 0,
) -> ScriptedPolicy:
    """The policy that d3rlpy trains in the interpreter `python`, whose `versions` are recorded.

    Rewards are scaled as for the critics of this package. `watch` gets the policy `watched` times.
    The arrays are removed once they have been trained on; what d3rlpy printed stays in d3rlpy.log.
    Raises InputError with the last line of that where training fails.
    """
    scaled, words = scaled_for_critic(dataset, critic_settings or CriticSettings())
    facts = {**data_facts(dataset), "d3rlpy": asdict(settings), "rewards": words}
    run = Run(directory, {**facts, "versions": versions, "seed": seed})
    if run.results is not None:
        return load_d3rlpy(run.directory)
    _clear(run)
    np.savez(run.directory / ARRAYS, **arrays_for_d3rlpy(scaled))

    def show_to_watch(report: dict[str, Any]) -> None:
        exported = run.directory / report["policy"]
        watch(report["step"], report["steps"], _policy(exported, dataset))
        exported.unlink()

    options = {**asdict(settings), "seed": seed, "exports": watched}
    _train(run, python, options, show_to_watch)
    made = json.loads((run.directory / FACTS).read_text())
    (run.directory / ARRAYS).unlink()
    data = (run.directory / POLICY).read_bytes()
    run.finish(
        {**made, "rewards": words, "resume": RESUME, "sha256": hashlib.sha256(data).hexdigest()}
    )
    return load_d3rlpy(run.directory)


def load_d3rlpy(directory: str | Path) -> ScriptedPolicy:
    """The policy that `fit_d3rlpy` left in a directory."""
    directory = Path(directory)
    config = finished_config(directory)
    return load_scripted_policy(
        directory / POLICY,
        action_low=torch.tensor(config["action_low"]),
        action_high=torch.tensor(config["action_high"]),
        sha256=json.loads((directory / "results.json").read_text())["sha256"],
    )


def note_versions(directory: Path, versions: Versions) -> None:
    """Add those of the other interpreter to the manifest of a run, and so to its results."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    named = {name if name == "d3rlpy" else f"d3rlpy's {name}": versions[name] for name in versions}
    manifest["versions"] |= named
    replace_file(path, (json.dumps({**manifest, "resume": RESUME}, indent=2) + "\n").encode())


def _policy(path: Path, dataset: TransitionDataset) -> ScriptedPolicy:
    return load_scripted_policy(
        path, action_low=dataset.action_low.cpu(), action_high=dataset.action_high.cpu()
    )


def _clear(run: Run) -> None:
    """Remove what training that was killed has left: the next one does not go on from there."""
    run.restore({})
    for name in (LOG, FACTS, "curve.json"):
        (run.directory / name).unlink(missing_ok=True)
    for path in run.directory.glob("*policy*.pt"):
        path.unlink()


def _train(
    run: Run, python: Path, options: dict[str, Any], exported: Callable[[dict[str, Any]], None]
) -> None:
    """The worker, from start to end: its output to the log, its reports to metrics and progress."""
    directory = run.directory.absolute()
    options = {"arrays": directory / ARRAYS, "out": directory, **options}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [str(python), "-I", "-u", str(WORKER), "train", *words]
    log = directory / LOG
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as worker,
        progress(f"d3rlpy {options['algorithm']}", options["steps"]) as show,
    ):
        try:
            for report in _reports(worker, log):
                run.log(report["step"], report["metrics"])
                show(report["step"], "")
                if report["policy"]:
                    exported(report)
        except BaseException:
            worker.kill()
            raise
    if worker.returncode:
        raise InputError(
            f"d3rlpy's training ended with status {worker.returncode}:"
            f" {last_line(log.read_text())}; all of its output is in {log}: mend what it says and"
            " run the same command again"
        )


def _reports(worker: subprocess.Popen[str], log: Path) -> Iterator[dict[str, Any]]:
    """What the worker reports among the lines it prints, all of which go to the log."""
    assert worker.stdout is not None
    with open(log, "w") as file:
        for line in worker.stdout:
            file.write(line)
            file.flush()
            if line.startswith('{"step"'):
                yield json.loads(line)
