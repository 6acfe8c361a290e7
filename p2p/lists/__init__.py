"""Many edits: jobs, engines, PIE-Bench, data sets, metrics."""
