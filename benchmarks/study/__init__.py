"""Research: every rule that was tried, judged on texts. Nothing that a user imports."""
