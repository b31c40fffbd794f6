"""Mistakes of the user's.

Each message is one sentence that names what is wrong, where, the value found and what would be right.
The command lines print it without a traceback and exit with 2; anything else is a bug and exits with 1.
"""


class DynrankError(Exception):
    """Base of every error that the user can mend."""


class RecipeError(DynrankError):
    """A recipe, a DeepSpeed configuration or a command-line override that cannot be run."""


class ModelError(DynrankError):
    """A model or tokenizer folder that is missing, incomplete or of the wrong kind."""


class DataError(DynrankError):
    """Training or evaluation data that is missing, empty or malformed."""


class RunError(DynrankError):
    """A run directory, checkpoint or adapter that is missing, incomplete or belongs to something else."""


class MachineError(DynrankError):
    """The machine lacks something that was asked for (a package, a kernel feature, memory)."""
