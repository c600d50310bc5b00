"""The owner's side of the vehicle: acts that stop it, the log that is theirs, and the page for their phone."""
