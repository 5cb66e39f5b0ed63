"""Libraries that print bars and advice of their own are kept from doing so where isotune says what there is to say."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it libraries show no bars and log errors only; afterwards they talk as before.

    Logging is turned down as a whole and not library by library: bitsandbytes and DeepSpeed log while they are being
    imported, which peft and transformers do in the middle of a load or a save.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    silenced = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.disable(max(silenced, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silenced)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
