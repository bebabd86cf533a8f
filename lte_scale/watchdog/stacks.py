"""What this process is doing: the line, the stacks of all threads, and what PyTorch's flight recorder holds."""

from __future__ import annotations

import json
import sys
import sysconfig
import threading
import traceback
from pathlib import Path
from types import FrameType

import torch

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PACKAGE = str(Path(__file__).parent.parent)
_IN_TORCH = ("distributed_c10d.py", "c10d_logger.py")


def where() -> str:
    """The innermost line of the main thread that is not a library's, as `trainer.py:140 next_batch`.

    Reads no files: their disk may be what hangs.
    """
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if innermost is None or frame is None:
        return _line(innermost)
    return _line(frame) if frame is innermost else f"{_line(frame)}, there in {_line(innermost)}"


def _is_library(file: str) -> bool:
    return not file.startswith(_PACKAGE) and (file.startswith(_LIBRARIES) or file.startswith("<frozen"))


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "no Python code"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def in_torch() -> bool:
    """Whether a thread is in one of torch.distributed's own functions, as while it waits for a collective."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code.co_filename.endswith(_IN_TORCH):
                return True
            frame = frame.f_back
    return False


def stacks() -> str:
    """The Python stacks of all threads, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: (item[0] != main, item[0])):
        lines = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, ident)}, innermost call last:\n{lines}")
    return "\n".join(parts)


def flight_recorder() -> str:
    """The collectives that PyTorch's flight recorder holds as not done, as JSON; empty where it holds none."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        try:
            held = json.loads(getattr(torch._C._distributed_c10d, name)(includeCollectives=True, onlyActive=True))
        except Exception:  # private, and not in every build: of no consequence
            continue
        held["entries"] = [entry for entry in held.get("entries", []) if not entry.get("retired")]
        if held["entries"]:
            return json.dumps(held, indent=1)
    return ""
