"""Errors that the entry points print as one line instead of a traceback."""


class MileError(RuntimeError):
    """A job asked for something that megatron_mile cannot do exactly; the text says what to do."""


class MileCompatError(MileError):
    """The installed Megatron is not as expected: text names version, file, expected, found."""
