"""What exists of a source before the edit: inversions and traces."""
