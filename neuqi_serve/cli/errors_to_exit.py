"""Errors as one message and a stable exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from neuqi_serve.env import read_environment
from neuqi_serve.errors import NeuqiError

INTERRUPTED = 130


def run_to_exit_code(action: Callable[[], int]) -> int:
    """Run a verb; print an error as ``error: …`` on stderr and return its exit code (``neuqi_serve.errors``).

    The traceback is printed only with ``NEUQI_TRACEBACK=1``. An operating-system error (a full disk, a missing
    permission) and an error of our own code give 1, an interrupt 130.
    """
    try:
        traceback_wanted = read_environment().traceback
    except NeuqiError as error:
        return _report(str(error), error, False)
    try:
        return action()
    except NeuqiError as error:
        return _report(str(error), error, traceback_wanted)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python must not complain about it while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _report(f"{where}{error.strerror or error}", error, traceback_wanted)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error}. Set NEUQI_TRACEBACK=1 to see where, and report it."
        return _report(text, error, traceback_wanted)


def _report(text: str, error: BaseException, traceback_wanted: bool) -> int:
    if traceback_wanted:
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)
    return error.exit_code if isinstance(error, NeuqiError) else 1
