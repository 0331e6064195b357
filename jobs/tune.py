"""Sweep hyperparameters on Ray: `python jobs/tune.py --help`."""

import sys

from fbpc_ray.commands.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
