"""What an adapter says where the packages it adapts are not installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from rtb_rl.errors import InputError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn an ImportError inside into an InputError that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"this needs packages that are not installed ({error}); run: pip install"
            f" 'rtb-rl[{name}]'"
        ) from error
