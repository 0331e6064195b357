"""Where work runs: a session of one configuration, this process or Ray. Imports core to distillation."""
