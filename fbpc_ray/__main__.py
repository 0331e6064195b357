"""Run the command line: `python -m fbpc_ray`."""

from fbpc_ray.commands.main import main

main()
