"""Configuration, files, storage, errors and random streams. No domain knowledge; imports no other room."""
