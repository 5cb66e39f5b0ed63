"""Turns off the progress bars and log messages of libraries where isotune prints its own."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it libraries show no progress bars or warnings and log errors only.

    It turns logging down as a whole, not per library: bitsandbytes and DeepSpeed log while they are imported, which
    peft and transformers do in the middle of loading or saving.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    had_hub_bars = not are_progress_bars_disabled()
    previous_level = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.disable(max(previous_level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if had_hub_bars:
            enable_progress_bars()
