"""Evaluate the coreset of a run with SGHMC on Ray: `python jobs/evaluate.py RUN --help`."""

import sys

from fbpc_ray.commands.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
