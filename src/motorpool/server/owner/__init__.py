"""The owner's side of the control plane."""
