"""The errors a user can meet, one tree.

::

    NeuqiError                 exit code 1
    ├── UsageError             2   an option or argument is wrong
    ├── DoesNotFitError        3   the model does not fit into the memory there is
    ├── UnsupportedModelError  4   no model there, or one that we cannot quantize or serve
    ├── IntegrityError         5   a checkpoint is damaged, incomplete or of an unknown format version
    ├── PortInUseError         6   the address to listen on is taken
    └── KernelError            7   a kernel computes something else than its definition

Every message says what was expected, what came, and what to do. The command line prints the message without a
traceback and exits with ``exit_code``; the numbers are part of the interface and do not change.
"""


class NeuqiError(Exception):
    """Base of every error that this package raises for something outside its own code."""

    exit_code = 1


class UsageError(NeuqiError, ValueError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class DoesNotFitError(NeuqiError):
    """The model does not fit into the memory there is."""

    exit_code = 3


class UnsupportedModelError(NeuqiError):
    """There is no model at the place named, or it is of a kind that we cannot quantize or serve."""

    exit_code = 4


class IntegrityError(NeuqiError):
    """A checkpoint is damaged, incomplete, or written in a format version that this reader does not know."""

    exit_code = 5


class PortInUseError(NeuqiError):
    """The address to listen on is taken by another process."""

    exit_code = 6


class KernelError(NeuqiError):
    """A kernel computes something else than its definition on this machine."""

    exit_code = 7
