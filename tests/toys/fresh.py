"""Fresh Python processes without the start: one process imports diffusers once, and forks for every program.

A fork of it is what a new ``python -I`` is after those imports, which take seconds: it has never imported stepdistill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, traceback
os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
import numpy, torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTokenizer
from PIL import Image
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(asked[name], os.O_WRONLY), number)
        os.chdir(asked["folder"])
        sys.argv = ["-c", *asked["arguments"]]
        status = 0
        try:
            exec(asked["program"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class FreshProcesses:
    """Runs programs in forks of one process, which is started by the first of them.

    Args:
        folder: where what the programs print is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[str] | None = None

    def run(self, program: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """As ``python -I -c program *arguments`` in ``folder``."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-I", "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        stdin, stdout = self.server.stdin, self.server.stdout
        assert stdin is not None and stdout is not None
        files = {name: self.folder / name for name in ("stdout", "stderr")}
        for file in files.values():
            file.write_text("")
        asked = {"program": program, "arguments": arguments, "folder": str(folder)}
        stdin.write(json.dumps(asked | {name: str(file) for name, file in files.items()}) + "\n")
        stdin.flush()
        status = int(stdout.readline())
        printed = {name: file.read_text() for name, file in files.items()}
        return subprocess.CompletedProcess(arguments, status, **printed)

    def close(self) -> None:
        """Ends the process."""
        if self.server is not None:
            self.server.kill()
            self.server.communicate()
