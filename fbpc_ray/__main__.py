from fbpc_ray.commands.main import main

main()
