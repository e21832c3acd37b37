"""Many runs side by side: a grid of tasks, agents and seeds, and the report of its rows."""
