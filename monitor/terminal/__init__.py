"""What a terminal shows of runs: `phasewatch watch`, and the pieces that the demo shows as well."""
