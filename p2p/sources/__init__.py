"""Sources that exist before the edit: inversions and traces."""
