"""A script for launches that shall be looked at and not train: each rank says who it is, and writes no more."""

import os
import time

from isotune.io.errors import run_script


def main() -> None:
    who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on port {os.environ['MASTER_PORT']}\n"
    os.write(1, who.encode())  # at one stroke: other ranks write too
    time.sleep(float(os.environ.get("STAY_SECONDS", "0")))


run_script(main)
