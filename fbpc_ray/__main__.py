from fbpc_ray.cli import main

main()
