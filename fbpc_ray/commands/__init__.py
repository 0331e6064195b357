"""The command line: parsing, help, one file a command. Imports every room."""
