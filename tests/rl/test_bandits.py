"""The bandits of benchmarks/bandits.py, in their short form; the full bounds are the
benchmark's.
"""

import pytest
from rtb_rl.benchmarks.bandits import Settings, gaussian_errors, mixture_errors


def test_gaussian_bandit_through_the_offline_rl_path(tmp_path):
    rows = list(gaussian_errors(Settings(out=tmp_path, fast=True), seed=0))
    assert len(rows) == 3
    for case, value, bound in rows:
        assert value <= bound, case


@pytest.mark.slow
def test_mixture_bandit_through_the_offline_rl_path(tmp_path):
    for case, value, bound in mixture_errors(Settings(out=tmp_path, fast=True), seed=0):
        assert value <= bound, case
