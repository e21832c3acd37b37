"""The cost of an update: what is measured is what is said, and at which size."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rtb_rl.benchmarks import text_to_image_checks as checks

from rtb_rl import cli
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.footprint import (
    Cost,
    Stopwatch,
    Work,
    costs_in_turn,
    new_finetuner,
    peak_of_updates,
)
from rtb_rl.tasks.text_to_image.random_pipelines import (
    SMALL,
    STABLE_DIFFUSION,
    new_modules,
    random_pipeline,
)
from rtb_rl.tasks.text_to_image.shapes_networks import new_tokenizer
from rtb_rl.training.ema import TrainedState

CPU = torch.device("cpu")
TINY = Work(levels=5, levels_per_path=2, paths=3, chunk=2, draw_batch=2, pixels=16)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(out):
    lines = (out / "rows.jsonl").read_text().splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def run(out, **given):
    checks.main(checks.Settings(out=out, fast=True, **given))
    return rows_of(out)


def test_the_full_size_is_that_of_stable_diffusion():
    """The numbers of parameters of SD 1.x: U-Net, VAE, and the text encoder of CLIP ViT-L/14."""
    with torch.device("meta"):
        modules = new_modules(STABLE_DIFFUSION, new_tokenizer())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_all_weights_come_from_the_generator():
    def weights(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 7)
            pipeline = random_pipeline(SMALL, generator=seeded(seed % 2))
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        return torch.cat([p.flatten() for part in parts for p in part.parameters()])

    first, again, other = weights(0), weights(2), weights(1)
    assert first.equal(again) and not first.equal(other)


def test_the_gradient_sees_the_levels_that_were_asked_for_and_chunk_rows_at_once():
    finetuner = new_finetuner(random_pipeline(SMALL, generator=seeded()), TINY)
    seen = {True: [], False: []}

    def count(module, inputs):
        seen[torch.is_grad_enabled()].append(len(inputs[0]))

    unet = finetuner.task.posterior.denoiser.network.unet
    unet.register_forward_pre_hook(count)
    cost = Stopwatch(finetuner)(0)
    paths, guided = TINY.paths, 2
    assert sum(seen[True]) == guided * paths * TINY.levels_per_path
    assert max(seen[True]) == guided * TINY.chunk
    assert sum(seen[False]) == guided * paths * TINY.levels
    assert max(seen[False]) == guided * TINY.draw_batch
    assert 0 < cost.drawing < cost.seconds and cost.peak is None
    assert cost.gradient == pytest.approx(cost.seconds - cost.drawing)
    assert "draw" not in vars(finetuner.paths), "the fine-tuning is left as it was"


def test_a_watched_update_is_that_of_a_finetuner():
    pipeline = random_pipeline(SMALL, generator=seeded())
    watched, plain = (new_finetuner(pipeline, TINY) for _ in range(2))
    watch = Stopwatch(watched)
    for step in range(2):
        watch(step)
        plain.update(step)
    one, two = (TrainedState(tuner.task.posterior).state_dict() for tuner in (watched, plain))
    assert one and all(one[name].equal(two[name]) for name in one)
    assert any((value != 0).any() for name, value in one.items() if "lora_B" in name)


def test_medians_leave_out_the_first_round_and_take_turns():
    order = []

    def watch(name, seconds):
        def one(step):
            order.append(name)
            return Cost(seconds[step], seconds[step] / 2, 100.0 - step)

        return one

    watches = {"a": watch("a", [100, 1, 9, 2]), "b": watch("b", [100, 5, 3, 4])}
    found = costs_in_turn(watches, 3)
    assert order == ["a", "b"] * 4
    assert found == {"a": Cost(2, 1.0, 99.0), "b": Cost(4, 2.0, 99.0)}


@pytest.mark.parametrize(("gradient", "holds"), [(2.9, True), (3.1, False)])
def test_the_speed_bound_is_on_the_gradient_alone(gradient, holds, tmp_path, monkeypatch):
    costs = {"8 of 50 levels": Cost(20 + gradient, 20, None), "all 50 levels": Cost(30, 20, None)}
    monkeypatch.setattr(checks, "some_and_all", lambda networks, work, repeats: costs)
    rows = run(tmp_path, only=("speed",))
    ratio = rows["speed: ratio of the gradients"]
    assert ratio["value"] == pytest.approx(gradient / 10) and ratio["bound"] == 0.3
    assert ratio["holds"] is holds
    whole = rows["speed: ratio of the updates"]
    assert whole["value"] == pytest.approx((20 + gradient) / 30) and whole["bound"] is None
    assert rows["speed: all 50 levels: seconds of its drawing"]["value"] == 20


@pytest.mark.parametrize(("many", "holds"), [(1090.0, True), (1110.0, False)])
def test_the_memory_bound(many, holds, tmp_path, monkeypatch):
    asked = []

    def peak(networks, work, device, updates=2):
        asked.append((work.levels, work.levels_per_path, updates))
        return many if work.levels == 100 else 1000.0 if updates else 400.0

    monkeypatch.setattr(checks, "peak_of_updates", peak)
    checks.main(checks.Settings(out=tmp_path, only=("memory",)))
    row = rows_of(tmp_path)["memory: 100 levels over 10, less 1"]
    assert row["value"] == pytest.approx(many / 1000 - 1) and row["holds"] is holds
    assert asked == [(10, None, 2), (100, None, 2), (10, None, 0)]


def test_fewer_levels_take_less_time(tmp_path):
    rows = run(tmp_path, only=("speed",))
    assert rows["speed: ratio of the gradients"]["value"] < 0.6  # about 0.2
    again = run(tmp_path, only=("speed",))
    assert again == rows, "what is complete is not done again"


@without_gpu
def test_the_full_size_needs_a_gpu(tmp_path, capsys):
    out = tmp_path / "out"
    for given in ({}, {"allow_cpu": True}, {"size": 64}):
        with pytest.raises(InputError, match="needs a GPU, and there is none here"):
            run(out, only=("full_size",), **given)
    assert not out.exists()
    command = ["bench", "text_to_image_checks", "--only", "full_size", "--out", str(out)]
    assert cli.main(command) == 2
    assert "--allow-cpu --size 64" in capsys.readouterr().err


@without_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_full_size_check_on_a_cpu(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "STABLE_DIFFUSION", SMALL)
    given = {"only": ("full_size",), "allow_cpu": True, "size": 16, "precision": precision}
    rows = run(tmp_path, **given)
    assert len(rows) == 2 * 2 * 3 and all(math.isfinite(row["value"]) for row in rows.values())
    for how in ("no checkpointing", "checkpointing"):
        for levels in ("1 of 3 levels", "all 3 levels"):
            assert rows[f"full size, 16 px, {how}, {levels}: seconds of an update"]["value"] > 0
    monkeypatch.setattr(checks, "some_and_all", None)
    (tmp_path / "full_size" / "results.json").unlink()
    assert run(tmp_path, **given) == rows, "each of its parts is kept"


def test_a_check_that_there_is_not(tmp_path):
    with pytest.raises(InputError, match="no check sped; the checks are speed, memory, full_size"):
        run(tmp_path / "out", only=("sped",))
    assert not (tmp_path / "out").exists()
    assert checks.chosen_checks(checks.Settings()) == ("speed", "memory")


@pytest.mark.slow
def test_memory_grows_with_the_rows_at_once_and_not_with_levels():
    work = replace(checks.MEMORY, levels=20)
    few, many, at_once = (
        peak_of_updates(SMALL, one, CPU)
        for one in (work, replace(work, levels=60), replace(work, levels=60, chunk=120))
    )
    assert many / few - 1 < 0.1 < at_once / few - 1
