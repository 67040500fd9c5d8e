"""verl's own top-k forward KL beside opd's bucket."""
