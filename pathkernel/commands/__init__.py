"""What the commands of the command line do; each returns its result as numbers and text, for ``--json``."""
