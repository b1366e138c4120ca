"""Policies and evaluators: whatever proposes actions or values states from outside the search."""
