"""``/v1/responses``: requests turned into chat completions, their answers into events and stored objects."""
