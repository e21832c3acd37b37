"""rtb_iql for several seeds at once leaves what rtb_iql leaves seed by seed."""

import json

import pytest
from rtb_rl.agents import rtb_iql, rtb_iql_seeds
from tiny_budget import TINY

from rtb_rl.errors import InputError
from rtb_rl.rl import collect, evaluate, load_policy
from rtb_rl.rl.jobs import opening

pytestmark = pytest.mark.mujoco


def read(path):
    return json.loads(path.read_text())


def test_seeds_at_once_are_ordinary_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(opening, "budget_for", lambda name, tuning: TINY.with_beta(tuning.beta))
    given = dict(dataset=collect("hopper-random", steps=600, seed=0))
    out = tmp_path / "seeds"
    with pytest.raises(InputError, match="can't take --curve"):
        rtb_iql_seeds.main(rtb_iql_seeds.Settings(**given, out=out, seeds=(3, 5), curve=2))
    with pytest.raises(InputError, match="different numbers"):
        rtb_iql_seeds.main(rtb_iql_seeds.Settings(**given, out=out, seeds=(3, 3)))
    assert not out.exists()
    rtb_iql_seeds.main(rtb_iql_seeds.Settings(**given, out=out, seeds=(3, 5)))
    alone, ours = tmp_path / "alone", out / "seed5"
    rtb_iql.main(rtb_iql.Settings(**given, out=alone, seed=5))
    assert read(ours / "config.json") == read(alone / "config.json")
    for stage in ("prior", "critic"):
        assert read(ours / stage / "config.json") == read(alone / stage / "config.json")
    results, expected = read(ours / "results.json"), read(alone / "results.json")
    assert results.keys() == expected.keys()
    assert results["timings"].keys() == expected["timings"].keys()
    assert results["diagnostics"] == pytest.approx(expected["diagnostics"], rel=0.05, abs=0.01)
    for method, row in expected["methods"].items():
        assert results["methods"][method]["returns"] == pytest.approx(row["returns"], rel=0.2)
    policy = load_policy(ours)
    again = evaluate(policy, policy.env_id, episodes=2, seed=5)
    assert again.returns == results["methods"]["rtb"]["returns"]
    before = (ours / "posterior" / "model.safetensors").read_bytes()
    rtb_iql.main(rtb_iql.Settings(**given, out=ours, seed=5))
    assert (ours / "posterior" / "model.safetensors").read_bytes() == before
