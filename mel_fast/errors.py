"""Errors that say all there is to say: printed as a single line, without a traceback."""


class InputError(ValueError):
    """Something given from outside cannot be used. The message names the file, line, key or rank, and what to do."""


class LaunchError(RuntimeError):
    """The ranks did not come together. The message names who is missing."""


class EngineError(RuntimeError):
    """The rollout engine cannot go on. The message names the server and where to read more."""


class OutputError(RuntimeError):
    """The disk does not take what a run writes. The message names the file and what to do."""
