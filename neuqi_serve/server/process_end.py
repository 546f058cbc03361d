"""The end of a process that has served."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Run the exit handlers and end without taking the interpreter apart.

    Tearing down torch, triton and vLLM takes seconds and makes triton print pages about leaked objects, after the
    error message that should come last.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
