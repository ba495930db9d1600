"""Keeps Megatron's start-up report off the terminal of the small tools."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


def hush() -> None:
    """Keep progress bars and notes of transformers and its hub client off the terminal."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # What peft still calls by an old name is no business of who runs a tool.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("huggingface_hub", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.WARNING)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back what libraries print; show it when the block fails with an unexpected error."""
    from post_training.errors import SetupError

    text = io.StringIO()
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SetupError:
        raise
    except Exception:
        sys.stderr.write(text.getvalue())
        raise
    finally:
        logging.getLogger().setLevel(level)
