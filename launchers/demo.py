"""The demo: shards, two emulated nodes, an interruption, the resumed run, the merged model in timm, a picture.

make demo
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CONFIG, DATA, RUN = "configs/demo.yaml", Path("data/digits"), Path("runs/demo")
STOP_AT = 500
LTE = [sys.executable, "-m", "lte_scale"]
TRAIN = [sys.executable, "launchers/emulate.py", "--nodes", "2", "--ranks-per-node", "2", "--", "train", CONFIG]


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def records() -> list[dict[str, float]]:
    path = RUN / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_until_interrupted() -> None:
    """Send SIGTERM in the middle of a window, as a scheduler would; the run saves and ends."""
    process = subprocess.Popen(TRAIN)
    try:
        while process.poll() is None and not any(r["step"] >= STOP_AT for r in records()):
            time.sleep(0.2)
        if process.poll() is not None:
            sys.exit(f"the run ended before step {STOP_AT} with exit code {process.returncode}")
        show_endpoints()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        process.kill()


def show_endpoints() -> None:
    for endpoint in sorted((RUN / "endpoints").iterdir()):
        ((target,),) = [group["targets"] for group in json.loads(endpoint.read_text())]
        url = f"http://{target}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        wanted = ("lte_images_per_second", "lte_loss", "lte_windows_total", "lte_merge_seconds_count")
        lines = [line for line in text.splitlines() if line.startswith(wanted)]
        print(f"-- {url}\n   " + "\n   ".join(lines), flush=True)


def show_network(every: int) -> None:
    """Inter-node bytes by the steps between which they were sent."""
    at_merges = between = 0
    sent = 0.0
    for record in records():
        if record["step"] % every == 0:
            at_merges += int(record["inter_node_bytes"] - sent)
        else:
            between += int(record["inter_node_bytes"] - sent)
        sent = record["inter_node_bytes"]
    print(f"node 0 sent {at_merges:,} bytes to the other node at global merges, {between:,} bytes between them")
    if between:
        sys.exit("bytes crossed between the nodes while no merge was due")


def main() -> None:
    began = time.monotonic()
    if not (DATA / "train" / "index.json").exists():
        say("WebDataset shards of the handwritten digits that ship with scikit-learn")
        subprocess.run([*LTE, "shards", "digits", str(DATA)], check=True)
    shutil.rmtree(RUN, ignore_errors=True)
    say(f"two nodes of two ranks, four heads; interrupted at step {STOP_AT}")
    train_until_interrupted()
    say("the same command again: resumes by itself")
    subprocess.run(TRAIN, check=True)
    say("what crossed the network")
    show_network(every=20)
    say("the merged model")
    (RUN / "model.safetensors").unlink(missing_ok=True)
    subprocess.run([*LTE, "export", str(RUN), str(RUN / "model.safetensors")], check=True)
    subprocess.run([*LTE, "eval", str(RUN)], check=True)
    say("the picture")
    subprocess.run([*LTE, "report", str(RUN)], check=True)
    top1 = records()[-1]["eval_top1"]
    print(f"\nheld-out top-1 {top1:.1%} after {time.monotonic() - began:.0f} s")
    if top1 < 0.95:
        sys.exit("the demo is meant to reach 95 %")


if __name__ == "__main__":
    main()
