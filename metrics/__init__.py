"""What evaluation.py is made of."""
