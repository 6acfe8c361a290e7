"""Ways to look at an edit."""
