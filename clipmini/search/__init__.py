"""Embeddings of pictures and texts, and what is nearest to a query among them."""
