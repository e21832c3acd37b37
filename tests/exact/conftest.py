"""Putting a mistake into the package, to see that a check notices it."""

from collections.abc import Callable

import pytest

Catches = Callable[[Callable[[], None], object, str, object], None]


@pytest.fixture
def catches(request: pytest.FixtureRequest) -> Catches:
    """catches(check, owner, name, wrong): `check` holds, and fails with `wrong` as owner.name.

    The test's report gets two properties: the mistake, as the docstring has it, and what was
    replaced.
    """
    node = request.node
    node.user_properties.append(("mistake", node.obj.__doc__.splitlines()[0]))

    def put_in(check: Callable[[], None], owner: object, name: str, wrong: object) -> None:
        check()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, wrong)
            with pytest.raises(AssertionError):
                check()
        holder = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
        node.user_properties.append(("replaced", f"{holder}.{name}"))

    return put_in
