"""Train expert trajectories on Ray: `python jobs/train_experts.py --help`."""

import sys

from fbpc_ray.commands.main import main

if __name__ == "__main__":
    main(["experts", *sys.argv[1:]])
