"""The operator's address: what vehicles and batches do, and enrolling vehicles. Not for customers."""
