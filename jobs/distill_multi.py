"""Distil a pseudocoreset over several architectures on Ray: `python jobs/distill_multi.py --help`."""

import sys

from fbpc_ray.commands.main import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
