"""What the interpreter that holds d3rlpy runs: arrays in, a policy as TorchScript out.

    PYTHON -I rtb_rl/rl/peers/d3rlpy_worker.py versions
    PYTHON -I rtb_rl/rl/peers/d3rlpy_worker.py train --arrays A.npz --out DIR --algorithm iql ...

It is started by path and imports d3rlpy, torch and numpy only: `rtb_rl` is not installed there.
`-I` keeps the modules beside this file from standing in for others of the same name.

`versions` prints one JSON object. `train` prints a JSON object {"step", "steps", "metrics",
"policy"} every REPORT_EVERY steps and whenever it has exported a policy, and leaves `policy.pt`
(observations [n, d_o], float32 -> actions [n, d_a] in [-1, 1]) and `worker.json` in DIR.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CONFIGS = {"iql": "IQLConfig", "cql": "CQLConfig"}
PACKAGES = ("d3rlpy", "torch", "gymnasium", "numpy")
REPORT_EVERY = 100
COMPARED_ROWS = 256
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}  # on GPUs d3rlpy allows matrix products in TF32
STATUS = Path("/proc/self/status")


def versions() -> dict[str, str]:
    """Of this interpreter; imports d3rlpy, so that one that is broken fails here."""
    import_module("d3rlpy")
    return {**{name: version(name) for name in PACKAGES}, "python": platform.python_version()}


def episode_rows(ends: np.ndarray) -> Iterator[slice]:
    """The rows of each episode, of flags [rows] that are True in an episode's last row."""
    last = np.flatnonzero(ends) + 1
    for first, after in zip(np.concatenate([[0], last[:-1]]), last, strict=True):
        yield slice(int(first), int(after))


def episodes_of(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """d3rlpy's episodes, as keywords: their transitions are the rows of the arrays, one each.

    d3rlpy takes the next row's observation for the next one, so an episode that was cut gets one
    more row for its last: the observation it was cut at. d3rlpy counts no transition from it, and
    neither its action nor its reward, which are 0, is read.
    """
    for rows in episode_rows(arrays["terminals"] | arrays["timeouts"]):
        observations, actions = arrays["observations"][rows], arrays["actions"][rows]
        rewards = arrays["rewards"][rows, None]
        terminated = bool(arrays["terminals"][rows.stop - 1])
        if not terminated:
            successor = arrays["next_observations"][rows.stop - 1 : rows.stop]
            observations = np.concatenate([observations, successor])
            actions = np.concatenate([actions, np.zeros_like(actions[:1])])
            rewards = np.concatenate([rewards, np.zeros_like(rewards[:1])])
        yield {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminated": terminated,
        }


def replay_of(arrays: dict[str, np.ndarray]) -> Any:
    """d3rlpy's replay buffer with all transitions of the arrays."""
    dataset = import_module("d3rlpy.dataset")
    episodes = [dataset.Episode(**fields) for fields in episodes_of(arrays)]
    replay = dataset.create_infinite_replay_buffer(episodes=episodes)
    if replay.transition_count != len(arrays["rewards"]):
        raise SystemExit(
            f"d3rlpy counts {replay.transition_count} transitions in {len(arrays['rewards'])} rows"
        )
    return replay


def export(algorithm: Any, path: Path, observations: np.ndarray, device: str) -> None:
    """The policy as TorchScript, which must act like d3rlpy's own on the observations, on a CPU.

    Tracing draws an example; training goes on as if nothing had been drawn.
    """
    torch = import_module("torch")
    part = path.with_name(f"part_{path.name}")
    with torch.random.fork_rng():
        algorithm.save_policy(str(part))
    exported = torch.jit.load(str(part), map_location="cpu")
    with torch.no_grad():
        actions = exported(torch.from_numpy(observations)).numpy()
    error = float(np.abs(actions - algorithm.predict(observations)).max())
    if not error <= TOLERANCE[device.partition(":")[0]]:
        raise SystemExit(f"the exported policy is off by {error:.3g} from d3rlpy's own")
    part.replace(path)


def train(options: argparse.Namespace) -> None:
    """What d3rlpy's `fit` repeats, a batch and an update, exactly `steps` times."""
    d3rlpy, torch = import_module("d3rlpy"), import_module("torch")
    d3rlpy.seed(options.seed)
    with np.load(options.arrays, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    replay = replay_of(arrays)
    config = getattr(d3rlpy.algos, CONFIGS[options.algorithm])(batch_size=options.batch)
    device = "cuda:0" if torch.cuda.is_available() else "cpu:0"
    algorithm = config.create(device=device)
    algorithm.build_with_dataset(replay)
    probe = np.ascontiguousarray(arrays["observations"][:COMPARED_ROWS])
    export(algorithm, options.out / "policy.pt", probe, device)  # what can't be is known before
    begun, cpu_begun = time.perf_counter(), time.process_time()
    for done in range(1, options.steps + 1):
        metrics = algorithm.update(replay.sample_transition_batch(options.batch))
        exported = None
        if done * options.exports // options.steps > (done - 1) * options.exports // options.steps:
            exported = f"policy_{done:08d}.pt"
            export(algorithm, options.out / exported, probe, device)
        if exported or done % REPORT_EVERY == 0 or done == options.steps:
            values = {name: float(value) for name, value in metrics.items()}
            report = {"step": done, "steps": options.steps, "metrics": values, "policy": exported}
            print(json.dumps(report), flush=True)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
    export(algorithm, options.out / "policy.pt", probe, device)
    facts = {
        "versions": versions(),
        "config": json.loads(algorithm.config.serialize()),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "device": device,
        "threads": torch.get_num_threads(),
        "transitions": replay.transition_count,
        "episodes": replay.size(),
        "peak_memory_bytes": peak_memory(),
    }
    (options.out / "worker.json").write_text(json.dumps(facts))


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    if STATUS.exists():  # what getrusage says includes the parent's peak on Linux
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions")
    training = commands.add_parser("train")
    training.add_argument("--arrays", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--algorithm", choices=tuple(CONFIGS), required=True)
    training.add_argument("--steps", type=int, required=True)
    training.add_argument("--batch", type=int, required=True)
    training.add_argument("--seed", type=int, required=True)
    training.add_argument("--exports", type=int, default=0)
    options = parser.parse_args()
    if options.command == "versions":
        print(json.dumps(versions()))
    else:
        train(options)


if __name__ == "__main__":
    main()
