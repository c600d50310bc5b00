"""The shell of the vehicle: signals in, engine and message link out, the pure vehicle machine in between."""
