"""Data sets, augmentation, corruptions, coresets and their file formats. Imports core."""
