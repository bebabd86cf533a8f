"""What DeepSpeed's launcher starts as every rank: the command line of lte-scale, for as long as a launcher is there.

deepspeed --hostfile HOSTFILE launchers/train.py train CONFIG [key=value ...]
"""

from __future__ import annotations

import os
import re
import select
import signal
import stat
import sys
import threading
import time

from parent_death import die_with_parent

# DeepSpeed's agent, where it is told to end a job, leaves the ranks this long. A second signal in that time would
# make a rank give up the checkpoint it is writing.
AGENT_GRACE_SECONDS = 35.0


def main() -> int:
    words = [word for word in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=-?\d+", word)]
    if "LOCAL_SIZE" in os.environ:
        # Left unset, every rank would start a thread per core. Before torch is imported, which reads it.
        cores = (os.cpu_count() or 1) // int(os.environ["LOCAL_SIZE"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        end_with_the_launcher()
    from lte_scale.cli import main as lte_scale

    return lte_scale(words)


def end_with_the_launcher() -> None:
    """Have this rank save and end when this node's agent dies, and when the connection to the launcher does.

    DeepSpeed itself does neither: the ranks of a launcher that was killed would train on, and hold the port.
    """
    die_with_parent()
    threading.Thread(target=_end_without_launcher, daemon=True).start()


def _end_without_launcher() -> None:
    """Wait until what this rank reads from or writes to is closed at the other end: by sshd, where its client is gone
    (both), or by ssh, where pdsh is (its input alone)."""
    watched = select.poll()
    for descriptor in (0, 1):
        if _is_open_pipe(descriptor):
            watched.register(descriptor, 0)
    watched.poll()
    time.sleep(AGENT_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_open_pipe(descriptor: int) -> bool:
    """No file or terminal, and not at its end from the start, as input is after `ssh -n`."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    now = select.poll()
    now.register(descriptor, 0)
    return (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) and not now.poll(0)


if __name__ == "__main__":
    sys.exit(main())
