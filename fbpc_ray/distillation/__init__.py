"""Algorithm 1: expert training, the methods' gradients, the loop and its run directory.

Imports core to evaluation.
"""
