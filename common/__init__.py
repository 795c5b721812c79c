"""What the scripts share: flags and errors, data sets, run.json, tables."""
