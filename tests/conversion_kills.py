"""Runs conversions that are killed, and prints what each left. Run by `test_conversion_faults.py`, with a folder.

A process of its own, so that the children, which it forks to save the imports, inherit no threads.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from release_checkpoints import contents, release

from illada.conversion import convert, converting, writing

KILL_POINTS = ["first shard", "last shard", "config", "verified", "moved away", "moved in", "10 %", "25 %", "50 %"]


def kill_after(module, name, calls=1):
    """Kills this process right after the n-th call of a function, which is half done where it writes a file."""
    original, count = getattr(module, name), [0]

    def wrapper(*arguments, **keywords):
        result = original(*arguments, **keywords)
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, wrapper)


def kill_while_renaming(number):
    rename, count = Path.rename, [0]

    def wrapper(path, target):
        rename(path, target)
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = wrapper


def arm(point):
    if point == "first shard":
        kill_after(writing, "_save_shard")
    elif point == "last shard":
        kill_after(converting, "write_weights")
    elif point == "config":
        kill_after(converting, "write_json")
    elif point == "verified":
        kill_after(converting, "verify_logits")
    elif point == "moved away":
        kill_while_renaming(1)
    elif point == "moved in":
        kill_while_renaming(2)


def seconds_of_a_run(folder: Path) -> float:
    """How long a child takes that nobody kills: the timed kills come after a share of it, on any machine."""
    folder.mkdir()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        convert(release("llada"), folder / "out", max_shard_size="50KB")
        os._exit(0)
    os.waitpid(child, 0)
    return time.perf_counter() - start


def run(folder: Path, point: str, duration: float) -> dict:
    source, out = shutil.copytree(release("llada"), folder / "source"), folder / "out"
    shutil.copytree(release("illada"), out)  # to be overwritten
    old, before = contents(out), contents(source)
    child = os.fork()
    if child == 0:
        arm(point)
        convert(source, out, max_shard_size="50KB", overwrite=True)
        os._exit(0)
    if point.endswith("%"):
        time.sleep(duration * int(point.split()[0]) / 100)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    report = {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "out": "absent" if not out.exists() else "old" if contents(out) == old else "new",
        "leftovers": sorted(path.name for path in folder.iterdir() if path.name not in ("source", "out")),
    }
    if report["out"] == "new":
        report["complete"] = len(list(out.glob("*.safetensors"))) == 7
    convert(source, out, max_shard_size="50KB", overwrite=True)
    report["second run"] = len(list(out.glob("*.safetensors"))) == 7
    report["left after it"] = sorted(path.name for path in folder.iterdir() if path.name not in ("source", "out"))
    report["source untouched"] = contents(source) == before
    return report


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    reports, duration = {}, seconds_of_a_run(folder / "unharmed")
    for point in KILL_POINTS:
        (folder / point).mkdir()
        reports[point] = run(folder / point, point, duration)
    print(json.dumps(reports))
