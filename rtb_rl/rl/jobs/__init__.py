"""A program from its data to its results: budgets, shared stages, reports, saved runs."""
