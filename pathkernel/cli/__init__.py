"""The command line: ``pathkernel COMMAND``."""
