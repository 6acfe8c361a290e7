"""What may be asked: settings checked, priced and laid out before anything runs."""
