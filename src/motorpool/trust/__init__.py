"""Identity, consent and keys: bytes in, verdict out."""
