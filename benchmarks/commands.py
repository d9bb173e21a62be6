"""Commands of this project, as the parts of `make memory-report` run them."""

import json
import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

CPU = Path("runs/memory-report/cpu.jsonl")


def run(*words: str | Path, log: Path | None = None, part: str | None = None) -> None:
    """Run a command of this project with one thread.

    Args:
        words: the module and its arguments.
        log: file for the output; a failure shows the end of it.
        part: the part of the report to which CPU adds the CPU time. Wall-clock time would depend on what else runs.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, "-m", *(str(word) for word in words)]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") if log else nullcontext() as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if part is not None:
        CPU.parent.mkdir(parents=True, exist_ok=True)
        with CPU.open("a") as file:  # one write per line, because several threads write here
            file.write(json.dumps({"part": part, "minutes": (used.ru_utime + used.ru_stime) / 60}) + "\n")
    if code:
        end = f"; the end of {log}:\n{log.read_text()[-2000:]}" if log else ""
        raise SystemExit(f"{shlex.join(command[1:])}: exit code {code}{end}")
