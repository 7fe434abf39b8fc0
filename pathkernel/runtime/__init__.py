"""Ground that every computation stands on: interrupts, memory that is used again, threads, checksums, lazy names."""
