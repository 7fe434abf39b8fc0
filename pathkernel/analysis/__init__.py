"""What a kernel says about a network: alignment with the task, speed of change, spectrum."""
