"""The batched ensemble against a loop, the IQL critic's identities, and a user's own critics."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rtb_rl.errors import InputError
from rtb_rl.nn.ensemble import EnsembleMLP
from rtb_rl.rl.critics.critic import IQLCritic, check_critic, load_critic


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("output_size", [1, 3])
def test_ensemble_equals_a_loop_over_its_members(layer_norm: bool, output_size: int) -> None:
    generator = seeded()
    net = EnsembleMLP(
        5, output_size, members=4, width=16, depth=2, layer_norm=layer_norm, generator=generator
    ).double()
    randomise(net, generator)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    outputs = []
    for member in range(4):
        hidden = x
        for layer in range(3):
            weight, bias = net.weights[layer][member], net.biases[layer][member, 0]
            hidden = nn.functional.linear(hidden, weight.T, bias)
            if layer < 2 and layer_norm:
                gain, shift = net.gains[layer][member, 0], net.shifts[layer][member, 0]
                hidden = nn.functional.layer_norm(hidden, (16,), gain, shift)
            hidden = torch.relu(hidden) if layer < 2 else hidden
        outputs.append(hidden)
    expected = torch.stack(outputs)
    torch.testing.assert_close(net(x), expected)
    parameters = list(net.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(net(x).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
    )


def test_ensemble_starts_with_the_law_of_linear_layers() -> None:
    net = EnsembleMLP(30, 200, members=3, width=200, depth=1, generator=seeded())
    for weight, bias, fan_in in zip(net.weights, net.biases, (30, 200), strict=True):
        bound = fan_in**-0.5
        rounded = bound * (1 + 1e-6)  # the draws are float32, and may be rounded upwards
        linear = nn.Linear(fan_in, 200)
        for values in (linear.weight, linear.bias, *weight, bias):
            assert 0.95 * bound < float(values.detach().abs().max()) <= rounded
        for values in (linear.weight, *weight):
            assert float(values.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)
            assert abs(float(values.detach().mean())) < 0.03 * bound
    assert not torch.equal(net.weights[0][0], net.weights[0][1])


def test_ensemble_is_drawn_from_its_generator_only() -> None:
    untouched = torch.get_rng_state()
    first = EnsembleMLP(3, 1, members=2, generator=seeded(5)).state_dict()
    assert torch.equal(torch.get_rng_state(), untouched)
    torch.rand(1)
    second = EnsembleMLP(3, 1, members=2, generator=seeded(5)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ensemble_refuses_empty_sizes() -> None:
    with pytest.raises(InputError, match="members=0"):
        EnsembleMLP(3, 1, members=0, generator=seeded())


def test_q_is_the_minimum_over_members() -> None:
    generator = seeded()
    critic = IQLCritic(3, 2, members=5, width=16, generator=generator)
    observation = torch.randn(9, 3, generator=generator)
    action = torch.rand(9, 2, generator=generator) * 2 - 1
    members = critic.q_network(torch.cat([observation, action], 1))[..., 0]
    assert torch.equal(critic.q(observation, action), members.min(dim=0).values)
    assert len(members.argmin(dim=0).unique()) > 1
    assert critic.v(observation).shape == (9,)


def test_standardised_critic_does_not_see_the_units_of_observations() -> None:
    data = torch.randn(500, 3, generator=seeded())
    foreign = data * torch.tensor([100.0, 0.1, 3.0]) + torch.tensor([5.0, -2.0, 300.0])
    action = torch.zeros(500, 2)
    critics = [IQLCritic(3, 2, width=16, generator=seeded(1)) for _ in range(2)]
    for critic, observations in zip(critics, (data, foreign), strict=True):
        critic.standardise(observations)
    ours, theirs = critics
    torch.testing.assert_close(
        ours.q(data, action), theirs.q(foreign, action), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.v(data), theirs.v(foreign), rtol=1e-4, atol=1e-4)
    standardised = theirs.scaler(foreign)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(standardised.std(0, correction=0), torch.ones(3))


def test_constant_observations_stay_finite() -> None:
    critic = IQLCritic(2, 1, width=8, generator=seeded())
    critic.standardise(torch.full((10, 2), 7.0))
    assert torch.equal(critic.scaler(torch.full((1, 2), 7.0)), torch.zeros(1, 2))


@pytest.mark.parametrize("observations", [torch.zeros(4, 5), torch.zeros(3), torch.zeros(0, 3)])
def test_standardising_by_foreign_observations_is_refused(observations: Tensor) -> None:
    with pytest.raises(InputError, match=r"the network expects \[n, 3\]"):
        IQLCritic(3, 1, generator=seeded()).standardise(observations)


def test_standardising_by_nan_is_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        IQLCritic(1, 1, generator=seeded()).standardise(torch.tensor([[1.0], [float("nan")]]))


class Quadratic:
    """q = scale - |a|^2, with the result passed through `change`."""

    def __init__(self, change=lambda q: q) -> None:
        self.change = change

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.change(1.0 - action.square().sum(1))


def test_critics_that_keep_the_contract_pass() -> None:
    check_critic(Quadratic(), 3, 2)
    check_critic(Quadratic(lambda q: q.double()), 3, 2)
    check_critic(IQLCritic(3, 2, generator=seeded()), 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[:, None], r"returned shape \[1, 1\], expected \[1\].*squeeze"),
        (lambda q: q.squeeze(), r"returned shape \[\], expected \[1\]"),
        (lambda q: q.mean(0, keepdim=True), r"returned shape \[1\], expected \[3\]"),
        (lambda q: q / 0.0, r"returned \[.*inf.*\], expected finite"),
        (lambda q: q * float("nan"), "expected finite"),
        (lambda q: q.half(), r"returned torch.float16, expected torch.float32.*\.float\(\)"),
        (lambda q: q.long(), r"returned torch.int64, expected torch.float32"),
        (lambda q: q.numpy(), "returned ndarray, expected a torch.Tensor.*as_tensor"),
    ],
)
def test_wrong_output_of_q_is_refused(change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_critic(Quadratic(change), 3, 2)


def test_wrong_output_of_v_is_refused() -> None:
    critic = Quadratic()
    critic.v = lambda observation: observation  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"critic.v on inputs of shape \[1, 3\] returned shape"):
        check_critic(critic, 3, 2)


def test_a_critic_of_another_data_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[1, 11\] and \[1, 3\].*data set's sizes.*RuntimeError"):
        check_critic(IQLCritic(17, 6, generator=seeded()), 11, 3)


@pytest.mark.parametrize("critic", [object(), 3, Quadratic, type("Data", (), {"q": 1.0})()])
def test_objects_without_a_method_q_are_refused(critic) -> None:
    with pytest.raises(InputError, match="a critic is an object with a method q; define q"):
        check_critic(critic, 3, 2)


SOURCE = """
class Critic:
    def __init__(self, dataset=None):
        self.dataset = dataset
    def q(self, observation, action):
        return -action.square().sum(1)

