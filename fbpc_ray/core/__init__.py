"""Configuration, files, storage, errors and random streams. Imports no other room."""
