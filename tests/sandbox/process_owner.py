"""A program that owns a process engine and waits to be killed; first it prints the processes below it."""

import asyncio
import json
import os
import sys
import tempfile

import psutil
from process_helpers import boot_rogue, make_engine, run_code


async def main() -> None:
    engine = make_engine()
    sandbox = await boot_rogue(engine)
    await sandbox.write_file("file", b"x")
    checkpoint = await sandbox.checkpoint()
    clones = await engine.fork(checkpoint, 3)
    saved = await clones[0].checkpoint()
    await clones[1].exec(["sh", "-c", "sleep 1000 & setsid sleep 1001 &"])
    busy = asyncio.create_task(run_code(clones[2], "while True: pass", timeout_s=600))
    await asyncio.sleep(0.1)
    below = [process.pid for process in psutil.Process().children(recursive=True)]
    print(
        json.dumps({"server": engine.server_pid, "below": below, "folder": tempfile.gettempdir()}), flush=True
    )
    await busy
    del saved


if __name__ == "__main__":
    if "--fork" in sys.argv and os.fork() == 0:
        import time

        time.sleep(1000)  # holds copies of whatever the owner had open
    asyncio.run(main())
