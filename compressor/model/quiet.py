"""Keeps the libraries' progress bars, advice and warnings off the user's terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

CHATTY_LOGGERS = ("lm_eval", "accelerate", "datasets", "compressed_tensors")


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers, compressed-tensors, datasets and lm-eval draw no bars and give no advice.

    Whoever uses it checks for himself what the silenced warnings would have said (missing and unexpected
    keys). It changes the process's logging and bars until it is left, so it belongs around library calls
    that are not concurrent with others of its kind.
    """
    from loguru import logger as loguru_logger
    from tqdm.std import tqdm  # type: ignore[import-untyped]
    from transformers.utils import logging as hf_logging

    # compressed-tensors and lm-eval give no switch for their bars: every bar is made disabled instead.
    make_bar = tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        make_bar(self, *args, **{**kwargs, "disable": True})

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in CHATTY_LOGGERS}
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    loguru_logger.disable("compressed_tensors")
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), patch.object(tqdm, "__init__", disabled):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        loguru_logger.enable("compressed_tensors")
        if bars:
            hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(verbosity)
