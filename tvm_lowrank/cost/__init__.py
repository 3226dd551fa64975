"""What things cost: operation counts, a roofline, and measurement."""
