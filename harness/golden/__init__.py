"""Small cells with known numbers, and one small configuration of every method: what `adgrid verify` runs."""
