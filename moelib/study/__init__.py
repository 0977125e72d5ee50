"""Many runs: plan, evidence, status, data frames."""
