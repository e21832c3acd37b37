"""A program takes the options that it has a use for: the others are unknown to it."""

import importlib

import pytest
import tyro

OPTIONS = ("critic", "beta", "ess", "kl", "candidates")
TAKEN = {
    "rtb_iql": OPTIONS,
    "rtb_best_of_n": OPTIONS,
    "rtb_amortised": ("critic", "beta", "ess", "kl"),
    "qgpo": ("critic", "beta", "ess", "kl"),
    "rtb_iql_seeds": ("critic", "beta", "candidates"),
    "rtb_soft": ("beta", "candidates"),
    "best_of_n": ("critic", "candidates"),
    "iql": ("critic",),
    "dql": ("candidates",),
    "diffusion_bc": (),
    "td3_bc": (),
    "d3rlpy_peer": (),
}


def settings_of(program):
    return importlib.import_module(f"rtb_rl.agents.{program}").Settings


@pytest.mark.parametrize("program", TAKEN)
def test_options_are_those_with_an_effect(program):
    assert hasattr(settings_of(program), "critic_steps") == ("critic" in TAKEN[program])
    known = {option for option in OPTIONS if hasattr(settings_of(program), option)}
    assert known == set(TAKEN[program])


@pytest.mark.parametrize("program", [name for name in TAKEN if "kl" not in TAKEN[name]])
def test_a_strength_that_nothing_would_follow_is_refused(program, capsys):
    """It was taken and ignored."""
    with pytest.raises(SystemExit):
        tyro.cli(settings_of(program), args=["--kl", "0.5"])
    assert "Unrecognized options: --kl" in capsys.readouterr().err
