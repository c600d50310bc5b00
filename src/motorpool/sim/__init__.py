"""Physics and people: owners who come and go, and their cars. Every decision is the product's own code."""
