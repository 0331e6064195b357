"""Reports, charts and image grids, from the files of a run. Imports core to tracking."""
