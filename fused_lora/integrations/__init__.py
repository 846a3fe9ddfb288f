"""What other libraries are asked: the only imports of them."""
