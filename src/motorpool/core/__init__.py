"""Every decision, pure: no input or output, no clock, no randomness. Events in, commands out."""
