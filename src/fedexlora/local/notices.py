"""Other libraries' progress bars and notices, kept out of what we say."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence them; before the libraries are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"(transformers|torch|flwr_datasets|accelerate)")
