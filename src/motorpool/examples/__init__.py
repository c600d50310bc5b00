"""The documents of the demo, as package data: see README.md beside this file."""
