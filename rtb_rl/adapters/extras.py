"""What an adapter says where the packages it adapts are not installed, and what of their own
messages is left out.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rtb_rl.errors import InputError

BACKENDS = "transformers.utils.import_utils"  # the logger that names what transformers lacks
BARS = ("diffusers.utils.logging", "transformers.utils.logging")
HUB = "huggingface_hub.utils"


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn an ImportError inside into an InputError that names the extra to install.

    That transformers would rather have torchvision is not passed on: no adapter needs it.
    """

    def passed_on(record: logging.LogRecord) -> bool:
        return "requires torchvision" not in record.getMessage()

    backends = logging.getLogger(BACKENDS)
    backends.addFilter(passed_on)
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"this needs packages that are not installed ({error}); run: pip install"
            f" 'rtb-rl[{name}]'"
        ) from error
    finally:
        backends.removeFilter(passed_on)


@contextmanager
def without_progress() -> Iterator[None]:
    """No bars of diffusers and transformers for the parts of a model that is loaded or saved.

    Those of a download stay. A package that isn't loaded is left alone.
    """
    loaded = [sys.modules[name] for name in BARS if name in sys.modules]
    shown = [bars for bars in loaded if bars.is_progress_bar_enabled()]
    hub = sys.modules.get(HUB)  # whose bars transformers switches with its own
    downloads = hub is not None and not hub.are_progress_bars_disabled()
    try:
        for bars in shown:
            bars.disable_progress_bar()
        if hub is not None and downloads:
            hub.enable_progress_bars()
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()
        if hub is not None and not downloads:
            hub.disable_progress_bars()
