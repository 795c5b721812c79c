"""What every script shares: flags, data sets, run.json."""
