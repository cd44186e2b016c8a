"""Speed and error of rr_flex beside dense attention and rival selection rules: `python -m benchmarks`."""
