"""Make a table or figure of the paper: `python jobs/reproduce.py table1 --help`."""

import sys

from fbpc_ray.commands.main import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
