"""The full gear of the simulator: the production core and the real vehicle machines, event for event, with faults."""
