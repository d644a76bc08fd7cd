"""The ways a run can end badly, each with the exit code a scheduler sees.

0 done · 1 failed · 2 usage or config · 3 a start-up check failed · 4 stopped by a guard · 130 interrupted.
A message says what is, why it cannot work, and what to do instead, with the values.
"""


class TropismError(Exception):
    """Any error that is meant for the user; the command line prints it without a traceback."""

    code = 1


class ConfigError(TropismError):
    """A recipe, a setting or a file that cannot work as written."""

    code = 2


class CheckFailed(TropismError):
    """A start-up check found that this run would learn nothing, or the wrong thing."""

    code = 3


class GuardStopped(TropismError):
    """A running job stopped itself: too many failures, or nothing left to learn from."""

    code = 4
