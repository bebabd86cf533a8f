"""A run that hangs says which rank did not arrive, on which node and where in the code, and ends for a restart.

`watch` measures the silence of a rank and compares with the others; `verdict` finds who is to blame; `stacks` tells
what a process is doing.
"""

from lte_scale.watchdog.watch import EXIT_CODE, Watchdog

__all__ = ["EXIT_CODE", "Watchdog"]
