"""Run one chapter with papermill: the whole executed notebook or none, and one clear block of text if it fails."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NNLIB_THREADS",
)


def main() -> int:
    """Execute the notebook that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapter", help="part/slug")
    parser.add_argument(
        "target",
        type=lambda name: Path(name).resolve(),
        help="the executed notebook; its log goes beside it",
    )
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--key", default="", help="of the inputs; kept in the executed notebook")
    options = parser.parse_args()
    os.environ |= dict.fromkeys(THREADS, options.threads)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    name = f"{options.chapter} ({options.profile}, seed {options.seed})"
    log, unfinished = options.target.with_suffix(".log"), options.target.with_suffix(".part")
    console = os.fdopen(os.dup(2), "w", buffering=1)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)  # what a kernel writes past Jupyter belongs into the log, too
        os.dup2(file.fileno(), 2)
    print(f"start   {name}", file=console)
    started, problem = time.perf_counter(), run(options, unfinished)
    if problem:
        where = log.relative_to(ROOT) if log.is_relative_to(ROOT) else log
        block = f"FAILED  {name}{problem}\n    log: {where}"
        options.target.with_suffix(".failed").write_text(block + "\n", encoding="utf-8")
        print(block, file=console)
    else:
        options.target.with_suffix(".failed").unlink(missing_ok=True)
        unfinished.replace(options.target)
        print(f"done    {name} in {time.perf_counter() - started:.0f} s", file=console)
    unfinished.unlink(missing_ok=True)
    return bool(problem)


def run(options: argparse.Namespace, unfinished: Path) -> str:
    """Write the executed notebook to `unfinished`; returns what went wrong, or nothing."""
    problems: list[str] = []

    def work() -> None:
        try:
            _papermill(options, unfinished)
        except BaseException as error:
            print(re.sub(r"\x1b\[[0-9;]*m", "", traceback.format_exc()))
            problems.append(_described(error, options.chapter, unfinished))

    def stop(*_: object) -> NoReturn:
        _kill_kernel()
        unfinished.unlink(missing_ok=True)
        os._exit(130)

    # In a thread of its own, since Jupyter's client replaces the signal handlers of the main thread.
    thread = threading.Thread(target=work, daemon=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    thread.start()
    thread.join()
    return "".join(problems)


def _papermill(options: argparse.Namespace, unfinished: Path) -> None:
    import nbformat
    import papermill

    notebook = papermill.execute_notebook(
        ROOT / f"book/{options.chapter}.ipynb",
        unfinished,
        {"profile": options.profile, "seed": options.seed},
        kernel_name="python3",
        progress_bar=False,
        cwd=(ROOT / f"book/{options.chapter}").parent,
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (
        1024 if sys.platform == "linux" else 1024**2
    )
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _lighter(output.data["image/png"])
    ours = notebook.metadata.setdefault("nnlib", {})
    ours["executed"] = {"key": options.key, "megabytes": round(peak)}
    nbformat.write(notebook, unfinished)


def _lighter(png: str) -> str:
    """A picture in a palette of 256 colours: a quarter of the bytes, and no difference to see."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(data := io.BytesIO(), "png", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def _described(error: BaseException, chapter: str, unfinished: Path) -> str:
    """Where it happened (the last cell that was started), and the error's type and message."""
    kind, message = (
        getattr(error, "ename", type(error).__name__),
        getattr(error, "evalue", str(error)),
    )
    if kind == "DeadKernelError":
        message = "the kernel died: out of memory, or a crash in compiled code"
    where = ""
    try:
        cells = json.loads((ROOT / f"book/{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
        ran = json.loads(unfinished.read_text(encoding="utf-8"))["cells"]
        last = [
            cell["id"] for cell in ran if cell["metadata"].get("papermill", {}).get("start_time")
        ][-1]
        number = next(n for n, cell in enumerate(cells) if cell["id"] == last)
        headings = [
            re.findall(r"^#+ +(.*)", "".join(cell["source"]), re.M) for cell in cells[:number]
        ]
        section = [heading for found in headings for heading in found][-1:]
        tags = ", ".join(cells[number]["metadata"].get("tags", [])) or "none"
        where = f"\n    cell {number + 1} of {len(cells)}, section: {'; '.join(section) or 'none'}, tags: {tags}"
    except (OSError, ValueError, LookupError, StopIteration):
        pass  # it failed before any cell ran
    return f"{where}\n    {kind}: {message.strip()}"


def _kill_kernel() -> None:
    for child in psutil.Process().children(recursive=True):
        child.kill()


if __name__ == "__main__":
    sys.exit(main())
