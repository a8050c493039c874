"""Published weights: make, push, verify and fetch them, and their model cards."""