def plain(): return Critic()
def with_dataset(data): return Critic(data)
def with_path(path="weights.pt"): return Critic(path)
def two(data, path): return Critic(data)
def nothing(): return None
def broken(): raise KeyError("weights")
constant = 3.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, holding user_critic.py."""
    (tmp_path / "user_critic.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "user_critic", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("factory", "received"),
    [("plain", None), ("with_dataset", "data"), ("with_path", "weights.pt"), ("Critic", "data")],
)
def test_factory_in_the_current_directory_is_found(folder, factory: str, received) -> None:
    critic = load_critic(f"user_critic:{factory}", "data")
    check_critic(critic, 3, 2)
    assert critic.dataset == received  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("user_critic", "not of the form package.module:factory.*write my_critic:make"),
        (":make", "not of the form"),
        ("absent_critic:make", "module 'absent_critic', which is neither installed nor in"),
        ("user_critic.py:plain", r"user_critic\.py.*write user_critic:plain, without \.py"),
        ("absent_critic.py:make", r"write absent_critic:make, without \.py"),
        ("absent.critic:make", "module 'absent', which is neither"),
        ("user_critic:plane", "nothing of that name; it offers plain"),
        ("user_critic:constant", "the module has a float there"),
        ("user_critic:two", r"needs 2 arguments \(data, path\)"),
        ("user_critic:nothing", "returned None, but a critic is an object with a method q"),
    ],
)
def test_bad_specifications_are_refused(folder, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_critic(spec, "data")


def test_a_missing_requirement_of_the_users_module_is_named(folder: Path) -> None:
    (folder / "needy_critic.py").write_text("import absent_library\n")
    with pytest.raises(InputError, match="'needy_critic' imports 'absent_library'"):
        load_critic("needy_critic:make", None)


def test_errors_of_the_users_own_code_pass_through(folder) -> None:
    with pytest.raises(KeyError, match="weights"):
        load_critic("user_critic:broken", None)


@pytest.mark.parametrize("members, layer_norm", [(1, False), (2, False), (5, False), (3, True)])
def test_action_gradient_is_that_of_autograd(members: int, layer_norm: bool):
    generator = torch.Generator().manual_seed(members)
    shape = dict(members=members, width=16, layer_norm=layer_norm)
    critic = IQLCritic(4, 3, **shape, generator=generator)
    with torch.no_grad():
        for gain, shift in zip(critic.q_network.gains, critic.q_network.shifts, strict=True):
            gain.normal_(1, 0.5, generator=generator)
            shift.normal_(0, 0.5, generator=generator)
    critic.standardise(torch.randn((50, 4), generator=generator) * 3 + 1)
    observation = torch.randn((20, 4), generator=generator)
    action = torch.randn((20, 3), generator=generator).requires_grad_()
    (expected,) = torch.autograd.grad(critic.q(observation, action).sum(), action)
    torch.testing.assert_close(critic.action_gradient(observation, action), expected)


def test_a_gradient_of_several_outputs_is_refused():
    network = EnsembleMLP(2, 3, members=1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="one output"):
        network.input_gradient(torch.zeros(1, 2))
