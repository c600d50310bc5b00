"""Telling customers, at addresses of their own, that something has ended."""
