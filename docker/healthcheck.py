#!/usr/bin/env python3
"""Whether a run in this container shows its metrics: exit code 0 if so, 1 with the reason if not."""

from __future__ import annotations

import os
import sys
import urllib.request


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('LTE_METRICS_PORT', '9464')}/metrics"
    try:
        # No proxy of the environment stands between a container and itself.
        answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5)
        found = b"\nlte_build_info{" in answer.read()
    except OSError as error:
        print(f"{url}: {error}")
        return 1
    print(f"{url}: {'a run' if found else 'not of lte-scale'}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
