"""The path and long computations on disk: blocks of steps, headers, fingerprints, resumable results."""
